"""Options that several commands share, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .output import QUIET
from .types import MODEL, SIZE

if TYPE_CHECKING:
    from merging.cluster import RayCluster

__all__ = [
    "add_options",
    "base_option",
    "block_options",
    "block_parameters",
    "changes_base_option",
    "changes_options",
    "debug_option",
    "dequantize_option",
    "device_option",
    "different_bases_option",
    "drawing_option",
    "dtype_option",
    "engine_options",
    "evaluation_options",
    "experts_option",
    "intruder_options",
    "json_option",
    "kind_option",
    "lenient_option",
    "lora_alpha_option",
    "markdown_option",
    "max_memory_option",
    "mismatch_option",
    "overwrite_option",
    "pop_engine",
    "private_option",
    "progress_option",
    "quantize_option",
    "read_intruder_options",
    "recipe_only_option",
    "remember_quiet",
    "shard_size_option",
    "threads_option",
    "vocabulary_option",
]

PROGRESS_FORMS = ["bar", "lines", "json"]

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]


def add_options(*options: Decorator) -> Callable[[Function], Function]:
    """Return a decorator that gives a command these options, shown in this order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def remember_quiet(context: click.Context, option: click.Parameter, progress: bool | None) -> bool | None:
    """Note in the context that nothing but errors is printed, and return the value."""
    context.meta[QUIET] = progress is False
    return progress


def block_parameters(stated: dict[str, Any]) -> dict[str, Any]:
    """Take weights by block and element out of a command's options, and return them as parameters of the method."""
    given = {name: stated.pop(name) for name in ("blocks", "elements")}
    return {name: values[0] if len(values) == 1 else list(values) for name, values in given.items() if values}


json_option = click.option("--json", "as_json", is_flag=True, help="print as JSON")
debug_option = click.option("--debug", is_flag=True, help="show a traceback with errors")
overwrite_option = click.option("--overwrite", is_flag=True, help="replace an existing output")
_quiet_option = click.option(
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=lambda context, option, quiet: remember_quiet(context, option, not quiet),
    help="print nothing but errors (and --json)",
)
_progress_option = click.option(
    "--progress",
    is_flag=False,
    flag_value="bar",
    type=click.Choice(PROGRESS_FORMS),
    metavar="[bar|lines|json]",
    help="progress on stderr: a bar, a line every 30 seconds, or JSON for programs  [default: a bar on a terminal, "
    "else lines]",
)


def progress_option(function: Function) -> Function:
    """Give a command ``--progress`` and ``--quiet``."""
    return _progress_option(_quiet_option(function))


device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cpu, cuda (all GPUs), cuda:0,1 (some), mps, xpu or auto",
    shell_complete=lambda context, option, incomplete: [
        name for name in ("cpu", "cuda", "mps", "xpu", "auto") if name.startswith(incomplete)
    ],
)
threads_option = click.option("--threads", type=int, help="workers  [default: all cores]")
engine_options = (
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="threads of this process, or the workers of a Ray cluster",
    ),
    click.option("--address", metavar="auto|HOST:PORT", help="the Ray cluster  [default: auto, of this machine]"),
    click.option("--workers", type=int, help="most workers of the cluster at a time  [default: all it has room for]"),
    click.option("--worker-cpus", type=float, help="processors of a worker, and its threads  [default: 1]"),
    click.option("--worker-gpus", type=float, help="GPUs of a worker, or a fraction  [default: 1 for cuda, else 0]"),
)
"""The engine that merges: this process, or a cluster."""


evaluation_options = add_options(*engine_options)
"""The engine of commands that evaluate adapters, which :func:`pop_engine` reads."""


def pop_engine(options: dict[str, Any]) -> str | RayCluster:
    """Remove the options of the engine, and return it as Python has it."""
    from merging.cluster import make_cluster

    names = ("address", "workers", "worker_cpus", "worker_gpus")
    return make_cluster(options.pop("engine"), **{name: options.pop(name) for name in names}) or "local"


