"""Stored tensors seen another way: a slice, a transpose, another shape, without reading more than is asked for."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from merging.sources.stored import Stored

__all__ = ["View", "view"]


class View(Stored):
    """Elements of another stored tensor, by strides over its elements as they lie: as torch.as_strided, on a disk.

    ``start`` is the first of them, and ``strides`` how many elements lie between neighbours along each axis.
    """

    __slots__ = ("_of", "_start", "_strides")

    def __init__(self, of: Stored, shape: tuple[int, ...], strides: tuple[int, ...], start: int = 0) -> None:
        super().__init__(of.dtype_name, shape)
        self._of, self._strides, self._start = of, strides, start

    @property
    def _contiguous(self) -> bool:
        wanted = _strides(self.shape)
        return all(size == 1 or a == b for size, a, b in zip(self.shape, self._strides, wanted, strict=True))

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        if not len(buffer):
            return
        if self._contiguous:
            self._of.read_into(buffer, self._start + start)
            return
        # All that lies between the first and the last of the elements is read at once: one long read costs less than
        # very many short ones.
        extent = 1 + sum(stride * (size - 1) for stride, size in zip(self._strides, self.shape, strict=True))
        raw = torch.empty(extent, dtype=self.dtype)
        self._of.read_into(raw, self._start)
        buffer.copy_(raw.as_strided(self.shape, self._strides).reshape(-1)[start : start + len(buffer)])

    def advise(self, start: int, count: int) -> None:
        if self._contiguous:
            self._of.advise(self._start + start, count)

    @property
    def at_hand(self) -> bool:
        return self._of.at_hand

    def source(self) -> str:
        return self._of.source()

    @property
    def made_of(self) -> tuple[Stored, ...]:
        return self._of.made_of

    def order(self) -> tuple[str, int]:
        file, place = self._of.order()
        return file, place + self._start * self.dtype.itemsize

    def permute(self, *axes: int) -> View:
        """The same with its axes in another order."""
        order = [tuple(each[axis] for axis in axes) for each in (self.shape, self._strides)]
        return View(self._of, order[0], order[1], self._start)

    def narrow(self, axis: int, start: int, length: int) -> View:
        """``length`` entries of an axis from ``start`` on."""
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        return View(self._of, shape, self._strides, self._start + start * self._strides[axis])

    def select(self, index: int) -> View:
        """One entry of the first axis, without that axis."""
        return View(self._of, self.shape[1:], self._strides[1:], self._start + index * self._strides[0])


def view(stored: Stored, *shape: int) -> View:
    """A stored tensor in another shape of as many elements (its own, if none is given)."""
    if isinstance(stored, View) and not shape:
        return stored
    assert not shape or prod(shape) == stored.numel
    wanted = shape or stored.shape
    return View(stored, wanted, _strides(wanted))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
