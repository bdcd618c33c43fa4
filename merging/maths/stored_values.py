"""Changes in the types of their files, which compiled kernels decode on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["StoredValues"]


@dataclass(frozen=True, slots=True, eq=False)
class StoredValues:
    """The models' changes as they are stored, for compiled kernels, which decode them on their way.

    Attributes:
        values: the models' values, or their changes, ``[n, elements]`` in the type of their files.
        base: the base's values, ``[elements]`` of the same type; None where ``values`` are not to be subtracted from.
        shape: the shape of a change.
        decode: returns the changes written out, ``[n, *shape]``.
    """

    values: Tensor
    base: Tensor | None
    shape: tuple[int, ...]
    decode: Callable[[], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the changes."""
        return torch.promote_types(self.values.dtype, torch.float32)
