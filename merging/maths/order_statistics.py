"""The parts of an exact order statistic: a position, and integers that sort as floats do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["Rank", "floats", "has_nan", "key_dtype", "keys"]


@dataclass(frozen=True, slots=True)
class Rank:
    """A position among d sorted elements that depends on d, as the constructors say.

    Positions out of range are moved to the nearest end. The products are rounded as the papers' code rounds them.
    """

    kind: Literal["share", "upper", "largest", "quantile", "lowest", "highest"]
    q: float
    above: float = 0.0

    def __post_init__(self) -> None:
        for share in (self.q, self.above):
            if not 0 <= share <= 1:
                raise ValueError(f"a rank is a share of the elements, between 0 and 1, and {share} was given")

    @classmethod
    def share(cls, q: float) -> Rank:
        """Index int(d * q), ascending: 0 is the smallest element."""
        return cls("share", q)

    @classmethod
    def upper(cls, q: float) -> Rank:
        """Index int(d * (1 - q) - 1), ascending: 0 is the largest element."""
        return cls("upper", q)

    @classmethod
    def largest(cls, density: float) -> Rank:
        """The k-th largest element, k = int(density * d) but at least 1: a share `density` of them reaches it."""
        return cls("largest", density)

    @classmethod
    def quantile(cls, q: float) -> Rank:
        """Index int(q * (d - 1)), ascending."""
        return cls("quantile", q)

    @classmethod
    def band(cls, density: float, above: float) -> tuple[Rank, Rank]:
        """The smallest and the largest of the k = int(density * d), at least 1, elements that remain.

        The int(above * d) largest are left out, and then the smallest. Fewer of the largest are left out if k would not
        remain.
        """
        return cls("lowest", density, above), cls("highest", density, above)

    def index(self, count: int) -> int:
        """Return the position, ascending from 0, among ``count`` elements."""
        if self.kind == "share":
            index = int(count * self.q)
        elif self.kind == "upper":
            index = int(count * (1 - self.q) - 1)
        elif self.kind == "quantile":
            index = int(self.q * (count - 1))
        elif self.kind == "largest":
            index = count - int(self.q * count)
        else:
            kept = max(1, int(self.q * count))
            highest = count - 1 - min(int(self.above * count), count - kept)
            index = highest if self.kind == "highest" else highest - kept + 1
        return min(max(index, 0), count - 1)


def key_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the keys of float32 or float64. Raises ValueError for other dtypes."""
    if dtype == torch.float32:
        return torch.int32
    if dtype == torch.float64:
        return torch.int64
    raise ValueError(f"ranks are taken of float32 or float64, not of {dtype}")


def keys(values: Tensor, magnitudes: bool = False) -> Tensor:
    """Return a signed integer of the same width for each float, in the same order; -0.0 and 0.0 have one key.

    With ``magnitudes``, of the absolute values.

    The bits without the sign are the key of a positive float (0 is 0) and, negated, of a negative one. Any shape;
    float32 to int32, float64 to int64. The keys of NaN are beyond the keys of the infinities.
    """
    bits = values.view(key_dtype(values.dtype))
    sizes = bits & torch.iinfo(bits.dtype).max
    if magnitudes:
        return sizes
    signs = bits >> (values.dtype.itemsize * 8 - 1)
    return sizes.bitwise_xor_(signs).sub_(signs)


def floats(numbers: Tensor) -> Tensor:
    """Return the floats of :func:`keys`, with 0.0 for -0.0."""
    dtype = torch.float32 if numbers.dtype == torch.int32 else torch.float64
    values = numbers.abs().view(dtype)
    return torch.where(numbers < 0, -values, values)


def has_nan(numbers: Tensor) -> bool:
    """Return whether any key, of at least one, belongs to a NaN. Several times faster than isnan on the floats."""
    infinity = 0x7F800000 if numbers.dtype == torch.int32 else 0x7FF0000000000000
    lowest, highest = torch.aminmax(numbers)
    return bool((lowest < -infinity) | (highest > infinity))
