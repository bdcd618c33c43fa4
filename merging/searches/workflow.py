"""A search, from models and examples to the best merge, its recipe and a report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merging.api.arguments import check_path
from merging.api.merge_files import merge_plan, plan_for
from merging.cluster import RayCluster, connect
from merging.display.notices import report_notices
from merging.display.tables import Table, Tabular
from merging.engine.evaluation import make_evaluation_cluster
from merging.engine.resources import pick_device
from merging.errors import InputError, OptionError, option
from merging.hub.address import hub_address, local_path
from merging.maths.lazy_torch import torch
from merging.methods.chains import chain
from merging.plan.inputs.statistics_files import find_needed_statistics
from merging.plan.recipe import FIELDS, Recipe
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.searches.command_objective import CommandObjective
from merging.searches.evaluator import DataObjective
from merging.searches.examples import ExampleSource, choose_metric, read_tasks
from merging.searches.memory_merger import MergeInputs
from merging.searches.output import write_report_files
from merging.searches.proposers import resolve_strategy
from merging.searches.recipes import is_recipe_file, read_search_recipe
from merging.searches.report import SearchReport
from merging.searches.run import SearchRun, plan_facts
from merging.searches.settings import BY_GRADIENT, SearchSettings, make_search_settings
from merging.searches.spaces import CandidateSpace, default_spaces, read_space, trivial_candidates
from merging.searches.strategy import check_budget, run_strategy
from merging.searches.trials import Trials
from merging.soups.scoring import ScoreFunction, make_scorer
from merging.storage.staging import StagedOutput, check_destination
from merging.type_checks import check_types

__all__ = ["Found", "checkpoint_folder", "search"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, repr=False)
class Found(Tabular):
    """The result of a search.

    Attributes:
        path: the folder of the winner, with the report and the recipe in it.
        winner: the name of the winner, such as ``ties (scale=1.2)``.
        recipe: the recipe that makes the winner again.
        report: the report.

    Example:
        >>> import merging
        >>> texts = [{"text": f"text {number}", "label": "even" if number % 2 == 0 else "odd"} for number in range(8)]
        >>> found = merging.search(["a", "b"], base="base", data=texts, candidates=["ties"], budget=7)
        >>> sorted(found.to_dict())[:3]
        ['base', 'candidates', 'curve']
    """

    path: Path
    winner: str
    recipe: Recipe
    report: SearchReport

    def _display_table(self) -> Table:
        return replace(self.report._display_table(), title=f"Found: {self.winner}, in {self.path}")

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        return {
            "path": str(self.path),
            "winner": self.winner,
            "recipe": self.recipe.to_dict(),
            **self.report.to_dict(),
        }


@check_types()
def search(
    models: str | Path | Sequence[str | Path],
    *,
    data: ExampleSource | Sequence[ExampleSource] | None = None,
    test: ExampleSource | Sequence[ExampleSource] | None = None,
    score: str | ScoreFunction | None = None,
    candidates: Sequence[str | Mapping[str, Any]] | None = None,
    output: str | Path = "found",
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    engine: str | RayCluster = "local",
    address: str | None = None,
    on_event: Callable[[str], None] | None = None,
    **options: Any,
) -> Found:
    """Search for the best merge of some models, and write it with a recipe and a report.

    Candidates are merged in memory, and their weights are put into one loaded model; only the winner is written. With
    ``score`` every candidate is written, scored and removed again.

    Args:
        models: the models or adapters: paths, or names on the Hub; or a recipe in a file (``.yml``), with ranges among
            its parameters.
        data: examples to choose by: a file of JSON lines or a list of mappings
            (:func:`~merging.recycling.data.read_examples`), or a list with one of them for each task.
        test: examples to report on, in the same form. Without them the report draws no conclusion.
        score: a command that prints a number for a model's folder, or a function, instead of ``data``.
        candidates: chains with ranges, such as ``"ties:density=0.1..0.5,scale=0.5..2"``, or mappings with ``method``
            and ``parameters``; by default a few that do well on our benchmark.
        output: the folder to write.
        device: the device that the model runs on, such as ``"cpu"`` or ``"cuda"``.
        resume: continue a search that was killed. The result is the same as without the interruption.
        overwrite: replace an existing output, and start again after a killed search.
        engine: ``local``, ``ray``, or a :class:`~merging.cluster.RayCluster` with settings, for parallel evaluations.
        address: the address of the Ray cluster, ``HOST:PORT`` or ``auto``.
        on_event: receives a line about each candidate.
        **options: options of the recipe (``base``, ``kind``, ``rank``, ``exclude``, ...), and the fields of
            :class:`~merging.searches.settings.SearchSettings` (``budget``, ``metric``, ``strategy``, ...).

    Returns:
        The winner's folder, its name, its recipe, and the report.

    Raises:
        MergingError: for wrong options, examples or models, and where every candidate fails. No output is written
            then; finished evaluations are kept for ``resume``.

    Example:
        >>> import merging
        >>> texts = [{"text": f"text {number}", "label": "even" if number % 2 == 0 else "odd"} for number in range(8)]
        >>> found = merging.search(["a", "b"], base="base", data=texts, candidates=["ties"], budget=7)
        >>> found.report.trials[0].complete
        True
    """
    if isinstance(models, (str, Path)) or (len(models) == 1 and is_recipe_file(models[0])):
        file = models if isinstance(models, (str, Path)) else models[0]
        models, stated, own = read_search_recipe(file)
        options, candidates = {**stated, **options}, [*own, *(candidates or ())]
    recipe_options = {name: value for name, value in options.items() if name in FIELDS and value is not None}
    settings = make_search_settings({name: value for name, value in options.items() if name not in FIELDS})
    names = tuple(str(check_path(each, "models")) for each in models)
    if not names:
        raise OptionError("there is nothing to merge: name models or adapters")
    if (data is None) == (score is None):
        raise OptionError(
            f"give either examples ({option('data')}) or a scoring command ({option('score', 'COMMAND')})"
        )
    inputs, destination = MergeInputs(models=names, options=recipe_options), Path(output)
    adapters = inputs.all_adapters()
    based = inputs.base is not None
    texts = default_spaces(len(names), based=based or adapters, adapters=adapters) if candidates is None else candidates
    spaces = [read_space(each, len(names), settings.groups) for each in texts]
    _check_statistics(inputs, spaces)
    trivial = trivial_candidates(_short_names(names), based=based or adapters)
    trivial = [each for each in trivial if based or each.chain is not None]
    check_budget(settings, trivial, spaces)
    strategy = resolve_strategy(settings.strategy)
    cluster = make_evaluation_cluster(engine, address, device)
    _check_output(destination, inputs, overwrite)
    on_event = _log_lines(on_event)
    objective: DataObjective | CommandObjective
    if score is None:
        objective = _data_objective(inputs, data, test, settings, str(pick_device(device)))
    else:
        objective = _command_objective(inputs, score, test, settings, destination, cluster)
    run = SearchRun(objective, settings, cluster, on_event)
    if cluster is not None:
        with connect(cluster):
            pass  # a cluster that does not answer is an error now, and not after the model is loaded
    elif isinstance(objective, DataObjective):
        run.local()  # what cannot be loaded leaves nothing behind
    run.check_tunable()
    facts = plan_facts(objective, spaces, settings)
    with closing(RunCheckpoint(checkpoint_folder(destination), facts, resume, overwrite)) as checkpoint:
        trials = run.trials(checkpoint)
        run_strategy(trials, trivial, spaces, settings, strategy, lambda: run.tune(checkpoint))
        found = _write(run, trials, destination, overwrite)
        checkpoint.remove()
    report_notices(found.report.notices)
    return found


def _check_statistics(inputs: MergeInputs, spaces: Sequence[CandidateSpace]) -> None:
    """Refuse chains whose statistics of examples are missing. Raises :class:`~merging.errors.OptionError`."""
    for space in spaces:
        if not inputs.statistics_files and find_needed_statistics(chain(space.chain)):
            raise OptionError(
                f"{space.text}: needs statistics of examples: gather them of each model with merge stats, and give the "
                f"files with {option('stats')}"
            )


def _data_objective(inputs: MergeInputs, data: Any, test: Any, settings: SearchSettings, device: str) -> DataObjective:
    """Return the objective on examples. Raises as :func:`search` does."""
    where = inputs.base
    if where is None:
        if inputs.all_adapters():
            raise OptionError(f"adapters are measured on their base: give {option('base')}")
        where = inputs.models[0]
    tasks = read_tasks(_sources(data), _sources(test), where, settings)
    metric = choose_metric(tasks, settings)
    return DataObjective(inputs=inputs, tasks=tasks, metric=metric, settings=settings, device=device)


def _command_objective(
    inputs: MergeInputs,
    score: str | ScoreFunction,
    test: Any,
    settings: SearchSettings,
    destination: Path,
    cluster: RayCluster | None,
) -> CommandObjective:
    """Return the objective of a scoring command. Raises as :func:`search` does."""
    if test is not None:
        raise OptionError(f"{option('test')} is for examples ({option('data')}): a scoring command has its own")
    if settings.strategy in BY_GRADIENT:
        raise OptionError(f"{option('strategy', settings.strategy)} needs examples ({option('data')})")
    make_scorer(score, settings.score_timeout)  # refused now, and not after the first merge
    return CommandObjective(
        inputs=inputs,
        score=score,
        timeout=settings.score_timeout,
        minimize=settings.minimize,
        destination=destination,
        scratch=checkpoint_folder(destination),
        threads=cluster.threads if cluster else None,
    )


def _sources(given: Any) -> list[ExampleSource]:
    """Return the examples of each task: of one task, or of a list of them."""
    if given is None:
        return []
    if isinstance(given, (str, Path)) or (given and isinstance(given[0], Mapping)):
        return [given]
    return list(given)


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the last parts of paths and addresses where they are unique, else all of it."""
    last = [name.rstrip("/").rpartition("/")[2] for name in names]
    return [short if last.count(short) == 1 else name for short, name in zip(last, names, strict=True)]


