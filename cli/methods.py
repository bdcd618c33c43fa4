"""``merge methods``: all methods to choose from, and each in full."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .choose import advice_markdown, advice_screen
from .errors import handle_errors
from .fields import choices
from .options import json_option, markdown_option
from .output import echo_json, echo_notices, echo_text, terminal_width
from .tables import column_widths, echo_table, format_groups, format_legend, format_rows, list_width
from .types import METHOD

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic.fields import FieldInfo

    from merging.methods import Alias
    from merging.methods.contract.method import Method

__all__ = ["methods_command"]

LEGEND = [
    (
        "merges",
        "weights, or changes, for which checkpoints need --base; any: any, as changes but for clamp, lines and blocks",
    ),
    (
        "LoRA",
        "exact: low-rank in and out; cut: of full rank, cut to --rank; base: adapters need --base; inner: as inside",
    ),
    (
        "reads",
        "how often the inputs are read; + SVD: full matrices are decomposed, seconds to minutes each (adapters: ms)",
    ),
]

CHAINS = (
    "None needs data. Chains go left to right, mergers last: dare+ties, knots+ties, lines+tsv. mergekit's names are "
    "known: {aliases}. Numbers may differ by place. Details: merge methods NAME"
)


@dataclass(frozen=True)
class Choice:
    """The facts by which people choose a method."""

    name: str
    group: str
    summary: str
    merges: str
    adapters: str
    reads: str
    paper: str


@click.command(name="methods", short_help="list the methods, or show one in full")
@click.argument("name", required=False, type=METHOD)
@json_option
@markdown_option
@click.option("--help-me-choose", "advise", is_flag=True, help="show which method to try for which models and data")
def methods_command(name: str | None, as_json: bool, markdown: bool, advise: bool) -> None:
    """List the methods, or show one in full: its purpose, its paper, its parameters."""
    from merging.methods import ALIASES, installed_methods, method_class
    from merging.methods.choosing import ADVICE, CAVEAT

    if advise and (name or as_json):
        raise click.UsageError("--help-me-choose takes no method and no --json")
    with handle_errors():
        if advise:
            echo_text(advice_markdown(ADVICE) if markdown else advice_screen(ADVICE, CAVEAT))
        elif name in ALIASES:
            echo_text(_alias(name))
        elif name is not None:
            for cls in [method_class(link.strip()) for link in name.split("+")]:
                _show(cls, as_json)
        elif markdown:
            echo_text(_markdown())
        else:
            installed, notices = installed_methods()
            listed = list(_choices(installed))
            if as_json:
                echo_json({each.name: asdict(each) for each in listed})
            else:
                echo_text(_screen(listed))
            echo_notices(notices)


def _alias(name: str) -> str:
    """Return the description of one of mergekit's names."""
    from merging.methods import ALIASES, chain, parameters_of

    alias = ALIASES[name]
    fixed = [f"{key} = {format_value(value)}" for key, value in alias.fixed.items()]
    lines = [f"{name}: mergekit's name for {alias.chain}, with mergekit's defaults", ""]
    lines += [f"Fixed: {', '.join(fixed)}."] if fixed else []
    lines += [f"{alias.hint[0].upper()}{alias.hint[1:]}."] if alias.hint else []
    rows: list[tuple[str, str, str]] = []
    own = [(link, field) for link in chain(name).links() for field in parameters_of(type(link))]
    for link, field in own:
        if f"{link.name}.{field}" not in alias.fixed:
            shared = sum(each == field for _, each in own) > 1
            label = f"{link.name}.{field}" if shared and field not in _fields_fixed(alias) else field
            rows.append(_parameter(label, type(link).model_fields[field], getattr(link, field)))
    lines += format_rows(rows, column_widths(rows, terminal_width()))
    return "\n".join([*lines, "", f"More about the methods: merge methods {alias.chain}"])


def _fields_fixed(alias: Alias) -> set[str]:
    return {key.rpartition(".")[2] for key in alias.fixed}


