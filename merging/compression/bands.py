"""SkillPack (GraftLLM, Du et al. 2025, arXiv 2505.18502): singular directions in bands, the leading ones in more bits.

The bands are Delta-CoMe's (Ping et al. 2024, arXiv 2406.08903). Both quantise with GPTQ, whose error feedback needs the
inputs that calibration data give a layer; without data none of it is possible. What is possible, and done, is to fit
the outputs' factor anew to the inputs' factor as it comes out of its codes, by least squares, before it is put in codes
itself: it takes up to a sixth off the error of two-bit bands, and a fourth off that of four-bit ones. Scales are of
least squared error a group; singular values are in the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast
from zlib import crc32

import torch
from torch import Tensor

from merging.compression.settings import BandsSpec
from merging.compression.ternary import ternary
from merging.maths.delta import LowRank
from merging.maths.linalg import compress_matrix, decompose
from merging.sources.packs.codings import Bands, Packed, Sparse
from merging.sources.packs.frames import frame_values
from merging.sources.packs.golomb import parameter
from merging.sources.packs.grouped import pack_groups
from merging.sources.stored import MappedTensor

__all__ = ["pack_factors", "pack_pruned", "truncate_to_bands"]

_DAMPING = {8: 0.0, 4: 1e-4, 2: 0.0138, 1: 0.13}
"""By how much the fit to a direction in so many bits is damped, of 1: the square of what its codes lose. Found by trial
on matrices of full rank and on adapters; without any, one-bit bands of full rank lose all there is."""

_RANDOMISED = 0.5
"""The share of the shorter side up to which a rank is found by random projections, and not by a whole SVD."""


def total(bands: BandsSpec) -> int | None:
    """The directions of all bands, None where the last takes what is left."""
    counts = [count for count, _ in bands]
    return None if None in counts else sum(cast(list[int], counts))


def truncate_to_bands(matrix: Tensor, bands: BandsSpec) -> LowRank:
    """The leading singular directions of a matrix ``[out, in]``, or of several ``[n, out, in]``, as many as bands hold.

    By a randomised range finder where they are few, else by the SVD.
    """
    wanted, side = total(bands), min(matrix.shape[-2:])
    rank = side if wanted is None else min(wanted, side)
    if rank <= _RANDOMISED * side:
        return compress_matrix(matrix, rank)[0]
    parts = [decompose(each.double(), needed=rank) for each in matrix.reshape(-1, *matrix.shape[-2:])]
    ups = torch.stack([u * s.sqrt() for u, s, _ in parts]).view(*matrix.shape[:-1], rank)
    downs = torch.stack([s.sqrt()[:, None] * vh for _, s, vh in parts]).view(*matrix.shape[:-2], rank, -1)
    return LowRank(ups.to(matrix.dtype), downs.to(matrix.dtype), tuple(matrix.shape))


def pack_factors(
    up: Tensor, down: Tensor, bands: BandsSpec, whole: Tensor | None = None
) -> tuple[tuple[Bands, Tensor], tuple[Bands, Tensor]]:
    """Codings and payloads of factors ``[..., out, r]`` and ``[..., r, in]``, directions in descending order.

    The upper factor is fitted anew to the product, or to the ``whole`` matrix that it stands for, as the lower factor
    has become.
    """
    fitted = _fit_bands(bands, down.shape[-2])
    coded = _encode(down, fitted, axis=1)
    lower = Packed("a factor", "F32", tuple(down.shape), MappedTensor(coded[1], ("", 0)), coded[0]).read().to(down)
    inputs = lower.double().mT
    onto = up.double() @ (down.double() @ inputs) if whole is None else whole.double() @ inputs
    damping = torch.tensor([_DAMPING[bits] for count, bits in fitted for _ in range(count)], dtype=torch.float64)
    rest = lower.shape[-2] - len(damping)
    upper = _refit(onto, lower.double(), torch.nn.functional.pad(damping, (0, rest)).to(lower.device))
    return _encode(upper.to(up.dtype), fitted, axis=2), coded


def _fit_bands(bands: BandsSpec, rank: int) -> tuple[tuple[int, int], ...]:
    """The bands of so many directions."""
    found, left = [], rank
    for count, bits in bands:
        taken = left if count is None else min(count, left)
        found += [(taken, bits)] if taken else []
        left -= taken
    return tuple(found)


def _refit(onto: Tensor, lower: Tensor, damping: Tensor) -> Tensor:
    """The ``up`` for which ``up @ lower`` is closest to the matrix of which ``onto`` is ``matrix @ lower.mT``.

    ``damping``, one number a direction, keeps large terms from cancelling each other, which they would not do any more
    when ``up`` is in codes itself. Zero where a row of ``lower`` is.
    """
    used = lower.abs().amax(-1) > 0
    gram = lower @ lower.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(torch.where(used, 0.0, 1.0))
    sizes = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # rows of one length, or the small directions would be lost in rounding
    even = gram / (sizes[..., :, None] * sizes[..., None, :])
    even.diagonal(dim1=-2, dim2=-1).add_(damping + 1e-12)
    right = onto / sizes[..., None, :]
    found: Tensor = torch.linalg.solve(even, right.mT).mT / sizes[..., None, :]
    return found


def _encode(factor: Tensor, bands: Sequence[tuple[int, int]], axis: int) -> tuple[Bands, Tensor]:
    three = factor.reshape(-1, *factor.shape[-2:]).float().cpu()
    rows = three if axis == 1 else three.mT
    unit = float(rows.abs().amax()) if rows.numel() else 0.0
    parts, first = [torch.empty(0, dtype=torch.uint8)], 0
    for count, bits in bands:
        piece = rows[:, first : first + count].reshape(-1, rows.shape[-1])
        parts.append(pack_groups(piece, bits, unit or 1.0))
        first += count
    payload = torch.cat(parts)
    matrices = cast(tuple[int, int, int], tuple(three.shape))
    checksum = crc32(payload.numpy().tobytes())
    return Bands(bands=tuple(bands), matrices=matrices, axis=axis, unit=unit or 1.0, checksum=checksum), payload


def pack_pruned(values: Tensor, density: float) -> tuple[Sparse, Tensor]:
    """The coding and the payload of the largest entries (by magnitude) of a tensor, in codes of a byte each.

    ``int(density * n)`` are kept, at least one and none that is zero; of equal ones those of the lowest flat index.
    """
    flat = values.reshape(-1).float()
    signs, _ = ternary(flat, density)
    kept = torch.nonzero(signs)[:, 0]
    unit = float(flat.abs().amax()) if len(kept) else 1.0
    b = parameter(len(kept) / max(1, len(flat)))
    return Sparse(b=b, unit=unit), frame_values(flat, kept, b, unit)
