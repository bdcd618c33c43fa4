"""Dropping entries of changes by compiled kernels: each step returns None where torch must compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from merging.maths.delta import Stack
from merging.maths.kernels.steps import limits_of, stored_values
from merging.maths.kernels.switch import run_kernel
from merging.maths.kernels.workspaces import make_workspace
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.randomness import draw_key, draw_limit
from merging.maths.site import Site
from merging.maths.sums import SPAN

__all__ = ["RankedDrop", "Ranking", "drop_by_rank", "drop_uniformly", "keep_bands", "keep_marked", "sum_spans"]

_WORD = 1 << 32


def drop_uniformly(stack: Stack, site: Site, shares: Sequence[float], seed: int, divide: bool) -> Tensor | None:
    """Return the changes ``[n, *shape]``, 0 where :func:`~merging.maths.randomness.draw_mask` drops them.

    Args:
        stack: the changes.
        site: their place.
        shares: of each model, the probability of keeping an entry.
        seed: the seed of the draws.
        divide: divide kept entries by their probability.
    """
    stored = stored_values(stack)
    if stored is None or _crosses_words(site, stored.values.shape[1]):
        return None
    out, work = torch.empty(stored.values.shape, dtype=torch.float32), make_workspace(1, torch.int32)
    for model, values, share, into in zip(stack.models, stored.values, shares, out, strict=True):
        place = site.start % _WORD, *draw_key(site.start, seed, model, site.name)
        divisor = float(share) if divide and share else 1.0
        arguments = (values, stored.base, *place, draw_limit(share), divisor, work, into)
        if not run_kernel("draws.drop_uniformly", *arguments):
            return None
    return out.view(len(out), *stored.shape)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Draws of entries by rank.

    Attributes:
        steps: the probability of keeping an entry, by the rank of its magnitude in its row, ``[columns]`` float32,
            above 0.
        seed: the seed of the draws.
    """

    steps: Tensor
    seed: int


@dataclass(frozen=True, slots=True)
class RankedDrop:
    """The changes of one model, some entries dropped by rank.

    Attributes:
        changes: ``[rows, columns]`` float32, 0 where they are dropped.
        marks: 1 for kept entries and 0 for dropped ones, ``[rows, columns]`` uint8.
        left: the numbers of the rows that are left to torch; their changes are whole.
    """

    changes: Tensor
    marks: Tensor
    left: Tensor


def drop_by_rank(stack: Stack, slot: int, site: Site, ranking: Ranking, out: Tensor) -> RankedDrop | None:
    """Drop entries of one model by the ranks of their magnitudes in rows.

    Args:
        stack: the changes, of whole rows.
        slot: the model.
        site: their place.
        ranking: the probabilities by rank.
        out: receives the changes, ``[size]`` float32.
    """
    stored, steps = stored_values(stack), ranking.steps
    if stored is None or _crosses_words(site, len(out)) or bool((steps[1:] < steps[:-1]).any()):
        return None
    # draws are multiples of 2**-24: the greatest one below a step, in the 24 upper bits of a signed word
    limits = (((steps.double() * 2**24).ceil().long() - (1 << 23)) * 256 - 1).int()
    marks, left = torch.empty(len(out), dtype=torch.uint8), torch.empty(len(out) // site.row, dtype=torch.uint8)
    place = site.start % _WORD, *draw_key(site.start, ranking.seed, stack.models[slot], site.name)
    bins = min(4096, max(64, 1 << (site.row // 4 - 1).bit_length()))
    space = torch.empty(4, site.row, dtype=torch.int32), torch.empty(6, bins + 1, dtype=torch.int32)
    arguments = (stored.values[slot], stored.base, *place, limits, *space, out, marks, left)
    if not run_kernel("ranks.drop_by_rank", *arguments):
        return None
    return RankedDrop(out.view(-1, site.row), marks.view(-1, site.row), left.nonzero().view(-1))


def keep_marked(stack: Stack, slot: int, marks: Tensor, out: Tensor) -> bool:
    """Write one model's changes into ``out``, 0 where they are not marked, and return whether a kernel did it.

    ``marks`` are in one bit an element, as :func:`~merging.maths.bits.pack_bits` returns them.
    """
    stored = stored_values(stack)
    return stored is not None and run_kernel("draws.keep_marked", stored.values[slot], stored.base, marks, out)


def keep_bands(stack: Stack, ends: Sequence[tuple[float, float]]) -> Tensor | None:
    """Return the changes ``[n, *shape]``, 0 where magnitudes are not from one end to the other, both included."""
    stored = stored_values(stack)
    if stored is None:
        return None
    out = torch.empty(stored.values.shape, dtype=torch.float32)
    below = limits_of([low for low, _ in ends]).tolist()
    for values, least, (_, high), into in zip(stored.values, below, ends, out, strict=True):
        if not run_kernel("bands.keep_band", values, stored.base, least, high, into):
            return None
    return out.view(len(out), *stored.shape)


def _crosses_words(site: Site, size: int) -> bool:
    """Return whether the upper half of the positions, which is part of the key of draws, changes among elements."""
    return site.start % _WORD + size > _WORD


def sum_spans(stack: Stack) -> Tensor | None:
    """Return the sums of magnitudes over each span, and over the rest, ``[n, spans + 1]`` float32."""
    stored = stored_values(stack)
    if stored is None or not _adds_alike():
        return None
    values, base = stored.values, stored.base
    whole = values.shape[1] // SPAN
    sums = torch.empty(len(values), whole, dtype=torch.float32)
    if not run_kernel("sums.sum_magnitudes", values, base, make_workspace(5).view(-1), sums):
        return None
    rest = values[:, whole * SPAN :].float()
    rest = rest if base is None else rest - base[whole * SPAN :].float()
    return torch.cat([sums, rest.abs().sum(-1, keepdim=True)], 1)


@cache
def _adds_alike() -> bool:
    """Return whether torch adds up numbers in the order of the kernel, as versions and processors may not."""
    numbers = torch.rand(64, SPAN, generator=torch.Generator().manual_seed(0))
    sums, work = torch.empty(64, 1), make_workspace(5).view(-1)
    ran = run_kernel("sums.sum_magnitudes", numbers, None, work, sums)
    return ran and torch.equal(sums, numbers.sum(-1, keepdim=True))
