"""``merge rerun``: make an output once more from the recipe that it states."""

from __future__ import annotations

from collections.abc import Sequence

import click

from .errors import OutputStatus, handle_errors
from .execution import Execution, execute, execution_options
from .moe import make_again
from .options import lenient_option
from .output import echo_notices
from .types import MODEL

__all__ = ["rerun_command"]


@click.command(name="rerun", short_help="make an output once more from its own recipe")
@click.argument("path", type=MODEL, metavar="OUTPUT")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME=PATH",
    help="place of a model that was moved, by its name in the recipe; may be repeated",
)
@click.option("--allow-changed", is_flag=True, help="allow sources that changed since the output was made")
@lenient_option
@execution_options
def rerun_command(
    path: str, sources: tuple[str, ...], allow_changed: bool, lenient: bool, execution: Execution
) -> None:
    """Make an OUTPUT once more: the same bytes, from the recipe in its header.

    \b
    merge rerun merged/ -o again/
    merge rerun merged/ --source one/=/models/one -o again/
    merge rerun ORG/NAME -o again/
    merge rerun README.md -o merged/

    The sources are compared with the records in the header, and what is written with OUTPUT, byte by byte. An output of
    mergekit has its recipe in mergekit_config.yml, and a model card in a block of YAML; they state no keys of their
    sources. Relative paths are looked for in the working folder, then next to OUTPUT.
    """
    status = OutputStatus()
    with handle_errors(execution.debug, status):
        from merging.api.merge_files import default_destination
        from merging.api.rerun import plan_rerun
        from merging.moe.rerun import find_mixture, plan_moe_rerun
        from merging.object_stores.store_path import output_path

        mixture = find_mixture(path)
        if mixture is not None:
            make_again(plan_moe_rerun(mixture, parse_sources(sources), allow_changed=allow_changed), execution, status)
            return
        destination = None if execution.output is None else output_path(execution.output)
        planned = plan_rerun(path, destination, parse_sources(sources), allow_changed=allow_changed, lenient=lenient)
        if destination is None:
            status.expect(default_destination(planned.plan.recipe))
        echo_notices(planned.notices)
        execute(planned.plan.recipe, execution, status, planned=planned)


def parse_sources(texts: Sequence[str]) -> dict[str, str]:
    """Return places by names, from texts ``NAME=PATH``. Raises :class:`~merging.errors.OptionError`."""
    from merging.errors import OptionError

    for text in texts:
        if not all(text.partition("=")):
            raise OptionError(f"--source {text}: write NAME=PATH, with the name of the recipe")
    return {name: place for name, _, place in (text.partition("=") for text in texts)}
