"""ComPEFT (Yadav et al. 2023, arXiv 2311.13171): the signs of the largest entries, at one scale a tensor.

Departures: each tensor has its own threshold and scale, after the factors are put into the balanced gauge. With one
threshold for a whole LoRA, as in the paper, the larger factor (mostly A) takes every place, and the other vanishes.
"""

from __future__ import annotations

from math import prod, sqrt

from merging.compression.settings import PackSettings
from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import factored_svd, squared_norm
from merging.maths.sums import safe_ratio
from merging.sources.dtypes import DTYPES
from merging.sources.packs.codings import DtypeName, Ternary
from merging.sources.packs.frames import BITMAP, frame_signs
from merging.sources.packs.golomb import parameter

__all__ = ["balance", "norm_factor", "pack_signs", "ternary"]


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors ``[out, r]`` and ``[r, in]`` of the same product: singular vectors times roots of singular values.

    The gauge depends on the product alone, not on its factorization: the largest entry of each column of ``up`` is
    positive. Directions beyond the rank of a product of these sides are zero. The factors are float64.
    """
    u, s, vh = factored_svd(up, down)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    root = s.sqrt() * torch.where(largest[0] < 0, -1.0, 1.0)
    left, right = up.new_zeros(up.shape, dtype=torch.float64), down.new_zeros(down.shape, dtype=torch.float64)
    left[:, : len(s)], right[: len(s)] = u * root, root[:, None] * vh
    return left, right


def ternary(values: Tensor, density: float, alpha: float | None = None) -> tuple[Tensor, float]:
    """Return the signs (int8, in the shape of the values) of the largest entries, zero elsewhere, and their scale.

    ``int(density * n)`` entries are kept, at least one, and no zeros. Of equal entries the lowest indices are kept.
    The scale is the mean of the kept magnitudes, which is least squares, or ``alpha`` times the standard deviation of
    all entries.
    """
    flat = values.reshape(-1)
    sizes = flat.abs()
    count = min(max(1, int(density * len(flat))), int(torch.count_nonzero(flat)))
    if not count:
        return torch.zeros(values.shape, dtype=torch.int8), 0.0
    least = torch.kthvalue(sizes, len(sizes) - count + 1).values
    kept = sizes > least
    equal = torch.nonzero(sizes == least)[: count - int(torch.count_nonzero(kept)), 0]
    kept[equal] = True
    signs = (flat.sign() * kept).to(torch.int8).view(values.shape)
    return signs, float(sizes[kept].double().mean() if alpha is None else alpha * flat.double().std(correction=0))


def norm_factor(density: float, *factors: Tensor) -> float:
    """Return the growth of each factor's scale with which the product, or a single tensor, keeps its norm.

    At least-squares scales a product keeps about six tenths of its norm (density 0.2).
    """
    kept = [signs.double() * scale for signs, scale in (ternary(factor, density) for factor in factors)]
    ratio = safe_ratio(_norm(*factors), _norm(*kept)) or 1.0
    return sqrt(ratio) if len(factors) > 1 else ratio


def _norm(*factors: Tensor) -> float:
    if len(factors) == 1:
        return float(torch.linalg.vector_norm(factors[0], dtype=torch.float64))
    up, down = factors
    return sqrt(float(squared_norm(LowRank(up, down, (up.shape[0], down.shape[1])))))


def pack_signs(
    values: Tensor, kind: DtypeName, settings: PackSettings, factor: float | None = None
) -> tuple[DtypeName, Ternary, Tensor]:
    """Return the dtype that a tensor is read as, its coding and its payload.

    The scale is ``factor`` times the scale of :func:`ternary`. Without a factor, the settings decide. The dtype is
    ``kind``, or float32 if ``kind`` cannot hold the scale. The scale is rounded to the dtype.
    """
    if factor is None:
        factor = norm_factor(settings.density, values) if settings.keeps_norm else 1.0
    signs, scale = ternary(values, settings.density, settings.alpha)
    scale *= factor
    rounded = float(torch.tensor(scale, dtype=torch.float64).to(DTYPES[kind]))
    if abs(rounded - scale) > 0.01 * scale:
        kind, rounded = "F32", float(torch.tensor(scale, dtype=torch.float32))
    kept = int(torch.count_nonzero(signs))
    b = BITMAP if settings.bitmap else parameter(kept / max(1, prod(values.shape)))
    return kind, Ternary(b=b, scale=rounded), frame_signs(signs.reshape(-1), b)