def _check_output(destination: Path, inputs: MergeInputs, overwrite: bool) -> None:
    if destination.suffix in (".safetensors", ".gguf"):
        raise OptionError(f"{destination}: the winner comes with its report: name a folder with {option('output')}")
    named = [*inputs.models, *([inputs.base] if inputs.base else [])]
    check_destination(destination, [local_path(each) for each in named if hub_address(each) is None], 0, overwrite)


def _log_lines(on_event: Callable[[str], None] | None) -> Callable[[str], None]:
    """Return a receiver of lines that logs each, and hands it on."""

    def receive(line: str) -> None:
        _log.info("%s", line)
        if on_event:
            on_event(line)

    return receive


def checkpoint_folder(output: str | Path) -> Path:
    """Return the folder in which an unfinished search keeps its evaluations."""
    destination = Path(output)
    return destination.parent / f".{destination.name}.search"


def _write(run: SearchRun, trials: Trials, destination: Path, overwrite: bool) -> Found:
    """Merge the winner into files, measure these, and put them in place with the report."""
    winner = next((trial for trial in trials.complete if trial.candidate.chain is not None), None)
    if winner is None:
        failed = next(trial.error for trial in trials.found.values() if trial.error)
        raise InputError(f"no candidate has a result on all examples: {failed}")
    recipe = run.objective.inputs.recipe(winner.candidate)
    run.on_event(f"writing {winner.candidate.name}")
    with StagedOutput(destination, overwrite, False) as staged:
        model = staged.scratch / destination.name
        merged = merge_plan(plan_for(recipe, model), model)
        report = run.report(trials, winner, model)
        write_report_files(model, recipe, report)
        for path in model.iterdir():
            path.rename(staged.folder / path.name)
        staged.commit()
    report = replace(report, notices=(*report.notices, *merged.notices, *staged.notices))
    return Found(destination, winner.candidate.name, recipe, report)
