"""Pieces of a merge that are merged again on their own, chosen by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from merging.engine.tiles import tile_size
from merging.engine.unit import Span
from merging.maths.lazy_torch import torch
from merging.plan.items import Item
from merging.plan.merge_plan import Plan

__all__ = ["cut_pieces", "sample_pieces"]


def cut_pieces(plan: Plan, device: torch.device) -> list[Span]:
    """Return all pieces that can be merged on their own to the bytes of a whole run.

    A piece is one tile. A tensor is one piece where its elements are merged or encoded together, and where statistics
    of the tensor alone come first.
    """
    encoded = plan.quantized.encodings if plan.quantized else {}
    return [span for item in plan.items for span in _pieces(item, item.outs and item.outs[0].name in encoded, device)]


def _pieces(item: Item, whole: object, device: torch.device) -> list[Span]:
    step = item.cut.elements(tile_size(device)) if item.cut.splits and not whole else max(1, item.numel)
    return [Span(item, start, min(start + step, item.numel)) for start in range(0, max(1, item.numel), step)]


def sample_pieces(pieces: Sequence[Span], count: int, seed: int) -> list[Span]:
    """Return ``count`` pieces in their order, of as many tensors as possible."""
    chance = random.Random(seed)
    of_items: dict[Item, list[int]] = {}
    for number, piece in enumerate(pieces):
        of_items.setdefault(piece.item, []).append(number)
    turns: list[tuple[int, float, int]] = []
    for numbers in of_items.values():
        chance.shuffle(numbers)
        turns += [(turn, chance.random(), number) for turn, number in enumerate(numbers)]
    return [pieces[number] for number in sorted(number for _, _, number in sorted(turns)[:count])]
