"""The keys of a recipe as a table of Markdown: python docs/generate/recipe_table.py."""

from __future__ import annotations

from pydantic_core import PydanticUndefined

from merging.plan.recipe import Recipe

DEFAULTS = {None: "", (): "", PydanticUndefined: "needed"}


def recipe_table() -> str:
    """Return the table, a row a key."""
    rows = ["| key | default | what it is |", "|---|---|---|"]
    rows.append("| `parameters` | | the method's parameters by name |")
    for name, info in Recipe.model_fields.items():
        default = info.default
        shown = DEFAULTS[default] if default in DEFAULTS else f"`{str(default).lower()}`"
        words = info.description or "a method or chain, as it is written on the command line"
        rows.append(f"| `{info.alias or name}` | {shown} | {words} |")
    rows.insert(4, rows.pop(2))
    rows.insert(3, "| `stack` |  | layers of models, one part above the other, in the place of models and method |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(recipe_table())
