"""A sink that compares merged values with the values of an output, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.stored import Stored

__all__ = ["ComparingSink", "Difference"]

_ROUNDING = 2.0**-16
"""Difference of float32 sums in another order, at most, relative to the largest value of the piece."""

_STEPS = 2
"""Steps of its own type by which each value may be rounded otherwise."""


@dataclass(slots=True)
class Difference:
    """The elements of a tensor that differ from the merged ones.

    Attributes:
        position: the flat position of the first one.
        found: its value in the output.
        expected: its merged value.
        count: the number of elements that differ.
        rounding: whether all differ by no more than another processor or version may round.
    """

    position: int
    found: float
    expected: float
    count: int
    rounding: bool


class ComparingSink:
    """Compares the values that it receives with stored tensors. It may be called from any thread.

    Attributes:
        differences: the difference of each tensor that has one.
        elements: the number of elements compared, by tensor.
        bytes: the number of bytes compared.
    """

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.differences: dict[str, Difference] = {}
        self.elements: dict[str, int] = {}
        self.bytes = 0
        self._tensors = tensors
        self._lock = threading.Lock()

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Compare elements of a tensor, unless the tensor is unknown."""
        stored = self._tensors.get(name)
        if stored is None or not len(values):
            return
        found = torch.empty_like(values)
        stored.read_into(found, start)
        ours, theirs = (each.contiguous().view(torch.uint8) for each in (values, found))
        difference = None if torch.equal(ours, theirs) else _compare(values, found, (ours != theirs), start)
        with self._lock:
            self.elements[name] = self.elements.get(name, 0) + len(values)
            self.bytes += values.nbytes
            if difference is not None:
                self._add(name, difference)

    def _add(self, name: str, new: Difference) -> None:
        known = self.differences.get(name)
        if known is not None:
            first = min(known, new, key=lambda each: each.position)
            new = Difference(
                first.position, first.found, first.expected, known.count + new.count, known.rounding and new.rounding
            )
        self.differences[name] = new


def _compare(expected: Tensor, found: Tensor, bytes_differ: Tensor, start: int) -> Difference:
    places = bytes_differ.view(len(expected), -1).any(1).nonzero().flatten()
    first = int(places[0])
    rounding = False
    if expected.is_floating_point():
        there, wanted = found.double(), expected.double()
        kind = torch.finfo(expected.dtype)
        most = _STEPS * kind.eps * wanted.abs().clamp(min=kind.tiny) + _ROUNDING * wanted.abs().max()
        rounding = bool(((there - wanted).abs() <= most).all())
    return Difference(start + first, found[first].item(), expected[first].item(), len(places), rounding)
