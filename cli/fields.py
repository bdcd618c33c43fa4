"""Options made from the fields of a method or a recipe, each declared there with its default, bounds and help."""

from __future__ import annotations

import math
import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


__all__ = ["Values", "chain_options", "choices", "field_option"]


class Values(click.ParamType):
    """One number for all models, or a comma list with one a model; each may run from block to block, as 0.2:0.8."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(part if _runs(part) else float(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"{value!r} is neither a number nor a comma list of numbers, nor such that run from the first block to "
                f"the last (0.2:0.8)",
                param,
                ctx,
            )
        return numbers if "," in value else numbers[0]


def _runs(text: str) -> bool:
    """Whether numbers with colons between them are written there."""
    return ":" in text and all(math.isfinite(float(part)) for part in text.split(":"))


def chain_options(text: str) -> list[click.Option]:
    """The options of all links of a chain, with the defaults that it has under this name, but for the fixed ones.

    A name that several links share is written with its link's.
    """
    from merging.methods import chain, expanded, parameters_of

    fixed = expanded(text)[1]
    free = {
        link: [field for field in parameters_of(type(link)) if f"{link.name}.{field}" not in fixed]
        for link in chain(text).links()
    }
    every = [field for fields in free.values() for field in fields]
    options = []
    for link, fields in free.items():
        for field in fields:
            flag = field if every.count(field) == 1 else f"{link.name}.{field}"
            info = type(link).model_fields[field]
            options.append(field_option(flag, info, f"[{link.name}] ", getattr(link, field)))
    return options


def field_option(flag: str, field: FieldInfo, prefix: str = "", default: object = None) -> click.Option:
    """The option of one field: ``--flag``, or ``--flag / --no-flag`` for a switch. Unset, it passes nothing on.

    ``default`` is the default to show, the field's own if it is None.
    """
    from merging.maths.parameters import Gradient

    flag = flag.replace("_", "-") if "." not in flag else flag
    name = flag.replace("-", "_").replace(".", "__")
    value = field.default if default is None else default
    shown = str(value).lower() if isinstance(value, bool) else value
    text = prefix + (field.description or "") + ("" if value is None else f"  [default: {shown}]")
    types_ = [each for each in _alternatives(field.annotation) if each is not type(None)]
    if bool in types_:
        return click.Option([f"--{flag}/--no-{flag}", name], default=None, help=text)
    among = choices(field)
    kind: Any = click.Choice(among) if among else int if int in types_ else str
    if float in types_:
        kind = Values() if Gradient in types_ else float
    return click.Option([f"--{flag}", name], type=kind, default=None, help=text)


def choices(field: FieldInfo) -> list[str]:
    """The words that a field takes, if it takes only some."""
    kinds = _alternatives(field.annotation)
    return [str(value) for each in kinds if get_origin(each) is Literal for value in get_args(each)]


def _alternatives(annotation: Any) -> list[Any]:
    """The plain types that an annotation allows, unions and metadata taken apart."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in _alternatives(part)]
    if hasattr(annotation, "__metadata__"):
        return _alternatives(get_args(annotation)[0])
    return [annotation]
