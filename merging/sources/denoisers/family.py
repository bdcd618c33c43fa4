"""The form of a family of denoisers: its marks, and its two sets of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from merging.maths.shapes import Shapes

__all__ = ["Family", "NameMark", "NameRule", "block_rules", "flat_name", "name_pattern"]


def flat_name(name: str) -> str:
    """Return the normal form of a name: no dots but the dot before ``weight`` or ``bias``."""
    module, _, leaf = name.rpartition(".")
    return f"{module.replace('.', '_')}.{leaf}" if leaf in ("weight", "bias") else name.replace(".", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule:
    """A published module, and the modules of diffusers that replace it; ``{}`` is the number of the block.

    A parameter without a module of its own has a rule under its own name.

    Attributes:
        published: the published module.
        diffusers: diffusers' modules. Several take its rows one after the other, in equal shares.
        narrow: all but the last have as many rows as the module has inputs.
        grouped: the first has as many rows as the module has inputs, and the others share the rest equally.
        swapped: scale and shift are in this order in diffusers, and in the other order as published.
        gated: the same of a gate and the values that it multiplies, whatever the number of rows.
    """

    published: str
    diffusers: tuple[str, ...]
    narrow: bool = False
    grouped: bool = False
    swapped: bool = False
    gated: bool = False

    @property
    def reordered(self) -> bool:
        """Whether the rows have another order in diffusers, at least in some models."""
        return self.swapped or self.gated


@cache
def name_pattern(pattern: str) -> re.Pattern[str]:
    """Return the expression for a dotted or flat name with numbers for ``{}``."""
    return re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))


def block_rules(published: str, diffusers: str, modules: Mapping[str, str]) -> tuple[NameRule, ...]:
    """Return the rules of the modules in two blocks, from published names to diffusers' names with spaces between."""
    return tuple(
        NameRule(published=f"{published}.{theirs}", diffusers=tuple(f"{diffusers}.{each}" for each in ours.split()))
        for theirs, ours in modules.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMark:
    """Names that show a family, where a weight has a given size.

    Attributes:
        names: a pattern searched in names in the normal form: ``double_blocks_3_img_attn_qkv.weight``.
        inputs: the possible numbers of columns of such a weight; empty for any.
        ratio: its rows divided by its columns; None for any.
        also: a pattern of names that must be there too.
    """

    names: str
    inputs: frozenset[int] = frozenset()
    ratio: int | None = None
    also: str = ""

    def is_among(self, shapes: Shapes) -> bool:
        """Return whether tensors, named in the normal form, have this mark."""
        found = any(re.search(self.names, name) and self._fits(shape) for name, shape in shapes.items())
        return found and (not self.also or any(re.search(self.also, name) for name in shapes))

    def _fits(self, shape: tuple[int, ...]) -> bool:
        if not self.inputs and self.ratio is None:
            return True
        if len(shape) != 2:
            return False
        return (not self.inputs or shape[1] in self.inputs) and self.ratio in (None, shape[0] / shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of denoisers.

    Attributes:
        name: the name under which people know it.
        marks: its marks; one is enough. A family is recognized before all that follow it in the registry.
        rules: the modules with two names. In a family without rules all tensors have one name everywhere.
        modules: the modules and parameters with one name everywhere, dotted, ``{}`` for every number. A family without
            rules needs them for flat names alone, whose dots they give back.
        spellings: patterns of other names in the normal form, and the published names for them.
        variants: words in statements of headers, and the names of the models of the family that they show.
        paired: the name of the model of the family that has two denoisers; empty without one.
    """

    name: str
    marks: tuple[NameMark, ...]
    rules: tuple[NameRule, ...] = ()
    modules: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    variants: tuple[tuple[str, str], ...] = ()
    paired: str = ""

    def has_one_name(self, name: str) -> bool:
        """Return whether a tensor without a rule has the same name as published and in diffusers."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        return not self.rules or any(name_pattern(each).fullmatch(module) for each in self.modules)

    def has_mark(self, shapes: Shapes) -> bool:
        """Return whether the tensors, named in the normal form, have one of the family's marks."""
        return any(mark.is_among(shapes) for mark in self.marks)