def _parameter(name: str, info: FieldInfo, default: object) -> tuple[str, str, str]:
    """Return a row of a table: a parameter's option, indented, and its description."""
    among = f" ({' | '.join(choices(info))})" if choices(info) else ""
    return "", f"--{name.replace('_', '-')}", f"{info.description}{among}  [default: {format_value(default)}]"


def _mergekit_settings(name: str) -> str:
    """Return the settings that do the same as mergekit's method of this name without parameters."""
    from merging.methods import MERGEKIT

    method, parameters = MERGEKIT[name]
    given = ", ".join(f"{key} = {format_value(value)}" for key, value in parameters.items())
    return f"mergekit's {name} has other defaults: it is {method} here with {given}."


def _choices(installed: Mapping[str, type[Method]]) -> Iterator[Choice]:
    """Yield the built-in methods by group, and methods of other packages last."""
    from merging.methods import GROUPS, method_class

    for group, methods in GROUPS.items():
        for name in methods:
            yield _choice(group, method_class(name))
    for cls in installed.values():
        yield _choice("From installed packages", cls)


def _choice(group: str, cls: type[Method]) -> Choice:
    from merging.methods import chain
    from merging.methods.contract.wrapper import Wrapper

    method = chain(cls.name)
    passes = 1 + sum(each.reduction.sweeps for each in method.required_statistics())
    merges = "weights" if method.merge_space == "weights" else "changes"
    return Choice(
        cls.name,
        group,
        cls.summary,
        "any" if issubclass(cls, Wrapper) else merges,
        _on_adapters(cls, method),
        f"{passes}{' + SVD' if cls.decomposed_side else ''}",
        cls.paper,
    )


def _on_adapters(cls: type[Method], method: Method) -> str:
    from merging.methods import chain

    if method.factored:
        # around a method of full rank it is seen whether it is the wrapper that keeps adapters low-rank
        return "inner" if "then" in cls.model_fields and not chain(f"{cls.name}+ties").factored else "exact"
    return "base" if method.merge_space == "weights" else "cut"


def _screen(choices: Iterable[Choice]) -> str:
    """Return all methods in columns, group by group, as wide as the terminal."""
    from merging.methods import ALIASES

    groups: dict[str, list[tuple[str, ...]]] = {}
    for each in choices:
        row = (each.name, each.summary, each.merges, each.adapters, each.reads)
        groups.setdefault(each.group, []).append(row)
    paragraph = textwrap.wrap(CHAINS.format(aliases=", ".join(ALIASES)), list_width())
    return "\n".join([*format_groups(groups, ["merges", "LoRA", "reads"]), *format_legend(LEGEND), "", *paragraph])


def _markdown() -> str:
    lines = ["| method | what it does | merges | on adapters | reads | paper |", "|---|---|---|---|---|---|"]
    group = ""
    for each in _choices({}):
        if each.group != group:
            group = each.group
            lines.append(f"| **{group}** | | | | | |")
        lines.append(
            f"| `{each.name}` | {each.summary} | {each.merges} | {each.adapters} | {each.reads} | {each.paper} |"
        )
    return "\n".join(lines)


def _show(cls: type[Method], as_json: bool) -> None:
    from merging.methods import MERGEKIT

    parameters = {field: info for field, info in cls.model_fields.items() if field != "then"}
    if as_json:
        facts: dict[str, Any] = {"name": cls.name, "summary": cls.summary, "paper": cls.paper}
        facts["parameters"] = {
            f: {"default": i.default, "help": i.description, **({"choices": choices(i)} if choices(i) else {})}
            for f, i in parameters.items()
        }
        echo_json(facts)
        return
    paper = f"{cls.paper}\n" if cls.paper else ""
    echo_text(f"{cls.name}: {cls.summary}\n{paper}\n{inspect.cleandoc(cls.__doc__ or '')}\n")
    if parameters:
        echo_table([_parameter(field, info, info.default) for field, info in parameters.items()])
    if cls.name in MERGEKIT:
        echo_text(f"\n{_mergekit_settings(cls.name)}")


def format_value(value: object) -> str:
    """Return a default as people write it."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
