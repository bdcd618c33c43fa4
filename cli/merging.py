"""The default command: merge models or adapters into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .errors import Placed, reported
from .executing import EXECUTION, execute, execution_options
from .fields import chain_options
from .output import Size, echo_text

if TYPE_CHECKING:
    pass

__all__ = ["merge_command", "written_method"]

RECIPE_OPTIONS = ("base", "as", "format", "dtype", "rank", "experts", "layers", "lora_alpha", "out_proj_once",
                  "shard_size", "on_mismatch", "vocabulary", "components", "dequantise", "exclude",
                  "allow_different_bases", "allow_nonfinite")  # fmt: skip


class ChainCommand(click.Command):
    """A command whose options include those of the method that its own arguments choose."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.own = list(self.params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find --method first, and take its chain's options in before the rest is read."""
        self.params = self.own
        written = written_method(args)
        if written is not None:
            with reported():
                from merging.methods import links

                classes = links(written)
                self.params = [*self.own, *chain_options(written)]
                _refuse_strangers(self, args, classes, written)
        return super().parse_args(ctx, args)


def written_method(args: list[str]) -> str | None:
    """The method as the arguments name it."""
    for position, word in enumerate(args):
        if word in ("--method", "-m") and position + 1 < len(args):
            return args[position + 1]
        if word.startswith("--method="):
            return word.partition("=")[2]
        if word.startswith("-m") and word != "-m":
            return word[2:]
    return None


def _refuse_strangers(command: click.Command, args: list[str], classes: list[Any], written: str) -> None:
    """Refuse, as a merge would, an option that belongs to a method outside the chain: click would only say unknown."""
    from merging.methods import METHODS, method_class, owner_of, parameters_of

    known = {flag for param in command.params for flag in [*param.opts, *param.secondary_opts]}
    for word in args:
        flag = word.partition("=")[0]
        if flag.startswith("--") and len(flag) > 2 and flag not in known and flag != "--help":
            field = flag[2:].removeprefix("no-").replace("-", "_").rpartition(".")[2]
            if any(field in parameters_of(method_class(name)) for name in METHODS):
                owner_of(field, classes, written)


@click.command(
    cls=ChainCommand,
    name="merge",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option(
    "-m", "--method", help="a method or chain, such as linear or lines+task_arithmetic; its options join these"
)
@click.option("--base", help="the model that the others were trained from")
@click.option(
    "--as", "as_", type=click.Choice(["adapter", "model"]), help="what to write  [default: adapters make an adapter]"
)
@click.option(
    "--format",
    type=click.Choice(["peft", "diffusers", "kohya"]),
    help="whose files a merged adapter is in  [default: those of the inputs if alike, else peft or diffusers]",
)
@click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]), help="type of every tensor")
@click.option("--rank", type=int, help="rank of a merged adapter  [default: the sum of the ranks]")
@click.option(
    "--experts",
    type=click.Choice(["together", "apart"]),
    help="factors of experts: stacked, or apart, with names for each expert  [default: together]",
)
@click.option("--layers", type=int, help="number of blocks, instead of what the base or the adapters tell")
@click.option("--lora-alpha", type=float, help="LoRA alpha of adapters, instead of what they state")
@click.option("--shard-size", type=Size(), help="most bytes in one file of a model's folder  [default: 5GB]")
@click.option("--on-mismatch", type=click.Choice(["error", "base"]), help="tensors that differ in shape or are missing")
@click.option(
    "--vocabulary",
    type=click.Choice(["error", "base", "largest"]),
    help="vocabularies of different sizes: refuse, keep the base's rows, or all rows there are",
)
@click.option(
    "--component", "components", multiple=True, help="merge this part of a pipeline, such as unet; the others are kept"
)
@click.option("--out-proj-once", is_flag=True, default=None, help="count LoRA on MultiheadAttention's output once")
@click.option(
    "--dequantize",
    "--dequantise",
    "dequantise",
    is_flag=True,
    default=None,
    help="read FP8, MXFP4 and 8-bit weights as ordinary ones",
)
@click.option(
    "--exclude",
    multiple=True,
    help="leave tensors as in the base, or the first model: a name, a part of names, or wildcards",
)
@click.option("--allow-different-bases", is_flag=True, default=None, help="merge adapters that state different bases")
@click.option("--allow-nonfinite", is_flag=True, default=None, help="merge inputs that hold NaN or infinities")
@click.option("--recipe-only", is_flag=True, help="print the recipe as YAML: nothing is merged")
@click.version_option(package_name="merging", prog_name="merge")
@execution_options
def merge_command(models: tuple[str, ...], method: str | None, recipe_only: bool, **options: Any) -> None:
    """Merge fine-tuned models or LoRA adapters into one.

    \b
    merge --method linear a.safetensors b.safetensors
    merge --method lines --base BASE one/ two/ -o merged/
    merge --method task_arithmetic --weights 1,1,-1 a/ b/ c/ --base BASE -o out/

    A MODEL is a folder, a weights file, or a model on the Hub (ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME/FILE, or the
    address of its page): a full checkpoint or an adapter. The options of a method are shown by merge --method METHOD
    --help.
    """
    execution = {name: options.pop(name) for name in EXECUTION}
    standing = Placed()
    with reported(execution["debug"], standing):
        from merging.errors import OptionError
        from merging.methods import METHODS
        from merging.plan.recipe import make_recipe

        if method is None:
            listed = "\n".join(f"  {name:16} {entry.summary}" for name, entry in METHODS.items())
            raise OptionError(f"which method? Choose one with --method:\n{listed}")
        if not models:
            raise OptionError("there is nothing to merge: name at least one model")
        options["as"] = options.pop("as_")
        stated = {name: options.pop(name) for name in RECIPE_OPTIONS}
        parameters = {name.replace("__", "."): value for name, value in options.items() if value is not None}
        values = {name: value for name, value in stated.items() if value not in (None, ())}
        recipe = make_recipe({"models": list(models), "method": method, "parameters": parameters, **values}, "merge")
        if recipe_only:
            echo_text(recipe.to_yaml().removesuffix("\n"))
            return
        execute(recipe, standing, **execution)
