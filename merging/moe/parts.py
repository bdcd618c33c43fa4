"""The parts of an output; each is made and written by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from merging.maths.lazy_torch import Tensor, torch
from merging.maths.randomness import draw_normal
from merging.moe.source import MoeSource
from merging.plan.items import TILE
from merging.sources.dtypes import DTYPES
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter

__all__ = ["CopiedTensor", "GivenTensor", "OutputPart"]


class OutputPart(Protocol):
    """Tensors of the output that are made together."""

    @property
    def outs(self) -> Sequence[OutputTensor]:
        """The tensors."""

    @property
    def memory(self) -> int:
        """The most memory in bytes that making them takes."""

    def write(self, writer: TensorWriter, device: torch.device) -> None:
        """Make the tensors, on a device where that helps, and write them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedTensor:
    """A tensor of a model under a name in the output, perhaps scaled, with noise, and of another type.

    Attributes:
        out: the tensor in the output.
        source: the model.
        name: the tensor's name in the model.
        scale: a factor.
        noise: the standard deviation of normal noise.
        place: what the noise depends on, with the position of an element.
    """

    out: OutputTensor
    source: MoeSource
    name: str
    scale: float = 1.0
    noise: float = 0.0
    place: tuple[object, ...] = ()

    @property
    def outs(self) -> tuple[OutputTensor]:
        """The one tensor."""
        return (self.out,)

    @property
    def memory(self) -> int:
        """A few tiles, or, with an adapter's change, a few times the tensor in float32."""
        numel = self.source.find_stored(self.name).numel
        return (4 * numel if self.name in self.source.changes else 3 * min(numel, TILE)) * 4

    def write(self, writer: TensorWriter, device: torch.device) -> None:
        """Write the tensor: tile by tile, or whole where an adapter changes it."""
        stored = self.source.find_stored(self.name)
        whole = self.source.read(self.name).reshape(-1) if self.name in self.source.changes else None
        for start in range(0, stored.numel, TILE):
            count = min(TILE, stored.numel - start)
            if whole is None:
                values = torch.empty(count, dtype=stored.dtype)
                stored.read_into(values, start)
            else:
                values = whole[start : start + count]
            writer.write(self.out.name, self._finish(values, start), start)

    def _finish(self, values: Tensor, start: int) -> Tensor:
        dtype = DTYPES[self.out.dtype_name]
        if self.scale == 1 and not self.noise:
            return values.to(dtype)
        wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
        if self.noise:
            wide = wide + draw_normal(start, len(wide), wide.device, *self.place) * self.noise
        return (wide * self.scale).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenTensor:
    """A tensor whose values are at hand, such as a router's."""

    out: OutputTensor
    values: Tensor

    @property
    def outs(self) -> tuple[OutputTensor]:
        """The one tensor."""
        return (self.out,)

    @property
    def memory(self) -> int:
        """The tensor itself."""
        return self.out.nbytes

    def write(self, writer: TensorWriter, device: torch.device) -> None:
        """Write the values."""
        writer.write(self.out.name, self.values.to(DTYPES[self.out.dtype_name]).reshape(-1).contiguous())
