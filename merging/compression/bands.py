"""SkillPack (GraftLLM, Du et al. 2025, arXiv 2505.18502): singular directions in bands, the leading ones in more bits.

The bands are Delta-CoMe's (Ping et al. 2024, arXiv 2406.08903). Departures: both papers quantize with GPTQ, whose error
feedback needs a layer's inputs from calibration data. Without data, the upper factor is instead fitted again to the
decoded lower factor by least squares, before it is coded. This reduces the error of two-bit bands by up to a sixth, and
the error of four-bit bands by a fourth. Each group has the scale of least squared error, and the scales hold the
singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast
from zlib import crc32

from merging.compression.settings import BandsSpec
from merging.compression.ternary import ternary
from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import compress_matrix, decompose_each
from merging.sources.packs.codings import Bands, Packed, Sparse
from merging.sources.packs.frames import frame_values
from merging.sources.packs.golomb import parameter
from merging.sources.packs.grouped import pack_groups
from merging.sources.stored import MappedTensor

__all__ = ["pack_factors", "pack_pruned", "truncate_to_bands"]

_DAMPING = {8: 0.0, 4: 1e-4, 2: 0.0138, 1: 0.13}
"""The damping of the fit to a direction, by its bits: the squared error of its codes. The values were found by trial on
matrices of full rank and on adapters. Without damping, one-bit bands of full rank lose everything."""

_RANDOMISED = 0.5
"""The largest rank, as a share of the shorter side, for which random projections replace a whole SVD."""


def total(bands: BandsSpec) -> int | None:
    """Return the number of directions in all bands, None if the last band takes all that are left."""
    counts = [count for count, _ in bands]
    return None if None in counts else sum(cast(list[int], counts))


def truncate_to_bands(matrix: Tensor, bands: BandsSpec) -> LowRank:
    """Return the leading singular directions of a matrix ``[out, in]`` or ``[n, out, in]``, as many as the bands hold.

    Few directions are found by a randomized range finder, many by the SVD.
    """
    wanted, side = total(bands), min(matrix.shape[-2:])
    rank = side if wanted is None else min(wanted, side)
    if rank <= _RANDOMISED * side:
        return compress_matrix(matrix, rank)[0]
    u, s, vh = decompose_each(matrix, rank)
    ups, downs = u * s.sqrt()[..., None, :], s.sqrt()[..., None] * vh
    return LowRank(ups.to(matrix.dtype), downs.to(matrix.dtype), tuple(matrix.shape))


def pack_factors(
    up: Tensor, down: Tensor, bands: BandsSpec, whole: Tensor | None = None
) -> tuple[tuple[Bands, Tensor], tuple[Bands, Tensor]]:
    """Return the codings and payloads of factors ``[..., out, r]`` and ``[..., r, in]`` in descending order.

    With the decoded lower factor, the upper factor is fitted again to the product, or to the matrix ``whole``.
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
    """Return the bands that hold ``rank`` directions."""
    found, left = [], rank
    for count, bits in bands:
        taken = left if count is None else min(count, left)
        found += [(taken, bits)] if taken else []
        left -= taken
    return tuple(found)


def _refit(onto: Tensor, lower: Tensor, damping: Tensor) -> Tensor:
    """Return the ``up`` for which ``up @ lower`` is closest to a matrix.

    Args:
        onto: ``matrix @ lower.mT``, ``[..., out, r]``.
        lower: The decoded lower factor, ``[..., r, in]``. Zero rows give zero columns of ``up``.
        damping: One number a direction. It prevents large terms that cancel, as coding ``up`` would break that.
    """
    used = lower.abs().amax(-1) > 0
    gram = lower @ lower.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(torch.where(used, 0.0, 1.0))
    sizes = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # Rows get the same length, else the small directions would be lost in rounding.
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
    """Return the coding and the payload of the largest entries (by magnitude) of a tensor, one byte each.

    ``int(density * n)`` entries are kept, at least one, and no zeros. Of equal entries the lowest indices are kept.
    """
    flat = values.reshape(-1).float()
    signs, _ = ternary(flat, density)
    kept = torch.nonzero(signs)[:, 0]
    unit = float(flat.abs().amax()) if len(kept) else 1.0
    b = parameter(len(kept) / max(1, len(flat)))
    return Sparse(b=b, unit=unit), frame_values(flat, kept, b, unit)
