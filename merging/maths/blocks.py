"""The blocks of a model, by the names that people have for them, and lists with one number for each block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from math import inf

from merging.maths.layers import LayerPosition
from merging.maths.layouts import Layout, flux_block, is_autoencoder, is_text_encoder, unet_block

__all__ = ["LISTS", "NAMES", "PRESETS", "BlockRange", "NamedBlock", "describe_blocks", "describe_lists", "find_block"]

Label = tuple[str, int | None]
"""A name of a block: what comes before its number, and the number, if it has one."""


def _row(stem: str, first: int, last: int) -> tuple[Label, ...]:
    return tuple((stem, number) for number in range(first, last + 1))


def _labels(stem: str, numbers: Sequence[int]) -> tuple[Label, ...]:
    return tuple((stem, number) for number in numbers)


_BASE: tuple[Label, ...] = (("BASE", None),)
_MID: tuple[Label, ...] = (("M", 0),)
_SD1 = (*_row("IN", 0, 11), *_MID, *_row("OUT", 0, 11))
_SDXL = (*_BASE, *_row("IN", 0, 8), *_MID, *_row("OUT", 0, 8))
_FLUX = (*_row("D", 0, 18), *_row("S", 0, 37))

LISTS: Mapping[Layout, Mapping[int, tuple[Label, ...]]] = {
    "sd1": {
        17: (*_BASE, *_labels("IN", (1, 2, 4, 5, 7, 8)), *_MID, *_row("OUT", 3, 11)),
        25: _SD1,
        26: (*_BASE, *_SD1),
    },
    "sdxl": {
        12: (*_BASE, *_labels("IN", (4, 5, 7, 8)), *_MID, *_row("OUT", 0, 5)),
        20: _SDXL,
        21: (*_SDXL, ("VAE", None)),
        26: (*_BASE, *_SD1),
    },
    "flux": {
        57: _FLUX,
        58: (*_BASE, *_FLUX),
        61: (("CLIP", None), ("T5", None), ("IN", None), *_FLUX, ("OUT", None)),
    },
}
"""The blocks that a list of numbers stands for, by its length. Blocks that a list does not have get 0.

12, 17, 20, 26 and 61 are LBW's (sd-webui-lora-block-weight) and SuperMerger's; 25 is MBW's, where the number for BASE
is apart; 21 is sd-mecha's; 58 is the Inspire pack's. As in SuperMerger, SDXL takes the numbers of its own
blocks from 26.
"""

NAMES: Mapping[Layout, str] = {"sd1": "Stable Diffusion 1 and 2", "sdxl": "SDXL", "flux": "Flux.1"}
"""The layouts with lists, and what they are called."""

_EXAMPLES: Mapping[Layout, str] = {"": "layers.0-15:0.5", "unet": "IN08:0.5", "mmdit": "D00-D05:0.5"}

_INALL: tuple[Label, ...] = _labels("IN", (1, 2, 4, 5, 7, 8))
_SD1_PRESETS: Mapping[str, tuple[Label, ...]] = {
    "INS": (*_BASE, *_labels("IN", (1, 2, 4))),
    "IND": (*_BASE, *_labels("IN", (5, 7, 8))),
    "INALL": (*_BASE, *_INALL),
    "MIDD": (*_BASE, *_labels("IN", (5, 7, 8)), *_MID, *_row("OUT", 3, 6)),
    "OUTD": (*_BASE, *_row("OUT", 3, 6)),
    "OUTS": (*_BASE, *_row("OUT", 7, 11)),
    "OUTALL": (*_BASE, *_row("OUT", 3, 11)),
}
PRESETS: Mapping[Layout, Mapping[str, tuple[Label, ...]]] = {
    "sd1": _SD1_PRESETS,
    "sdxl": {"INALL": (*_BASE, *_row("IN", 0, 8)), "OUTALL": (*_BASE, *_row("OUT", 0, 8))},
}
"""The blocks that a preset of LBW sets to 1, and all others to 0; SDXL has the Inspire pack's."""

