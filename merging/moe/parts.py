"""The parts of an output; each is made and written by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from merging.errors import InputError
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.randomness import draw_normal
from merging.moe.source import MoeSource
from merging.plan.items import TILE
from merging.sources.dtypes import DTYPES
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter

__all__ = ["CopiedTensor", "GivenTensor", "OutputPart", "check_finite"]


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


def check_finite(values: Tensor, before: Tensor, where: str) -> Tensor:
    """Return values that are to be written.

    Raises :class:`~merging.errors.InputError` for NaN and infinities, in the model or by the type of the output.
    """
    if not values.is_floating_point() or bool(values.isfinite().all()):
        return values
    if bool(before.isfinite().all()):
        raise InputError(f"{where} has values that {str(values.dtype)[6:]} cannot hold: choose another dtype")
    raise InputError(f"{where} has values that are not finite: no model can use them")


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
        """Return a tile with its scale and noise, in the output's type."""
        if self.scale != 1 or self.noise:
            values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
        if self.noise:
            values = values + draw_normal(start, len(values), values.device, *self.place) * self.noise
        if self.scale != 1:
            values = values * self.scale
        return check_finite(values.to(DTYPES[self.out.dtype_name]), values, f"{self.source.name}: {self.name}")


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
