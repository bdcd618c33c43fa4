"""Pinned buffers of the host, through which values get to a device while the next ones are read."""

from __future__ import annotations

from typing import Any

from merging.engine.devices import kind_of
from merging.maths.lazy_torch import Tensor, torch

__all__ = ["Staging"]


class Staging:
    """Two buffers of one type, used in turn: one is filled from the disk while the other is copied to the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.kind = kind_of(device)
        self._buffers = [torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def claim(self, size: int) -> Tensor:
        """Return a buffer to fill, when the last copy out of it is done; work that came after that copy may go on."""
        turn = self._turn = 1 - self._turn
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
        if len(self._buffers[turn]) < size:
            self._buffers[turn] = torch.empty(size, dtype=self.dtype, pin_memory=self.kind.pins)
        return self._buffers[turn][:size]

    def send(self, buffer: Tensor) -> Tensor:
        """Return the values of the buffer that was claimed last, on their way to the device."""
        values = buffer.to(self.device, non_blocking=self.kind.pins)
        self._copied[self._turn] = self.kind.mark(self.device)
        return values
