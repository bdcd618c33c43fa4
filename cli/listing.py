"""``merge methods``: what there is to choose from, and each method in full."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import click

from .errors import reported
from .fields import choices

if TYPE_CHECKING:
    from merging.method import Method

__all__ = ["methods_command"]


@click.command(name="methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="print as JSON")
@click.option("--markdown", is_flag=True, help="print the README's table")
def methods_command(name: str | None, as_json: bool, markdown: bool) -> None:
    """List the methods, or show one in full: what it does, its paper, its parameters."""
    from merging.methods import METHODS, method_class

    with reported():
        if name is not None:
            _show(method_class(name), as_json)
        elif markdown:
            click.echo(_table())
        elif as_json:
            click.echo(json.dumps({method: listed.summary for method, listed in METHODS.items()}, indent=2))
        else:
            for method, listed in METHODS.items():
                click.echo(f"{method:16} {listed.summary}")
            click.echo("\nChains are written lines+task_arithmetic. More on one: merge methods NAME")


def _table() -> str:
    from merging.methods import METHODS, chain, method_class
    from merging.wrapper import Wrapper

    rows = ["| method | what it does | merges | on adapters | paper |", "|---|---|---|---|---|"]
    for name, listed in METHODS.items():
        method = chain(name)
        around = issubclass(method_class(name), Wrapper)
        merges = "around any method" if around else "weights" if method.origin == "none" else "changes from the base"
        based = "with the base, compressed" if method.origin == "none" else "compressed"
        adapters = based if not method.factored else "as the method inside" if around else "exact"
        rows.append(f"| `{name}` | {listed.summary} | {merges} | {adapters} | {method_class(name).paper} |")
    return "\n".join(rows)


def _show(cls: type[Method], as_json: bool) -> None:
    parameters = {field: info for field, info in cls.model_fields.items() if field != "then"}
    if as_json:
        facts: dict[str, Any] = {"name": cls.name, "summary": cls.summary, "paper": cls.paper}
        facts["parameters"] = {
            f: {"default": i.default, "help": i.description, **({"choices": choices(i)} if choices(i) else {})}
            for f, i in parameters.items()
        }
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{cls.name}: {cls.summary}\n{cls.paper}\n\n{inspect.cleandoc(cls.__doc__ or '')}\n")
    for field, info in parameters.items():
        default = "none" if info.default is None else str(info.default).lower()
        among = f" ({' | '.join(choices(info))})" if choices(info) else ""
        click.echo(f"  --{field.replace('_', '-'):14} {info.description}{among}  [default: {default}]")
