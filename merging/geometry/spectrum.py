"""Singular values of changes, their effective ranks, and the subspaces of their leading directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from typing_extensions import Unpack

from merging.display.tables import Displayed
from merging.engine.tiles import Tiler
from merging.geometry.alignment import AlignOptions, ModelLike, align, matrix_sides, read_change
from merging.geometry.grams import segment_sums
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import CUT, factored_svd, leading_svd
from merging.plan import Item, Plan
from merging.sources.changes import Change

__all__ = ["SIDE", "Spectrum", "decomposable", "directions", "overlaps", "singular_values", "spectra", "spectrum_of"]

SIDE = 1024
"""The largest short side of a full matrix that is decomposed by default: a tenth of a second each on a CPU."""

_MATRICES = ("matrix", "conv")
"""The kinds of tensors whose full changes are decomposed."""


@dataclass(frozen=True, slots=True, repr=False)
class Spectrum(Displayed):
    """A summary of the singular values of one change (for experts, the mean over them). A zero change has zeros.

    Attributes:
        largest: The largest singular value.
        effective: The effective rank of Roy and Vetterli (2007): the exponential of the entropy of the singular values
            as shares of their sum.
        stable: The stable rank: the squared norm divided by the square of the largest singular value.
        energy90: The number of directions with 90 per cent of the squared norm.
        energy99: The same for 99 per cent.
        curve: The shares of the squared norm in the first 1, 2, ... directions.
    """

    largest: float
    effective: float
    stable: float
    energy90: float
    energy99: float
    curve: tuple[float, ...]


def singular_values(delta: Delta) -> Tensor:
    """Return the singular values of a change, ``[..., k]`` float64, descending.

    Factors are decomposed by QR first. For a full matrix the eigenvalues of its shorter side's Gram matrix are taken,
    so that values below about 1e-8 of the largest are noise. A convolution is the matrix of its outputs. Leading axes
    of factors are a batch.
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
    """Return the summary of singular values ``[..., k]``."""
    values = values.double().flatten(0, -2) if values.dim() > 1 else values.double()[None]
    values = values[values.sum(-1) > 0]
    if not values.numel():
        return Spectrum(largest=0.0, effective=0.0, stable=0.0, energy90=0.0, energy99=0.0, curve=())
    shares = values / values.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    energy = values.square()
    curve = (energy / energy.sum(-1, keepdim=True)).cumsum(-1)
    stable = energy.sum(-1) / energy[:, 0]

    def directions_for(share: float) -> float:
        return float((curve < share).sum(-1).add(1).double().mean())

    mean = curve.mean(0).clamp(max=1)
    return Spectrum(
        largest=float(values.max()),
        effective=float(entropy.exp().mean()),
        stable=float(stable.mean()),
        energy90=directions_for(0.9),
        energy99=directions_for(0.99),
        curve=tuple(mean.tolist()),
    )


def spectra(
    models: Sequence[ModelLike],
    *,
    full: bool = False,
    device: torch.device | str = "cpu",
    **options: Unpack[AlignOptions],
) -> Iterator[tuple[str, list[Tensor | None]]]:
    """Yield each tensor's name with the singular values of every model's change.

    Args:
        models: The models: paths, addresses, or opened models.
        full: Whether to decompose full matrices whose shorter side is above :data:`SIDE`.
        device: The device that computes.
        **options: Options of :func:`~merging.geometry.alignment.align`, such as ``base``.

    Yields:
        The name, and for each model the singular values ``[..., k]`` float64, descending. They are None for a model
        that does not change the tensor, and for tensors that are not decomposed, such as norms and biases.

    Raises:
        merging.errors.MergingError: For models that cannot be read or do not fit together.
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
    """Whether a model's change of a tensor is a matrix that is cheap to decompose, or of any size with ``full``."""
    each = item.inputs[slot]
    if each is None:
        return False
    if isinstance(each, Change) and each.low_rank:
        return True
    return item.site.kind in _MATRICES and (full or min(matrix_sides(item)[1:]) <= SIDE)


def directions(delta: Delta, most: int) -> tuple[Tensor, Tensor]:
    """Return bases of the outputs and inputs that a change's leading directions span, ``[k, out]`` and ``[k, in]``.

    The bases are float64 and have at most ``most`` directions. Directions whose singular value is below
    :data:`~merging.maths.linalg.CUT` of the largest are left out. The change is ``[out, in]``, or a convolution
    ``[out, ...]``, but no stack of experts.
    """
    if isinstance(delta, LowRank):
        u, s, vh = factored_svd(delta.up, delta.down)
    else:
        u, s, vh = leading_svd(delta.dense().flatten(1), most)
    kept = min(most, int((s > CUT * s[:1]).sum()))
    return u.mT[:kept], vh[:kept]


def overlaps(bases: Sequence[Tensor | None]) -> Tensor:
    """Return the overlap of subspaces, ``[n, n]`` float64; NaN if a subspace is missing or has no direction.

    The overlap is ``|U_i U_j^T|_F^2 / min(k_i, k_j)`` for bases ``U [k, d]``: 1 if one subspace contains the other, 0
    if they are orthogonal, and about ``max(k_i, k_j) / d`` by chance. See section 7.2 of LoRA (Hu et al. 2021, arXiv
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
