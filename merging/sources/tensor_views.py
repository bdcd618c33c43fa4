"""Views of stored tensors: slices, transposes and other shapes, which read no more than needed."""

from __future__ import annotations

from math import prod

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.stored import Stored

__all__ = ["View", "view"]


class View(Stored):
    """A strided view of another stored tensor, like torch.as_strided, but on the disk.

    ``start`` is the flat position of the first element, and ``strides`` are the steps in elements along each axis.
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
        # The whole range from the first to the last element is read at once: one long read costs less than many short
        # ones.
        extent = 1 + sum(stride * (size - 1) for stride, size in zip(self._strides, self.shape, strict=True))
        raw = torch.empty(extent, dtype=self.dtype)
        self._of.read_into(raw, self._start)
        buffer.copy_(raw.as_strided(self.shape, self._strides).reshape(-1)[start : start + len(buffer)])

    def advise(self, start: int, count: int) -> None:
        if self._contiguous:
            self._of.advise(self._start + start, count)

    @property
    def quantized(self) -> str | None:
        return self._of.quantized

    @property
    def at_hand(self) -> bool:
        return self._of.at_hand

    @property
    def readable(self) -> bool:
        return self._of.readable

    def source(self) -> str:
        return self._of.source()

    @property
    def made_of(self) -> tuple[Stored, ...]:
        return self._of.made_of

    def order(self) -> tuple[str, int]:
        file, place = self._of.order()
        return file, place + self._start * self.dtype.itemsize

    def permute(self, *axes: int) -> View:
        """Return the view with its axes in another order."""
        order = [tuple(each[axis] for axis in axes) for each in (self.shape, self._strides)]
        return View(self._of, order[0], order[1], self._start)

    def narrow(self, axis: int, start: int, length: int) -> View:
        """Return ``length`` entries of an axis, from ``start`` on."""
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        return View(self._of, shape, self._strides, self._start + start * self._strides[axis])

    def select(self, index: int) -> View:
        """Return one entry of the first axis, without that axis."""
        return View(self._of, self.shape[1:], self._strides[1:], self._start + index * self._strides[0])


def view(stored: Stored, *shape: int) -> View:
    """Return a stored tensor as a view of another shape with as many elements; by default of its own shape."""
    if isinstance(stored, View) and not shape:
        return stored
    assert not shape or prod(shape) == stored.numel
    wanted = shape or stored.shape
    return View(stored, wanted, _strides(wanted))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
