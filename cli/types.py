"""Types of the values that options and arguments take, and how a shell completes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from merging.errors import OptionError

__all__ = ["METHOD", "MODEL", "NAME_OR_MAPPING", "SAMPLE", "SIZE", "Size", "ValuesType", "paths_that_begin"]


class Size(click.ParamType[int]):
    """Bytes, as in 500MB, 2GiB or 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from merging.plan.sizes import parse_size

        try:
            return parse_size(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)


class SampleType(click.ParamType[Any]):
    """A number of pieces from 1 on, or ``all``."""

    name = "number|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "all" else click.IntRange(1).convert(value, param, ctx)


class ValuesType(click.ParamType[Any]):
    """One number for all models, or a comma list with one a model; each may run from block to block, as 0.2:0.8.

    With " else 0.5" it has another value before and after the blocks. In braces it is a mapping by names of tensors, as
    in a recipe.
    """

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("{"):
            from merging.plan.recipe_document import parse_value

            return parse_value(value, param.opts[0] if param else value)
        try:
            numbers = tuple(part if _runs(part) else float(part) for part in value.split(","))
        except ValueError:
            if value.endswith(","):
                self.fail(f"{value!r} ends early: write all values without spaces, as in 0.5,0.5", param, ctx)
            self.fail(
                f"{value!r} is no number: write 0.3, or 0.3,0.5 for a value each, or 0.2:0.8 from the first block to "
                f"the last",
                param,
                ctx,
            )
        return numbers if "," in value else numbers[0]


class NameOrMapping(click.ParamType[Any]):
    """A name, or a mapping in braces, as in a recipe."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.startswith("-"):
            self.fail(f"needs a value, and {value} is an option", param, ctx)
        if not isinstance(value, str) or not value.startswith("{"):
            return value
        from merging.plan.recipe_document import parse_value

        return parse_value(value, param.opts[0] if param else value)


def _runs(text: str) -> bool:
    """Whether the text is numbers with colons between them, and perhaps another one for tensors outside the blocks."""
    points, _, outside = text.partition(" else ")
    numbers = [*points.split(":"), *([outside] if outside else [])]
    return ":" in points and all(math.isfinite(float(number)) for number in numbers)


class ModelType(click.ParamType[str]):
    """A model: a folder, a file, or a name on the Hub or in a store.

    It is completed to files here, or else to the Hub's cache.
    """

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        files = CompletionItem(incomplete, type="file")
        if not incomplete or paths_that_begin(incomplete):
            return [files]
        return [CompletionItem(name) for name in _cached_models() if name.startswith(incomplete)] or [files]


def paths_that_begin(text: str) -> list[str]:
    """Return the paths of files and folders that begin with a text."""
    folder, slash, name = text.rpartition("/")
    try:
        names = sorted(path.name for path in Path(folder + slash).iterdir())
    except OSError:
        return []
    return [f"{folder}{slash}{each}" for each in names if each.startswith(name)]


def _cached_models() -> list[str]:
    """Return the names of the models in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = sorted(Path(HF_HUB_CACHE).glob("models--*--*"))
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]


class MethodName(click.ParamType[str]):
    """A method, or a chain of methods joined by ``+``."""

    name = "method"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from merging.methods import ALIASES, GROUPS, METHODS, method_names

        before, plus, last = incomplete.rpartition("+")
        wrappers = list(GROUPS.values())[-1]
        if plus and not set(before.split("+")) <= wrappers.keys():
            return []  # only wrappers have a method after them
        known = dict.fromkeys(method_names(), "from an installed package")
        known |= {name: listed.summary for name, listed in METHODS.items()}
        known |= {name: f"mergekit's name for {alias.chain}" for name, alias in ALIASES.items()}
        names = [name for name in known if name.startswith(last) and name not in before.split("+")]
        return [CompletionItem(f"{before}{plus}{name}", help=known[name]) for name in names]


SAMPLE = SampleType()
SIZE = Size()
MODEL = ModelType()
METHOD = MethodName()
NAME_OR_MAPPING = NameOrMapping()
