"""ComPEFT (Yadav et al. 2023, arXiv 2311.13171): the signs of the largest entries, at one scale a tensor.

Departures: a threshold and a scale for each tensor, factors having been brought to the balanced gauge first. Over all
of a LoRA at once, as in the paper, the larger factor (mostly A) takes every place, and of the other nothing is left.
"""

from __future__ import annotations

from math import prod, sqrt

import torch
from torch import Tensor

from merging.compression.settings import PackSettings
from merging.maths.delta import LowRank
from merging.maths.linalg import factored_svd, squared_norm
from merging.maths.sums import safe_ratio
from merging.sources.packs.codings import DtypeName, Ternary
from merging.sources.packs.frames import BITMAP, frame_signs
from merging.sources.packs.golomb import parameter
from merging.sources.stored import DTYPES

__all__ = ["balance", "norm_factor", "pack_signs", "ternary"]


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``[out, r]`` and ``[r, in]`` of the same product, by its singular vectors and the roots of its values.

    The gauge follows from the product alone, however it was factored: the largest entry of each column of ``up`` is
    positive. Directions that a product of these sides cannot have are zero. float64.
    """
    u, s, vh = factored_svd(up, down)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    root = s.sqrt() * torch.where(largest[0] < 0, -1.0, 1.0)
    left, right = up.new_zeros(up.shape, dtype=torch.float64), down.new_zeros(down.shape, dtype=torch.float64)
    left[:, : len(s)], right[: len(s)] = u * root, root[:, None] * vh
    return left, right


def ternary(values: Tensor, density: float, alpha: float | None = None) -> tuple[Tensor, float]:
    """The signs (int8, in the shape of the values) of the largest entries, zero elsewhere, and their scale.

    ``int(density * n)`` entries are kept, at least one and none that is zero; of equal ones those of the lowest flat
    index. The scale is the mean of the magnitudes that are kept, which is least squares, or ``alpha`` times the
    standard deviation of all entries.
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
    """By how much the scale of each factor must grow for the product, or a tensor alone, to keep its norm.

    At scales of least squares, which pay for what is dropped, a product keeps about six tenths of it (density 0.2).
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
    """The type that a tensor is read as, its coding and its payload.

    Scales are ``factor`` times what :func:`ternary` says; without it the settings tell. The type is ``kind``, or
    float32 where the scale is out of its range; the scale is one that it can hold.
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