_ORDER = ("BASE", "CLIP", "T5", "IN", "D", "S", "M", "OUT", "VAE")
"""The order of the short names, for ranges from one kind of block to another."""

_ALIASES = {"MID": "M", "MIDDLE": "M"}
_RANGE = re.compile(r"(.*?)\.?(\d+)")
_TEXT_5 = re.compile(r"t5|lora_te[23]_|text_encoder_[23]\.|encoder[._]block[._]")
_FLUX_BACK = re.compile(r"(?:^|[._])(?:final_layer|norm_out|proj_out)[._]")


@dataclass(frozen=True, slots=True)
class NamedBlock:
    """A block of a model.

    Attributes:
        labels: its names; the first is the name that is shown.
    """

    labels: tuple[Label, ...]

    def __str__(self) -> str:
        return _show(self.labels[0])

    @property
    def order(self) -> tuple[int, str, int]:
        """A key that sorts blocks with short names in the order of the model, and others by name and number."""
        stem, number = self.labels[0]
        return _ORDER.index(stem) if stem in _ORDER else len(_ORDER), stem, number or 0


def _show(label: Label) -> str:
    """Return a name as it is written: ``IN04``, ``BASE``, ``layers.4``."""
    stem, number = label
    if number is None:
        return stem
    return f"{stem}{number:02}" if stem in _ORDER else f"{stem}.{number}"


def find_block(name: str, position: LayerPosition) -> NamedBlock:
    """Return the block of a tensor, from its name and its position in the model."""
    if position.layout or is_text_encoder(name) or is_autoencoder(name):
        return _find_known(name, position.layout)
    if position.stack is not None:
        return NamedBlock(((position.stack, position.index),))
    return NamedBlock((("OUT" if position.after else "IN", None), *_BASE))


@lru_cache(maxsize=1 << 17)
def _find_known(name: str, layout: Layout) -> NamedBlock:
    """Return the block of a tensor in a model of a known layout, or in parts of a pipeline that all have."""
    if is_autoencoder(name):
        return NamedBlock((("VAE", None), *(() if layout == "flux" else _BASE)))
    if layout in ("flux", "mmdit"):
        return _find_flux_block(name)
    if is_text_encoder(name):
        return NamedBlock(_BASE)
    return _find_unet_block(name, layout)


def _find_unet_block(name: str, layout: Layout) -> NamedBlock:
    stem, number = unet_block(name) or ("BASE", None)
    if number is None:
        return NamedBlock(_BASE)
    if stem == "M":
        return NamedBlock((*_MID, ("middle_block", None), ("mid_block", None)))
    number = (8 if layout == "sdxl" else 11) if number < 0 else number
    level = max(0, number - 1) // 3 if stem == "IN" else number // 3
    published, levels = ("input_blocks", "down_blocks") if stem == "IN" else ("output_blocks", "up_blocks")
    return NamedBlock(((stem, number), (published, number), (levels, level)))


def _find_flux_block(name: str) -> NamedBlock:
    if is_text_encoder(name):
        return NamedBlock((("T5" if _TEXT_5.search(name) else "CLIP", None), *_BASE))
    found = flux_block(name)
    if found is None:
        return NamedBlock((("OUT" if _FLUX_BACK.search(name) else "IN", None), *_BASE))
    stems = (
        ("double_blocks", "transformer_blocks") if found[0] == "D" else ("single_blocks", "single_transformer_blocks")
    )
    return NamedBlock((found, *((stem, found[1]) for stem in stems)))