max_memory_option = click.option("--max-memory", type=SIZE, help="most memory above the imports, such as 500MB")
base_option = click.option("--base", type=MODEL, help="the model that the others were trained from")
kind_option = click.option("--as", type=click.Choice(["adapter", "model"]), help="kind of the output, with --base")
block_options = add_options(
    click.option(
        "--blocks",
        multiple=True,
        metavar="LIST",
        help="weights by block: numbers, a preset such as INALL, or names, as in IN08:0.5,layers.0-15:0.3; repeated, "
        "one list a model",
    ),
    click.option(
        "--elements",
        multiple=True,
        metavar="LIST",
        help="weights by element of a block, instead of the block's: attn:0.5,mlp:0, or IN05-OUT05:attn:1; repeated, "
        "one list a model",
    ),
)
experts_option = click.option(
    "--experts",
    type=click.Choice(["together", "apart"]),
    help="factors of experts: stacked, or apart, with names for each expert  [default: together]",
)
mismatch_option = click.option(
    "--on-mismatch", type=click.Choice(["error", "base"]), help="tensors that differ in shape or are missing"
)
vocabulary_option = click.option(
    "--vocabulary",
    type=click.Choice(["error", "base", "largest"]),
    help="vocabularies of different sizes: refuse, keep the base's rows, or all rows there are",
)
dtype_option = click.option(
    "--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]), help="type of every tensor"
)
lenient_option = click.option(
    "--lenient", is_flag=True, help="in a recipe of mergekit, ignore what mergekit ignores, and say what it was"
)
lora_alpha_option = click.option(
    "--lora-alpha", type=float, help="LoRA alpha of adapters, instead of the value in their configs"
)
intruder_options = (
    click.option(
        "--reduce-intruders",
        is_flag=True,
        help="reduce new leading singular directions of the changed weights, which go with forgetting",
    ),
    click.option("--intruder-factor", type=float, help="factor of intruders, 0 to remove them  [default: 0.75]"),
)
shard_size_option = click.option(
    "--shard-size", type=SIZE, help="most bytes in one file of a model's folder  [default: 5GB]"
)
recipe_only_option = click.option("--recipe-only", is_flag=True, help="print the recipe as YAML: nothing is merged")
private_option = click.option("--private", is_flag=True, help="only you may see the repository, if it is new")
dequantize_option = click.option(
    "--dequantize",
    "dequantise",
    is_flag=True,
    help="read FP8, FP4, 8-bit, NF4, GPTQ, AWQ and GGUF weights as ordinary ones",
)
quantize_option = click.option(
    "--quantize",
    type=click.Choice(["keep", "fp8", "fp8-channel", "fp8-tensor", "mxfp4", "none"]),
    help="format of a full model's weights: keep for the base's own; none is --dequantize",
)
different_bases_option = click.option(
    "--allow-different-bases", is_flag=True, help="take adapters that state different bases"
)
changes_base_option = click.option(
    "--base", type=MODEL, help="the model that the others were trained from; full checkpoints need it"
)
changes_options = add_options(
    click.option("--exclude", multiple=True, help="leave tensors out: names, parts, or wildcards; may be repeated"),
    click.option(
        "--on-mismatch", type=click.Choice(["error", "base"]), help="base: leave out tensors that differ in shape"
    ),
    different_bases_option,
    lora_alpha_option,
    dequantize_option,
    device_option,
    click.option("--max-memory", type=SIZE, help="most memory above the imports and headers  [default: 1GiB]"),
    progress_option,
)
"""The options of commands that look at the changes of models."""
drawing_option = click.option("-o", "--output", required=True, type=click.Path(), help="a .png, .svg or .pdf")
markdown_option = click.option("--markdown", is_flag=True, help="print the table of the documentation")


def read_intruder_options(options: dict[str, Any]) -> None:
    """Replace the options on intruders by the field of a recipe. Raises :class:`~merging.errors.OptionError`."""
    factor, reduces = options.pop("intruder_factor", None), options.pop("reduce_intruders", False)
    if factor is not None and not reduces:
        from merging.errors import OptionError

        raise OptionError("--intruder-factor is for --reduce-intruders: add it")
    if reduces:
        options["reduce_intruders"] = True if factor is None else {"factor": factor}
