"""Ranges of integer keys, and the keys of a model that are in one: listed, or counted by bins where they are many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from merging.maths import order_statistics
from merging.maths.kernels.switch import run_kernel
from merging.maths.kernels.workspaces import make_workspace
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.reductions import State

__all__ = ["KeyRange", "KeyTally", "StoredKeys"]

_BINS = 18
"""Bits of the number of bins in which a range is counted, at most."""

_LISTED = 1 << 17
"""Keys of a range that are listed; more are counted."""


class KeyRange(NamedTuple):
    """Keys from ``low`` up to ``high``, which is excluded, in bins of 2**shift keys.

    Attributes:
        below: the number of keys below ``low``; None where it is to be counted.
        inside: the number of keys inside; None where it is not known.
        whole: whether it holds all keys that occur.
    """

    low: int
    high: int
    shift: int
    below: int | None
    inside: int | None = None
    whole: bool = False


def _range(low: int, high: int, below: int | None, inside: int | None = None) -> KeyRange:
    """Return a range in as many bins as are counted at once."""
    return KeyRange(low, high, max(0, (high - low - 1).bit_length() - _BINS), below, inside)


class StoredKeys(NamedTuple):
    """The greatest magnitude among keys, and the number of keys of at most 0."""

    greatest: int
    nonpositive: int


@dataclass(slots=True)
class KeyTally:
    """The keys of one model in a range, and the number of keys below it where it is not known yet."""

    range: KeyRange
    below: int = 0
    listed: Tensor | None = None
    waiting: int = 0
    """The number of listed keys, which are the first ones of ``listed``."""
    counts: Tensor | None = None
    ends: list[int] = field(default_factory=list)
    """The least and the greatest key; empty while there is none."""

    def add(self, keys: Tensor) -> None:
        """Take in the keys of ``[elements]`` that are in the range."""
        low, high = self.range.low, self.range.high
        if not self.range.whole:
            if self.range.below is None:
                self.below += _count_below(keys, low)
            keys = _select(keys, low, high)
        self._hold(keys)

    def add_stored(self, values: Tensor, base: Tensor | None, magnitudes: bool) -> StoredKeys:
        """Take in the keys of a model's float32 changes: of its stored values, minus the base's if there is one."""
        low, high, shift = self.range[:3]
        none, bounds = torch.empty(0, dtype=torch.int64), torch.tensor([low, high - low, shift])
        space = make_workspace(1), make_workspace(2, torch.int32)
        numbers = torch.tensor([0, 0, 0, 1 << 62, -1 << 62, 0, 0])
        while int(numbers[0]) < len(values):
            with torch.inference_mode():
                if self.listed is None and self.counts is None:
                    self.listed = torch.empty(_LISTED, dtype=torch.int32)
            numbers[2] = self.waiting
            listed, counts = (
                none.int() if self.listed is None else self.listed,
                none if self.counts is None else self.counts,
            )
            arguments = (values, base, magnitudes, bounds, int(numbers[0]), listed, counts, *space, numbers)
            if not run_kernel("keys.gather_keys", *arguments):
                return self._add_decoded(values.float() if base is None else values.float() - base.float(), magnitudes)
            self.waiting = int(numbers[2])
            if int(numbers[0]) < len(values):
                self._count()
        _, below, _, least, most, greatest, nonpositive = numbers.tolist()
        if least <= most:
            self._stretch([least, most])
        if self.range.below is None:
            self.below += below
        return StoredKeys(greatest, nonpositive)

    def _add_decoded(self, changes: Tensor, magnitudes: bool) -> StoredKeys:
        keys = order_statistics.keys(changes, magnitudes)
        self.add(keys)
        return StoredKeys(int(keys.abs().max()) if len(keys) else 0, int(torch.count_nonzero(keys <= 0)))

    def merge(self, other: KeyTally) -> None:
        """Join a tally of the same range."""
        self.below += other.below
        if other.counts is not None:
            self.counts = other.counts if self.counts is None else self.counts + other.counts.to(self.counts.device)
        self._stretch(other.ends)
        for keys in other._list:
            self._hold(keys)

    def state(self) -> State:
        """Return a copy of the values gathered so far."""
        counts = [] if self.counts is None else [self.counts.to("cpu", copy=True)]
        return State(
            [self.below, len(counts), self.ends], [*counts, *(keys.to("cpu", copy=True) for keys in self._list)]
        )

    def restore(self, state: State) -> None:
        """Take over a state of a tally of the same range."""
        self.below, counted, ends = state.plain
        self.ends = list(ends)
        self.counts, self.listed, self.waiting = (state.tensors[0].clone() if counted else None), None, 0
        for keys in state.tensors[counted:]:
            self._hold(keys)

    def _hold(self, keys: Tensor) -> None:
        if not keys.numel():
            return
        self._stretch([int(each) for each in torch.aminmax(keys)])
        if self.waiting + keys.numel() > _LISTED:
            self._count(keys)
            return
        with torch.inference_mode():  # also of the block: views of one of ordinary mode fail on stand-in GPUs
            if self.listed is None:
                self.listed = keys.new_empty(_LISTED)  # one block: small ones would be scattered among the tiles
            self.listed[self.waiting : self.waiting + keys.numel()].copy_(keys)
        self.waiting += keys.numel()

    @property
    def _list(self) -> list[Tensor]:
        return [] if self.listed is None else [self.listed[: self.waiting]]

    def _stretch(self, ends: list[int]) -> None:
        both = [*self.ends, *ends]
        self.ends = [min(both), max(both)] if both else []

    def _count(self, *more: Tensor) -> Tensor:
        """Return the number of keys in each bin, int64, with ``more`` keys, and list no key any more."""
        with torch.inference_mode():  # the threads of a merge count in it, and so must others then
            for keys in (*self._list, *more):
                if self.counts is None:
                    bins = (self.range.high - self.range.low) >> self.range.shift
                    self.counts = torch.zeros(bins, dtype=torch.int64, device=keys.device)
                digits = ((keys >> self.range.shift) - (self.range.low >> self.range.shift)).to(self.counts.device)
                # unlike bincount, this does not pass over all counters for every piece
                self.counts.scatter_add_(0, digits.long(), torch.ones_like(digits, dtype=torch.int64))
        self.listed, self.waiting = None, 0
        assert self.counts is not None
        return self.counts

    def expect(self, place: int, margin: int) -> KeyRange:
        """Return a range that should hold a position among all keys, as this tally of a sample shows.

        ``margin`` is the number of positions by which the sample may mislead.
        """
        low, high, shift = self.range[:3]
        sums = torch.cumsum(self._count().cpu(), 0)
        ends = torch.tensor([place - margin, place + margin])
        first, last = torch.searchsorted(sums, ends, right=True).tolist()
        start = low + (first << shift) if place >= margin else low
        stop = low + ((last + 1) << shift) if last < len(sums) else high
        return _range(start, stop, 0 if start == low else None)

    def narrow(self, place: int, everything: KeyRange) -> int | KeyRange:
        """Return the key at a position among all keys, or a narrower range that holds it.

        Raises ValueError where the range has another number of keys than before.
        """
        low, high, shift, below, inside, _ = self.range
        below = self.below if below is None else below
        sums = None
        if self.counts is not None:
            sums = torch.cumsum(self._count().cpu(), 0)
        held = self.waiting if sums is None else int(sums[-1])
        if inside is not None and held != inside:
            raise ValueError("the values changed between two sweeps")
        if place < below:
            return _range(everything.low, low, 0, below)
        if place >= below + held:
            return _range(high, everything.high, below + held)
        if place in (below, below + held - 1):
            return self.ends[place > below]
        if sums is None:
            assert self.listed is not None
            listed = self.listed[: self.waiting].cpu().numpy().copy()
            listed.partition(place - below)
            return int(listed[place - below])
        digit = int(torch.searchsorted(sums, place - below, right=True))
        before = int(sums[digit - 1]) if digit else 0
        low += digit << shift
        return low if not shift else _range(low, low + (1 << shift), below + before, int(sums[digit]) - before)


def _count_below(keys: Tensor, low: int) -> int:
    if keys.device.type == "cpu":
        return int(torch.count_nonzero(torch.from_numpy(keys.numpy() < low)))
    return int(torch.count_nonzero(keys < low))


def _select(keys: Tensor, low: int, high: int) -> Tensor:
    """Return the keys in a range; on a CPU numpy finds them several times faster."""
    if keys.device.type == "cpu":
        # one unsigned comparison: keys below the range wrap around
        unsigned = (keys - low).numpy().view(f"u{keys.itemsize}")
        return torch.from_numpy(keys.numpy().compress(unsigned < high - low))
    return keys[(keys >= low) & (keys <= high - 1)]  # torch compares with a bound beyond the type as if it wrapped