@dataclass(frozen=True, slots=True)
class BlockRange:
    """The blocks that a name means: one, several in a row (``IN00-IN05``, ``layers.0-15``), or wildcards."""

    text: str

    @property
    def ends(self) -> tuple[str, ...]:
        """The names that are typed: the two ends of a range, a name by itself, or wildcards."""
        return (self.text,) if self._has_wildcards else tuple(filter(str.strip, self.text.split("-")))

    @property
    def _has_wildcards(self) -> bool:
        return any(sign in self.text for sign in "*?[")

    def holds(self, block: NamedBlock) -> bool:
        """Return whether a block is meant."""
        if self._has_wildcards:
            pattern = self.text.casefold()
            return any(fnmatchcase(_show(label).casefold(), pattern) for label in block.labels)
        first, dash, last = self.text.partition("-")
        if not dash:
            return any(_is_named(label, first) for label in block.labels)
        return any(_is_between(block, label, first, last) for label in block.labels)


def _split(text: str) -> tuple[str, int | None]:
    """Return the stem and the number of a name as it is typed."""
    found = None if text.casefold() == "t5" else _RANGE.fullmatch(text)
    stem, number = (found[1], int(found[2])) if found else (text, None)
    return _ALIASES.get(stem.upper(), stem), number


def _is_named(label: Label, text: str) -> bool:
    stem, number = _split(text)
    return _is_stem(label[0], stem) and number in (None, label[1])


def _is_stem(stem: str, typed: str) -> bool:
    """Return whether a typed stem is a block's, or its last parts: ``layers`` of ``model.layers``."""
    return f".{stem}".casefold().endswith(f".{typed}".casefold())


def _is_between(block: NamedBlock, label: Label, first: str, last: str) -> bool:
    """Return whether a name of a block is in a range; an end without a number stands for all blocks of its kind."""
    (stem, start), (other, stop) = _split(first), _split(last)
    if start is None and stem.upper() not in _ORDER:
        return False
    if not other or other.casefold() == stem.casefold():
        number = label[1]
        return _is_stem(label[0], stem) and number is not None and _is_within(number, start or 0, stop)
    if label != block.labels[0] or not {label[0], stem.upper(), other.upper()} <= set(_ORDER):
        return False
    ends = [
        (_ORDER.index(kind.upper()), edge)
        for kind, number in ((stem, start), (other, stop))
        for edge in ((0, inf) if number is None else (number,))
    ]
    return min(ends) <= (_ORDER.index(label[0]), label[1] or 0) <= max(ends)


def _is_within(number: int, start: int, stop: int | None) -> bool:
    return number >= start if stop is None else min(start, stop) <= number <= max(start, stop)


def describe_lists(layout: Layout) -> str:
    """Return the lists of numbers that a layout takes, with the blocks that each stands for."""
    lists = LISTS.get(layout)
    if lists is None:
        counts = [f"{name} ({_either(list(map(str, LISTS[key])))})" for key, name in NAMES.items()]
        which = (
            "no name shows whether it is one or the other: give the base, or"
            if layout == "unet"
            else "this model is another one:"
        )
        return f"numbers stand for the blocks of {_either(counts)}, and {which} name blocks, as in {_EXAMPLES[layout]}"
    taken = [f"{count} numbers ({describe_blocks(labels)})" for count, labels in lists.items()]
    return f"{NAMES[layout]} takes {_either(taken)}"


def _either(texts: Sequence[str]) -> str:
    return " or ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def describe_blocks(labels: Iterable[Label]) -> str:
    """Return names of blocks in words, numbers in a row joined: ``BASE, IN00-IN08, M00``."""
    rows: list[list[Label]] = []
    for stem, number in labels:
        last = rows[-1][-1] if rows else ("", None)
        if number is not None and last[1] is not None and (stem, number) == (last[0], last[1] + 1):
            rows[-1].append((stem, number))
        else:
            rows.append([(stem, number)])
    return ", ".join(_show_row(row) for row in rows)


def _show_row(row: Sequence[Label]) -> str:
    first, (stem, number) = row[0], row[-1]
    if len(row) == 1:
        return _show(first)
    return f"{_show(first)}-{_show((stem, number)) if stem in _ORDER else number}"
