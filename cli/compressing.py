"""``merge compress`` and ``merge decompress``: packs of models, and models of packs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .errors import Placed, reported
from .output import echo, echo_json, echo_notices, progress_bar, size_text

if TYPE_CHECKING:
    from merging.compression import Compressed

__all__ = ["compress_command", "decompress_command"]


@click.command(name="compress")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(), help="the pack, a .safetensors file")
@click.option("--base", help="what a full model was trained from; of an adapter's it is noted")
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
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto: decomposes full models")
@click.option("--overwrite", is_flag=True, help="replace an existing output")
@click.option("--progress/--quiet", default=None, help="progress bar on stderr  [default: on a terminal]")
@click.option("--json", "as_json", is_flag=True, help="print as JSON, with the error of every change")
@click.option("--debug", is_flag=True, help="show a traceback with errors")
def compress_command(model: str, progress: bool | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Write an adapter, or what a full model changed of its base, into one file of few bits, and say what that loses.

    A pack is a model like any other for every command: it is merged, compared and inspected as it is.
    """
    with reported(debug, Placed(options["output"])):
        from merging.compression import compress

        with progress_bar(progress, "compressing") as report:
            found = compress(model, progress=report, **options)
    if as_json:
        echo_json(found.to_dict())
    else:
        _print(found)


def _print(found: Compressed) -> None:
    echo_notices(found.notices)
    echo(f"{found.path}: {found.kind} by {found.method} ({found.settings}) in {found.seconds:.1f} s")
    echo(
        f"  size   {size_text(found.bytes_before)} -> {size_text(found.bytes_after)}, {found.ratio:.1f} times smaller; "
        f"{found.bits:.2f} bits a parameter"
    )
    worst = f", {found.errors[found.worst]:.3f} at worst ({found.worst})" if found.worst else ""
    echo(f"  error  {found.error:.3f} of the change in all, {found.median:.3f} in the median tensor{worst}")
    echo("  what that means for its task only a measurement tells: evaluate the pack's model again")


@click.command(name="decompress")
@click.argument("pack")
@click.option("-o", "--output", required=True, type=click.Path(), help="a folder, or a file for a bare adapter")
@click.option("--base", help="what the full model was trained from; adapters need none")
@click.option(
    "--allow-different-bases", is_flag=True, help="add it to a base of other content than it was packed beside"
)
@click.option("--overwrite", is_flag=True, help="replace an existing output")
@click.option("--progress/--quiet", default=None, help="progress bar on stderr  [default: on a terminal]")
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
@click.option("--debug", is_flag=True, help="show a traceback with errors")
def decompress_command(pack: str, progress: bool | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Write what a pack holds as an ordinary adapter, or as a full model.

    Tensors are those that the pack is read as, to the last bit.
    """
    with reported(debug, Placed(options["output"])):
        from merging.compression import decompress

        with progress_bar(progress, "unpacking") as report:
            found = decompress(pack, progress=report, **options)
    if as_json:
        echo_json(found.to_dict())
        return
    echo_notices(found.notices)
    echo(f"{found.path}: {found.kind}, {found.tensors} tensors, {size_text(found.bytes)}")
