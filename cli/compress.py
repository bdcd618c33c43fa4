"""``merge compress``: a pack of an adapter or of a model's change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .errors import OutputStatus, handle_errors
from .options import debug_option, device_option, json_option, overwrite_option, progress_option
from .output import echo, echo_json, echo_notices, echo_usage, format_size, show_progress
from .types import MODEL

if TYPE_CHECKING:
    from merging.compression import Compressed

__all__ = ["compress_command"]


@click.command(name="compress", short_help="pack a model, many times smaller")
@click.argument("model", type=MODEL)
@click.option("-o", "--output", required=True, type=click.Path(), help="the pack, a .safetensors file")
@click.option("--base", type=MODEL, help="the model that a full model was trained from; for an adapter it is noted")
@click.option(
    "--method",
    type=click.Choice(["ternary", "bands"]),
    help="signs at one scale, or directions in few bits  [default: ternary for adapters, bands for models]",
)
@click.option(
    "--density", type=float, help="share of the entries kept, with bands in embeddings and heads  [default: 0.2]"
)
@click.option("--coding", type=click.Choice(["golomb", "bitmap"]), help="where the signs are  [default: golomb]")
@click.option(
    "--scale", type=click.Choice(["least-squares", "norm"]), help="of signs: least error, or the change's own norm"
)
@click.option("--alpha", type=float, help="scale of signs in standard deviations, instead of --scale")
@click.option("--bands", help="directions@bits, the leading first  [default: *@4 for adapters, 20@8,180@4,800@2]")
@click.option(
    "--stats", type=click.Path(), help="statistics of the model by merge stats: bands keep its outputs on them"
)
@device_option
@overwrite_option
@progress_option
@json_option
@debug_option
def compress_command(model: str, progress: str | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Write an adapter, or the change of a full model from its base, into one file of few bits, and show the error.

    A pack is a model like any other for every command: it is merged, compared and inspected as it is.
    With --json the error of every tensor is printed.
    """
    with handle_errors(debug, OutputStatus(options["output"])):
        from merging.api.usage import describe_usage
        from merging.compression import compress

        with show_progress(progress, "compressing") as report:
            found = compress(model, progress=report, **options)
        usage = describe_usage(found.path)
    if as_json:
        echo_json({**found.to_dict(), "usage": usage or None})
    else:
        _print(found)
        echo_usage(usage)


def _print(found: Compressed) -> None:
    echo_notices(found.notices)
    echo(f"{found.path}: {found.kind} by {found.method} ({found.settings}) in {found.seconds:.1f} s")
    before, after = format_size(found.bytes_before), format_size(found.bytes_after)
    echo(f"  size   {before} -> {after}, {found.ratio:.1f} times smaller; {found.bits:.2f} bits a parameter")
    worst = f", {found.errors[found.worst]:.3f} at worst ({found.worst})" if found.worst else ""
    echo(f"  error  {found.error:.3f} of the change in all, {found.median:.3f} in the median tensor{worst}")
    if found.output_error is not None:
        echo(
            f"  output {found.output_error:.3f} of what the change adds to the layers' outputs on the examples, "
            f"{found.plain_output_error:.3f} without them"
        )
    echo("  evaluate the pack's model again: the effect on its task cannot be seen from these errors")
