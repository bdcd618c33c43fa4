"""The page of the families of denoisers, made of their tables: python docs/generate/families_page.py."""

from __future__ import annotations

from collections.abc import Iterator

from merging.sources.denoisers import FAMILIES, Family, NameRule
from merging.sources.denoisers.stable_diffusion import UNETS

__all__ = ["families_page"]

HEAD = """# Families of diffusion models

The tables by which names are matched, made of the code. A family is recognized by its names, and by sizes where two
families share names. Its modules have one name as published, and one in diffusers: LoRAs under either are read, merged,
converted and baked into either layout. `{}` is the number of a block.

A newcomer is one file in `merging/sources/denoisers/`, with its marks and rules, and one line in its `registry.py`.
"""


def families_page() -> str:
    """Return the page."""
    lines = [HEAD, "| family | modules with two names | fused, or in another order |", "|---|---|---|"]
    names = {family.name: len(family.rules) or "one name everywhere" for family in FAMILIES}
    names |= {family.name: "all, by arithmetic on the numbers of blocks" for family in UNETS}
    lines += [f"| {_title(family)} | {names[family.name]} | {_joined(family)} |" for family in _listed()]
    for family in _listed():
        if family.rules:
            lines += ["", f"## {family.name}", "", "| as published | in diffusers | rows |", "|---|---|---|"]
            lines += map(_row, family.rules)
    return "\n".join(lines)


def _listed() -> list[Family]:
    return sorted(FAMILIES, key=lambda family: family.name.lower())


def _title(family: Family) -> str:
    variants = sorted({name for _, name in family.variants})
    return f"{family.name} ({', '.join(variants)})" if variants else family.name


def _joined(family: Family) -> str:
    """Return the modules of a family whose rows are not the rows of one module of diffusers in order."""
    return ", ".join(f"`{rule.published}`" for rule in family.rules if len(rule.diffusers) > 1 or rule.reordered)


def _row(rule: NameRule) -> str:
    names = ", ".join(f"`{name}`" for name in rule.diffusers)
    return f"| `{rule.published}` | {names} | {', '.join(_arrangement(rule))} |"


def _arrangement(rule: NameRule) -> Iterator[str]:
    if rule.narrow:
        yield "all but the last as many as the inputs"
    elif rule.grouped:
        yield "the first as many as the inputs, the rest equally"
    elif len(rule.diffusers) > 1:
        yield "in equal shares"
    if rule.swapped:
        yield "scale and shift swapped"
    if rule.gated:
        yield "gate and values swapped"


if __name__ == "__main__":
    print(families_page())
