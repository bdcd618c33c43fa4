"""Options made from the fields of a method or of settings, which state their default, bounds and help."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from merging.errors import MergingError

from .errors import handle_errors
from .types import ValuesType

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


__all__ = ["FieldsCommand", "chain_options", "choices", "field_option"]

_FIELDS, _TYPED = f"{__name__}.fields", f"{__name__}.typed"
"""Keys of a context's ``meta``: the options of the fields, and the values of the command's own options as typed."""


class FieldsCommand(click.Command):
    """A command with options that pydantic fields declare, which may depend on its other options.

    ``fields`` makes these options from the values of the command's own options as they were typed, by name. The
    command's function gets their values as the dictionary ``fields``, without those that were not given.
    """

    def __init__(self, *args: Any, fields: Callable[[Mapping[str, Any]], list[click.Option]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.fields = fields

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own options, the options of the fields, and help."""
        if _FIELDS not in ctx.meta:
            ctx.meta[_FIELDS] = self.fields({})
        *own, help_option = super().get_params(ctx)
        taken = {option.name for option in ctx.meta[_FIELDS]}  # an option of a method hides an option of its name
        own = [option for option in own if option.name not in taken]
        return [*own, *ctx.meta[_FIELDS], help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command's own options first, and then all, with the options of the fields that these choose."""
        ctx.meta[_TYPED] = typed = self._read_own(ctx, args)
        if ctx.resilient_parsing:
            known = {name for param in self.params for name in param.opts}
            self._load_for_completion(ctx, wanted=bool(args) and args[-1].startswith("--") and args[-1] not in known)
            return super().parse_args(ctx, args)
        with handle_errors():
            ctx.meta[_FIELDS] = self.fields(typed)
            try:
                rest = super().parse_args(ctx, args)
            except click.NoSuchOption as error:
                self.explain(error.option_name, typed)
                raise
        given = {option.name: ctx.params.pop(option.name) for option in ctx.meta[_FIELDS]}
        ctx.params["fields"] = {name: value for name, value in given.items() if value not in (None, ())}
        return rest

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete an option, of the fields too."""
        self._load_for_completion(ctx, wanted=True)
        return super().shell_complete(ctx, incomplete)

    def _load_for_completion(self, ctx: click.Context, wanted: bool) -> None:
        """Make the options of the fields, if they are wanted: that takes seconds, as it imports torch."""
        try:
            ctx.meta[_FIELDS] = self.fields(ctx.meta[_TYPED]) if wanted else []
        except MergingError:  # of a method that does not exist
            ctx.meta[_FIELDS] = []

    def _read_own(self, ctx: click.Context, args: list[str]) -> Mapping[str, Any]:
        """Return the values of the command's own options, and pass over all others."""
        ctx.meta[_FIELDS] = []
        parser = self.make_parser(ctx)
        parser.ignore_unknown_options = True
        try:
            return parser.parse_args(list(args))[0]
        except click.UsageError:
            return {}  # the second reading reports it

    def explain(self, option: str, typed: Mapping[str, Any]) -> None:
        """Raise a better error for an option that is unknown with these values of the others, if there is one."""


def chain_options(text: str) -> list[click.Option]:
    """Return the options of all links of a chain, with its defaults, but for the fields that it fixes.

    An option that several links share is called by link and field: ``--ties.density``.
    """
    from merging.methods import chain, expand_aliases, parameters_of

    fixed = expand_aliases(text)[1]
    free = {
        link: [field for field in parameters_of(type(link)) if f"{link.name}.{field}" not in fixed]
        for link in chain(text).links()
        if link.name != "blocks"  # whose options every merge has
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
    """Return the option of one field: ``--flag``, or ``--flag / --no-flag`` for a switch. Unset, it is None.

    ``default`` is the default to show, the field's own if it is None.
    """
    from merging.maths.parameters import Gradient

    flag = flag.replace("_", "-") if "." not in flag else flag
    name = flag.replace("-", "_").replace(".", "__")
    value = field.default if default is None else default
    shown = str(value).lower() if isinstance(value, bool) else value
    text = prefix + (field.description or "") + ("" if value is None else f"  [default: {shown}]")
    kinds = [each for each in _alternatives(field.annotation) if each is not type(None)]
    if bool in kinds:
        return click.Option([f"--{flag}/--no-{flag}", name], default=None, help=text)
    among = choices(field)
    kind: Any = click.Choice(among) if among else int if int in kinds else str
    if Gradient in kinds or float in kinds:
        kind = ValuesType() if Gradient in kinds else float
    return click.Option([f"--{flag}", name], type=kind, default=None, help=text)


def choices(field: FieldInfo) -> list[str]:
    """Return the words that a field takes, if it takes only some."""
    kinds = _alternatives(field.annotation)
    return [str(value) for each in kinds if get_origin(each) is Literal for value in get_args(each)]


def _alternatives(annotation: Any) -> list[Any]:
    """Return the plain types that an annotation allows, unions and metadata taken apart."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in _alternatives(part)]
    if hasattr(annotation, "__metadata__"):
        return _alternatives(get_args(annotation)[0])
    return [annotation]
