"""Values by block and by element of a block, in the forms in which people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import model_validator

from merging.errors import OptionError, nearest
from merging.maths.blocks import (
    LISTS,
    NAMES,
    PRESETS,
    BlockRange,
    NamedBlock,
    describe_blocks,
    describe_lists,
    find_block,
)
from merging.maths.elements import ELEMENTS, find_parts, holds_element
from merging.maths.layouts import Layout
from merging.maths.site import Site
from merging.maths.varying import Varying

__all__ = ["BY_BLOCK", "BlockRule", "BlockWeights", "ByBlock"]

BY_BLOCK = frozenset({"by_block", "by_element", "complement"})
"""The keys of the mapping that states such a value among others."""

Form = TypeVar("Form", bound="ByBlock")

_ALL = re.compile(r"ALL([0-9]*\.?[0-9]+)")
_EVERYWHERE = {"NONE": 0.0, "ALL": 1.0, "FLUXALL": 1.0}
_LIMIT = 1e6


@dataclass(frozen=True, slots=True)
class BlockRule:
    """A value for some elements of some blocks.

    Attributes:
        blocks: names of blocks or ranges, as typed, perhaps after NOT; empty for all.
        elements: names of elements or parts of tensors' names, as typed, perhaps after NOT; empty for all.
        value: the value.
    """

    blocks: tuple[str, ...]
    elements: tuple[str, ...]
    value: float

    def holds(self, block: NamedBlock, name: str, part: frozenset[str]) -> bool:
        """Return whether the rule is about a part of a tensor."""
        return _any_of(self.blocks, lambda text: BlockRange(text).holds(block)) and _any_of(
            self.elements, lambda text: holds_element(name, part, text)
        )

    def __str__(self) -> str:
        middle = f"{' '.join(self.elements)}:" if self.elements else ""
        return f"{' '.join(self.blocks) or '*'}:{middle}{_write(self.value)}"


class ByBlock(Varying):
    """A value for each block of the model, and for elements of blocks.

    Written as numbers, one a block (``"0,0.5,..."``), as a preset (``"INALL"``), by names (``"IN08:0.5"``), or as
    numbers or a preset before names. The last name that holds a tensor counts. A name may be limited to elements:
    ``"IN05-OUT05:attn:0.5"``. Tensors without a number, a preset or a name have the value 1.
    """

    preset: str = ""
    numbers: tuple[float, ...] = ()
    rules: tuple[BlockRule, ...] = ()
    complement: bool = False
    """Whether the value is 1 minus what is written."""

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.keys() - BY_BLOCK:
            return value
        if not value:
            return None  # which is refused
        written = cls.read(value.get("by_block"), value.get("by_element"))
        return {**dict(written), "complement": value.get("complement", False)}

    @classmethod
    def read(cls: type[Form], blocks: Any, elements: Any = None) -> Form:
        """Return the value that blocks and elements state, each as text, as a mapping, or blocks as numbers.

        Raises ValueError for anything else.
        """
        preset, numbers, rules = _read_blocks(blocks)
        rules += _read_rules(_items(elements), "elements")
        if not (preset or numbers or rules):
            raise ValueError("holds no value: write numbers, a preset, or names with values, such as IN08:0.5")
        return cls(preset=preset, numbers=numbers, rules=tuple(rules))

    def at(self, site: Site) -> float:
        """Return the value at a site. Raises ValueError for lists and presets of other models."""
        block = find_block(site.name, site.position)
        values = {self._value(block, site, part) for part in find_parts(site.name)}
        if len(values) > 1:
            parts = sorted({each for part in find_parts(site.name) for each in part} - {"self_attn", "cross_attn"})
            raise ValueError(
                f"{site.name} holds {', '.join(parts)} in one tensor, and these have different values: give all of "
                f"them the same one"
            )
        (value,) = values
        return 1 - value if self.complement else value

    def _value(self, block: NamedBlock, site: Site, part: frozenset[str]) -> float:
        for rule in reversed(self.rules):
            if rule.holds(block, site.name, part):
                return rule.value
        layout = site.position.layout
        if self.numbers:
            return self._number(block, layout)
        return _preset_value(self.preset, block, layout) if self.preset else 1.0

    def _number(self, block: NamedBlock, layout: Layout) -> float:
        labels = LISTS.get(layout, {}).get(len(self.numbers))
        if labels is None:
            raise ValueError(f"{len(self.numbers)} numbers by block do not fit this model: {describe_lists(layout)}")
        return next((self.numbers[labels.index(label)] for label in block.labels if label in labels), 0.0)

    @property
    def text(self) -> str:
        """The text that states it, but for the complement."""
        head = [self.preset] if self.preset else list(map(_write, self.numbers))
        return ",".join([*head, *map(str, self.rules)])

    def plain(self) -> Any:
        """Return the mapping that states it."""
        return {"by_block": self.text, **({"complement": True} if self.complement else {})}

    def find_idle(self, sites: Sequence[Site]) -> Iterator[str]:
        """Yield a remark for each name that has no effect at any of the sites.

        Raises :class:`~merging.errors.OptionError` for names of no block and no element.
        """
        blocks = {find_block(site.name, site.position): site.position.layout for site in sites}
        lists = set(blocks.values()) & LISTS.keys()
        for rule in self.rules:
            for text in rule.blocks[rule.blocks[:1] == ("NOT",) :]:
                for end in BlockRange(text).ends if lists else ():
                    if not end.isdigit() and not any(BlockRange(end).holds(block) for block in blocks):
                        _refuse_unknown_block(end, blocks)
                if not any(BlockRange(text).holds(block) for block in blocks):
                    _refuse_unknown_block(text, blocks)
                    yield f"ignored: no tensor is in block {text!r}"
            for text in rule.elements[rule.elements[:1] == ("NOT",) :]:
                if not any(holds_element(site.name, part, text) for site in sites for part in find_parts(site.name)):
                    _refuse_unknown_element(text, sites)
                    yield f"ignored: no tensor has the element {text!r}"


class BlockWeights(ByBlock):
    """A value for each block as a parameter of its own, which is stated as text."""

    def plain(self) -> str:
        return self.text


def _any_of(texts: tuple[str, ...], holds: Any) -> bool:
    if not texts:
        return True
    if texts[0] == "NOT":
        return not any(map(holds, texts[1:]))
    return any(map(holds, texts))


def _preset_value(preset: str, block: NamedBlock, layout: Layout) -> float:
    if preset in _EVERYWHERE:
        return _EVERYWHERE[preset]
    if found := _ALL.fullmatch(preset):
        return float(found[1])
    ones = PRESETS.get(layout, {}).get(preset)
    if ones is None:
        known = ", ".join(["NONE", "ALL", "ALL0.5", *PRESETS.get(layout, {})])
        owner = next(NAMES[key] for key, presets in PRESETS.items() if preset in presets)
        raise ValueError(f"the preset {preset} is for {owner}: this model takes {known}, numbers or names of blocks")
    return float(any(label in ones for label in block.labels))


def _items(value: Any) -> list[str]:
    """Return the items of a text, a mapping or a list of numbers."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [f"{name}:{number}" for name, number in value.items()]
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Sequence)):
        raise ValueError(f"{value!r}: write numbers, a preset, or names with values, such as IN08:0.5")
    words = re.split(r"[,\n]", value) if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    items = [str(word).strip() for word in words]
    while isinstance(value, str) and len(items) > 1 and not items[-1]:  # a comma or a line's end
        items.pop()
    return items


