"""SkillPack (GraftLLM, Du et al. 2025, arXiv 2505.18502): singular directions in bands, the leading ones in more bits.

The bands are Delta-CoMe's (Ping et al. 2024, arXiv 2406.08903). Both papers quantize with GPTQ, whose error feedback
needs a layer's inputs from calibration data. Departures: each group has the scale of least squared error, the scales
hold the singular values, and the upper factor is fitted again to the decoded lower factor before it is coded.

Without data the fit is least squares on the change. This reduces the error of two-bit bands by up to a sixth, and the
error of four-bit bands by a fourth. With the Gram matrix of a layer's inputs it is least squares on the outputs, with
GPTQ's error feedback (Frantar et al. 2022, arXiv 2210.17323) from each direction to the later ones. The directions
are chosen by the outputs too, as the leading ones of the change times the inputs. The papers feed back errors in the
lower factor too. After this fit that was no better on any of seven bands, and up to a tenth worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast
from zlib import crc32

from merging.compression.settings import BandsSpec
from merging.compression.ternary import ternary
from merging.maths.delta import LowRank
from merging.maths.layer_statistics import InputGram
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import balance, compress_matrix, decompose_each
from merging.sources.packs.codings import Bands, Packed, Sparse
from merging.sources.packs.frames import frame_values
from merging.sources.packs.golomb import parameter
from merging.sources.packs.grouped import pack_groups, unpack_groups
from merging.sources.stored import MappedTensor

__all__ = ["FactorCodings", "count_directions", "decode_factor", "pack_factors", "pack_pruned", "truncate_to_bands"]

FactorCodings: TypeAlias = "tuple[tuple[Bands, Tensor], tuple[Bands, Tensor]]"
"""The codings and payloads of an upper and a lower factor."""

_DAMPING = {8: 0.0, 4: 1e-4, 2: 0.0138, 1: 0.13}
"""The damping of the fit to a direction, by its bits: the squared error of its codes. The values were found by trial on
matrices of full rank and on adapters. Without damping, one-bit bands of full rank lose everything."""

_RANDOMISED = 0.5
"""The largest rank, as a share of the shorter side, for which random projections replace a whole SVD."""


def count_directions(bands: BandsSpec) -> int | None:
    """Return the number of directions in all bands, None if the last band takes all that are left."""
    counts = [count for count, _ in bands]
    return None if None in counts else sum(cast(list[int], counts))


def truncate_to_bands(matrix: Tensor, bands: BandsSpec, gram: InputGram | None = None) -> LowRank:
    """Return the leading singular directions of a matrix ``[out, in]`` or ``[n, out, in]``, as many as the bands hold.

    Few directions are found by a randomized range finder, many by the SVD. With the Gram matrix of the inputs, the
    matrix is first projected onto the leading directions of its outputs. This is the closest matrix of this rank on
    these inputs.
    """
    wanted, side = count_directions(bands), min(matrix.shape[-2:])
    rank = side if wanted is None else min(wanted, side)
    if gram is not None and rank < side:
        outputs = torch.linalg.qr(truncate_to_bands(gram.root(matrix.double()), bands).up)[0]
        return balance(LowRank(outputs, outputs.mT @ matrix.double(), tuple(matrix.shape)))
    if rank <= _RANDOMISED * side:
        return compress_matrix(matrix, rank)[0]
    u, s, vh = decompose_each(matrix, rank)
    ups, downs = u * s.sqrt()[..., None, :], s.sqrt()[..., None] * vh
    return LowRank(ups.to(matrix.dtype), downs.to(matrix.dtype), tuple(matrix.shape))


def pack_factors(
    up: Tensor, down: Tensor, bands: BandsSpec, whole: Tensor | None = None, gram: InputGram | None = None
) -> FactorCodings:
    """Return the codings and payloads of factors ``[..., out, r]`` and ``[..., r, in]`` in descending order.

    With the decoded lower factor, the upper factor is fitted again to the product, or to the matrix ``whole``. With
    the Gram matrix of the inputs it is fitted to the outputs, and each direction's rounding error goes to the later
    directions; ``up`` is ``[out, r]`` then.
    """
    fitted = _fit_bands(bands, down.shape[-2])
    coded = _encode(down, fitted, axis=1)
    lower = decode_factor(*coded).reshape(down.shape).to(down).double()
    inputs = (lower if gram is None else gram.apply(lower)).mT
    onto = up.double() @ (down.double() @ inputs) if whole is None else whole.double() @ inputs
    damping = torch.tensor([_DAMPING[bits] for count, bits in fitted for _ in range(count)], dtype=torch.float64)
    rest = lower.shape[-2] - len(damping)
    fit = _Fit(lower, inputs, torch.nn.functional.pad(damping, (0, rest)).to(lower.device))
    upper = fit.solve(onto)
    if gram is not None:
        upper = fit.feed_back(upper, fitted)
    return _encode(upper.to(up.dtype), fitted, axis=2), coded


def decode_factor(coding: Bands, payload: Tensor) -> Tensor:
    """Return the values of a coded factor, float32, ``[a, b]`` or ``[n, a, b]``."""
    shape = coding.matrices if coding.matrices[0] != 1 else coding.matrices[1:]
    return Packed("a factor", "F32", shape, MappedTensor(payload, ("", 0)), coding).read()


def _fit_bands(bands: BandsSpec, rank: int) -> tuple[tuple[int, int], ...]:
    """Return the bands that hold ``rank`` directions."""
    found, left = [], rank
    for count, bits in bands:
        taken = left if count is None else min(count, left)
        found += [(taken, bits)] if taken else []
        left -= taken
    return tuple(found)


class _Fit:
    """Least squares for the ``up`` whose product ``up @ lower`` is closest to a matrix, in the metric of the inputs.

    Args:
        lower: The decoded lower factor, ``[..., r, in]``. Zero rows give zero columns of ``up``.
        inputs: ``lower.mT``, or the Gram matrix of the inputs times it, ``[..., in, r]``.
        damping: One number a direction. It prevents large terms that cancel, as coding ``up`` would break that.
    """

    def __init__(self, lower: Tensor, inputs: Tensor, damping: Tensor) -> None:
        used = lower.abs().amax(-1) > 0
        gram = lower @ inputs
        gram.diagonal(dim1=-2, dim2=-1).add_(torch.where(used, 0.0, 1.0))
        self._sizes = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        # Rows get the same length, else the small directions would be lost in rounding.
        self._even = gram / (self._sizes[..., :, None] * self._sizes[..., None, :])
        self._even.diagonal(dim1=-2, dim2=-1).add_(damping + 1e-12)

    def solve(self, onto: Tensor) -> Tensor:
        """Return ``up`` ``[..., out, r]`` from ``onto``, which is ``matrix @ inputs``."""
        right = onto / self._sizes[..., None, :]
        found: Tensor = torch.linalg.solve(self._even, right.mT).mT / self._sizes[..., None, :]
        return found

    def feed_back(self, upper: Tensor, bands: Sequence[tuple[int, int]]) -> Tensor:
        """Return ``up`` ``[out, r]``, each direction fitted again to the rounded directions before it (GPTQ).

        With ``even = R R^T`` of an upper triangular ``R``, the rows of ``R^-1`` hold the shares of an error that the
        later directions take.
        """
        even, sizes = self._even.cpu(), self._sizes.cpu()
        factor = torch.linalg.cholesky(even.flip(0, 1)).flip(0, 1)
        shares = torch.linalg.solve_triangular(factor, torch.eye(len(even), dtype=even.dtype), upper=True)
        shares /= shares.diagonal()[:, None].clone()
        found, unit = upper.cpu() * sizes, float(upper.abs().amax()) or 1.0
        for place, bits in enumerate(bits for count, bits in bands for _ in range(count)):
            wanted = found[:, place] / sizes[place]
            row = wanted[None].float()
            rounded = unpack_groups(pack_groups(row, bits, unit), 1, row.shape[1], bits, unit)[0]
            error = (wanted - rounded) * sizes[place]
            found[:, place + 1 :] -= error[:, None] * shares[place, place + 1 :]
        return (found / sizes).to(upper)


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
