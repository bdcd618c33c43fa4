"""Singular values of changes, what they say of its rank, and the subspaces that its leading directions span."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.engine.tiles import Tiler
from merging.geometry.alignment import ModelLike, align, matrix_sides, read_change
from merging.geometry.grams import segment_sums
from merging.maths.delta import Delta, LowRank
from merging.maths.linalg import CUT, factored_svd, leading_svd
from merging.plan import Item, Plan
from merging.sources.changes import Change

__all__ = ["SIDE", "Spectrum", "decomposable", "directions", "overlaps", "singular_values", "spectra", "spectrum_of"]

SIDE = 1024
"""The shorter side up to which full matrices are decomposed unasked: a tenth of a second each, on a CPU."""

_MATRICES = ("matrix", "conv")
"""The kinds of tensors of which full changes are decomposed."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What the singular values of one change tell (of experts, the mean over them).

    ``largest`` is the largest one. ``effective`` is the effective rank of Roy and Vetterli (2007): the exponential of
    the entropy of the singular values as shares of their sum. ``stable`` is the stable rank, the squared norm over the
    square of the largest. ``energy90`` and ``energy99`` are the directions that carry 90 and 99 per cent of the
    squared norm, and ``curve`` how much the first 1, 2, ... carry. All are 0 of a change of nothing.
    """

    largest: float
    effective: float
    stable: float
    energy90: float
    energy99: float
    curve: tuple[float, ...]


def singular_values(delta: Delta) -> Tensor:
    """The singular values of a change, ``[..., k]`` float64, descending; of factors through their QR decompositions.

    A full matrix is decomposed by the eigenvalues of its shorter side's Gram matrix, so that values below about 1e-8
    of the largest are noise. A convolution is the matrix of its outputs; leading axes of factors are a batch.
    """
    if isinstance(delta, LowRank):
        up = torch.linalg.qr(delta.up.double(), mode="r")[1]
        down = torch.linalg.qr(delta.down.double().mT, mode="r")[1]
        core: Tensor = torch.linalg.svdvals(up @ down.mT)
        return core
    matrix = delta.dense().flatten(1)
    short = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
    squares = torch.zeros(len(short), len(short), dtype=torch.float64, device=short.device)
    for piece in torch.split(short, 1 << 12, 1):
        squares.addmm_(piece.double(), piece.double().mT)
    values: Tensor = torch.linalg.eigvalsh(squares).flip(0).clamp(min=0).sqrt()
    return values


def spectrum_of(values: Tensor) -> Spectrum:
    """The summary of singular values ``[..., k]``."""
    values = values.double().flatten(0, -2) if values.dim() > 1 else values.double()[None]
    values = values[values.sum(-1) > 0]
    if not values.numel():
        return Spectrum(0.0, 0.0, 0.0, 0.0, 0.0, ())
    shares = values / values.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    energy = values.square()
    curve = (energy / energy.sum(-1, keepdim=True)).cumsum(-1)
    stable = energy.sum(-1) / energy[:, 0]

    def directions_for(share: float) -> float:
        return float((curve < share).sum(-1).add(1).double().mean())

    mean = curve.mean(0).clamp(max=1)
    return Spectrum(
        float(values.max()),
        float(entropy.exp().mean()),
        float(stable.mean()),
        directions_for(0.9),
        directions_for(0.99),
        tuple(mean.tolist()),
    )


def spectra(
    models: Sequence[ModelLike], *, full: bool = False, device: torch.device | str = "cpu", **options: Any
) -> Iterator[tuple[str, list[Tensor | None]]]:
    """The tensors by name, and of each the singular values of what every model changes in it, ``[..., k]`` float64.

    None for a model that does not touch the tensor, and for what has none or is too dear: norms and biases, and
    full matrices whose shorter side is above :data:`SIDE`, unless ``full``. Takes the options of
    :func:`~merging.geometry.alignment.align`.
    """
    plan = align(models, **options)
    tiler = Tiler(plan, torch.device(device))
    for item in plan.items:
        slots = range(len(plan.models))
        yield (
            item.site.name,
            [
                singular_values(read_change(tiler, item, slot)) if decomposable(plan, item, slot, full) else None
                for slot in slots
            ],
        )


def decomposable(plan: Plan, item: Item, slot: int, full: bool = False) -> bool:
    """Whether what a model changes in a tensor is a matrix, and one that is cheap to decompose (``full``: or not)."""
    each = item.inputs[slot]
    if each is None:
        return False
    if isinstance(each, Change) and each.low_rank:
        return True
    return item.site.kind in _MATRICES and (full or min(matrix_sides(item)[1:]) <= SIDE)


def directions(delta: Delta, most: int) -> tuple[Tensor, Tensor]:
    """Bases of the outputs and of the inputs that a change's leading directions span: ``[k, out]``, ``[k, in]``.

    Float64, at most ``most`` of each and none whose singular value is below :data:`~merging.maths.linalg.CUT` of the
    largest. The change is one of ``[out, in]``, or of a convolution ``[out, ...]``. Experts, which have many bases,
    have none here.
    """
    if isinstance(delta, LowRank):
        u, s, vh = factored_svd(delta.up, delta.down)
    else:
        u, s, vh = leading_svd(delta.dense().flatten(1), most)
    kept = min(most, int((s > CUT * s[:1]).sum()))
    return u.mT[:kept], vh[:kept]


def overlaps(bases: Sequence[Tensor | None]) -> Tensor:
    """How far subspaces coincide, ``[n, n]`` float64; NaN where one is missing or has no direction.

    ``|U_i U_j^T|_F^2 / min(k_i, k_j)`` for bases ``U [k, d]``: 1 where one lies in the other, 0 where they are
    orthogonal, and about max(k_i, k_j) / d by chance. The measure of section 7.2 of LoRA (Hu et al. 2021, arXiv
    2106.09685).
    """
    sizes = torch.tensor([0 if basis is None else len(basis) for basis in bases])
    out = torch.full((len(bases), len(bases)), torch.nan, dtype=torch.float64)
    there = sizes.nonzero()[:, 0]
    if not len(there):
        return out
    stacked = torch.cat([basis for basis in bases if basis is not None])
    owners = torch.arange(len(there)).repeat_interleave(sizes[there]).to(stacked.device)
    squares = (stacked @ stacked.mT).square_()
    sums = segment_sums(segment_sums(squares, owners, len(there)).mT, owners, len(there))
    out[there[:, None], there] = sums.cpu() / torch.minimum(sizes[there][:, None], sizes[there])
    return out