def _read_blocks(value: Any) -> tuple[str, tuple[float, ...], list[BlockRule]]:
    items = _items(value)
    count = next((index for index, item in enumerate(items) if ":" in item), len(items))
    head, rules = items[:count], _read_rules(items[count:], "blocks")
    preset = head[0].upper() if len(head) == 1 else ""
    if _is_preset(preset):
        return preset, (), rules
    numbers = tuple(_read_number(item, item) for item in head)
    if len(numbers) == 1:
        return "", (), [BlockRule((), (), numbers[0]), *rules]
    return "", numbers, rules


def _is_preset(text: str) -> bool:
    return text in _EVERYWHERE or bool(_ALL.fullmatch(text)) or any(text in named for named in PRESETS.values())


def _read_rules(items: Iterable[str], kind: Literal["blocks", "elements"]) -> list[BlockRule]:
    rules = []
    for item in items:
        *names, value = (part.strip() for part in item.split(":"))
        if not 1 <= len(names) <= 2:
            wanted = "IN08:0.5" if kind == "blocks" else "attn:0.5"
            raise ValueError(f"{item!r}: write a name and its value, as {wanted}, or BLOCK:ELEMENT:VALUE")
        number = _read_number(value, item)
        if len(names) == 1:
            names = [names[0], ""] if kind == "blocks" else ["", names[0]]
        blocks, elements = (() if name == "*" else tuple(name.split()) for name in names)
        if blocks == ("NOT",) or elements == ("NOT",):
            raise ValueError(f"{item!r}: NOT is followed by what is left out")
        rules.append(BlockRule(blocks, elements, number))
    return rules


def _read_number(text: str, item: str) -> float:
    """Return a number of a list. Raises ValueError, with the way in which values are written."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if abs(number) <= _LIMIT:
        return number
    if text != item:
        raise ValueError(f"{item!r}: {text!r} is no number")
    if text.upper() in ("R", "U", "A", "B") or text.upper().startswith("X"):
        raise ValueError(f"{text!r} stands for a number chosen elsewhere: write the number")
    if _is_preset(text.upper()):
        raise ValueError(f"{text!r} is a preset, which stands for all numbers: only names follow it, as in IN08:0.5")
    presets = ["NONE", "ALL", "ALL0.5", *dict.fromkeys(name for named in PRESETS.values() for name in named)]
    known = nearest(text.upper(), presets) or f": the presets are {', '.join(presets)}"
    raise ValueError(f"{text!r} is neither a number nor a preset{known}. A block's value is written IN08:0.5")


def _refuse_unknown_block(text: str, blocks: Mapping[NamedBlock, Layout]) -> None:
    """Refuse a name that no block of the model's layout has."""
    lists = [LISTS[layout] for layout in set(blocks.values()) if layout in LISTS]
    known = [NamedBlock((label,)) for each in lists for labels in each.values() for label in labels]
    if any(BlockRange(text).holds(block) for block in known):
        return
    named = sorted(blocks, key=lambda block: block.order)
    near = nearest(text, [str(block) for block in named])
    raise OptionError(
        f"{text!r} names no block{near}: the blocks are {describe_blocks(block.labels[0] for block in named)}"
    )


def _refuse_unknown_element(text: str, sites: Sequence[Site]) -> None:
    if text in ELEMENTS:
        return
    segments = dict.fromkeys(part for site in sites for part in site.name.split(".") if not part.isdigit())
    near = nearest(text, [*ELEMENTS, *segments])
    raise OptionError(
        f"{text!r} names no element{near}: the elements are {', '.join(ELEMENTS)}, or a part of tensors' names, such "
        f"as attn2.to_k"
    )


def _write(number: float) -> str:
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)
