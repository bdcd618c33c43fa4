"""Several recipes in one process: all are checked before the first is carried out, and each has its own output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Interruption, OutputStatus, Refusal, handle_errors
from .execution import Execution, execute
from .output import echo_notices
from .recipe_source import is_stream, load_source

if TYPE_CHECKING:
    from merging.plan.recipe_files import LoadedRecipe
    from merging.plan.recipe_settings import Setting

__all__ = ["RecipeRun", "load_runs", "run_several"]


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """A recipe among several, and the place of its output.

    Attributes:
        source: The recipe's file.
        loaded: The recipe.
        destination: The file or folder to write.
        needs: The earlier run whose output it reads, if any. It can be planned when that is written.
    """

    source: Path
    loaded: LoadedRecipe
    destination: Path
    needs: RecipeRun | None = None

    def refuse_later(self) -> None:
        """Refuse to plan a recipe whose models are not made yet. Raises :class:`~merging.errors.OptionError`."""
        from merging.errors import OptionError

        if self.needs is not None:
            raise OptionError(f"{self.source}: reads the output of {self.needs.source}: plan it when that is written")


def load_runs(
    sources: Sequence[Path], settings: list[Setting], output: str | None, *, lenient: bool
) -> list[RecipeRun]:
    """Read recipes, and choose the place of each one's output: ``output/NAME`` for ``NAME.yml``.

    Raises :class:`~merging.errors.MergingError` for a recipe that cannot be read, for two outputs at one place, and for
    models that do not exist and that no earlier recipe makes.
    """
    from merging.api.merge_files import default_destination
    from merging.api.output_files import is_file
    from merging.errors import InputError, OptionError
    from merging.hub.address import resolve_path
    from merging.object_stores.store_path import output_path

    folder = output_path("merged" if output is None else output)
    if is_file(folder):
        raise OptionError(f"{folder}: is one file, and each of {len(sources)} recipes has an output: name a folder")
    runs: list[RecipeRun] = []
    for source in sources:
        if is_stream(source):
            raise OptionError(f"{source}: has no name that its output could have: run this recipe alone")
        loaded = load_source(source, settings, lenient)
        echo_notices(loaded.notices)
        loaded.check_counts()
        destination = folder / (source.stem + default_destination(loaded.recipe).suffix)
        twice = next((run.source for run in runs if run.destination == destination), None)
        if twice is not None:
            raise OptionError(f"{source}: its output {destination} is the output of {twice} too: rename a recipe")
        runs.append(RecipeRun(source=source, loaded=loaded, destination=destination, needs=_maker(loaded, runs)))
    for position, run in enumerate(runs):
        maker = _maker(run.loaded, runs[position + 1 :])
        if maker is not None and not os.path.lexists(maker.destination):
            reads = f"reads {maker.destination}, which {maker.source} makes"
            raise InputError(f"{run.source}: {reads}: name {maker.source} before {run.source}")
        run.loaded.check_paths(made=[resolve_path(each.destination) for each in runs[:position]])
    return runs


def _maker(loaded: LoadedRecipe, runs: Sequence[RecipeRun]) -> RecipeRun | None:
    """Return the run among ``runs`` whose output a recipe reads, None if there is none."""
    from merging.hub.address import local_path, resolve_path
    from merging.object_stores.address import is_store_address
    from merging.object_stores.store_path import output_path
    from merging.plan.recipe_values import names_in

    outputs = {resolve_path(run.destination): run for run in runs}
    for _, name in names_in(loaded.document.values):
        place = resolve_path(output_path(name) if is_store_address(name) else local_path(name))
        found = next((outputs[each] for each in (place, *place.parents) if each in outputs), None)
        if found is not None:
            return found
    return None


def run_several(
    sources: Sequence[Path],
    settings: list[Setting],
    execution: Execution,
    status: OutputStatus,
    *,
    typed: Sequence[str],
    lenient: bool,
) -> None:
    """Carry out recipes in turn. An error ends the command, and says which recipes are done.

    Args:
        sources: The recipes' files.
        settings: Changes of all recipes.
        execution: Where and how the recipes are carried out. Its output is the folder of all outputs.
        status: Learns where the outputs go.
        typed: The changes as they were typed.
        lenient: Whether what mergekit ignores in its recipes is ignored.
    """
    _refuse_single_outputs(execution)
    runs = load_runs(sources, settings, execution.output, lenient=lenient)
    for run in runs:
        _check(run, execution)
    for position, run in enumerate(runs):
        with _account_for(runs, position, execution.dry_run), handle_errors(execution.debug, status):
            loaded = run.loaded
            if run.needs is not None:  # its paths may lead elsewhere now
                loaded = load_source(run.source, settings, lenient)
                loaded.check_paths()
            with loaded.name_lines():
                execute(loaded.recipe, replace(execution, output=str(run.destination)), status, typed)


@contextmanager
def _account_for(runs: Sequence[RecipeRun], position: int, dry_run: bool) -> Iterator[None]:
    """Add to a refusal of one of the recipes, in the body, which ones are done and which are not."""
    try:
        yield
    except Interruption:
        raise
    except Refusal as error:
        made = "; ".join(f"{run.source} is in {run.destination}" for run in runs[:position])
        left = " ".join(str(run.source) for run in runs[position:])
        lines = [_with_source(error.message, runs[position].source)]
        lines += [] if dry_run else [f"done: {made or 'none'}", f"not done: {left}"]
        raise Refusal("\n".join(lines), error.kind) from None


def _refuse_single_outputs(execution: Execution) -> None:
    from merging.errors import OptionError

    for name in ("report", "push", "keep_stages"):
        if getattr(execution, name) is not None:
            raise OptionError(f"--{name.replace('_', '-')} is for one output: run each recipe alone")


def _check(run: RecipeRun, execution: Execution) -> None:
    """Refuse a recipe that cannot be carried out, as far as this is known before an earlier one has been."""
    from merging.api.merge_files import check_output, plan_for
    from merging.api.output_files import check_place
    from merging.errors import MergingError, OutputError

    if execution.dry_run:
        run.refuse_later()
    try:
        if run.needs is not None:
            remark = check_place(run.destination, (), 0, execution.overwrite, dry=True)
        else:
            with run.loaded.name_lines():
                plan = plan_for(run.loaded.recipe, run.destination)
                # The room on the disk is checked when its turn comes.
                remark = check_output(plan, run.destination, execution.overwrite, dry=True, there=sys.maxsize)
    except MergingError as error:
        raise type(error)(_with_source(str(error), run.source)) from None
    if remark and not execution.dry_run:
        raise OutputError(_with_source(remark, run.source))


def _with_source(message: str, source: Path) -> str:
    """Return a message that begins with the recipe."""
    return message if message.startswith((f"{source}:", f"{source}, line ")) else f"{source}: {message}"
