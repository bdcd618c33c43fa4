"""All that is to be known of how models lie to one another, gathered in one walk over their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor

from merging.errors import OptionError
from merging.geometry.alignment import MEMORY, ModelLike, align
from merging.geometry.intruders import Intruders
from merging.geometry.short_names import short_names
from merging.geometry.signs import count_signs
from merging.geometry.spectrum import SIDE, Spectrum
from merging.geometry.walk import LEADING, OVERLAPPING, WalkOptions, WalkResult, walk
from merging.methods.families.spherical import cosines as normalised
from merging.plan import Plan
from merging.progress import Progress
from merging.sources import Adapter
from merging.sources.changes import Change

__all__ = [
    "Agreement",
    "Comparison",
    "IntruderCount",
    "LayerNorms",
    "Magnitudes",
    "Matrix",
    "Overlaps",
    "Profile",
    "compare",
]

_CURVE = 64
"""Directions of which the energy is told one by one."""

Matrix = tuple[tuple[float | None, ...], ...]
"""One row a model; None where there is nothing to tell."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One model: the ``name`` that tells it from the others, how many tensors it changes and by how much (``norm``,
    over all of them), the ``ranks`` of its factors, and the mean ``spectrum`` of its ``matrices`` that were decomposed.
    """

    name: str
    path: str
    kind: str
    tensors: int
    ranks: tuple[int, ...]
    norm: float
    matrices: int
    spectrum: Spectrum | None

    @property
    def rank_text(self) -> str:
        """The rank, the smallest and the largest, or that there is none."""
        return "full" if not self.ranks else "-".join(map(str, dict.fromkeys((self.ranks[0], self.ranks[-1]))))


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """One block of the model (None: what lies outside the blocks): each model's norm there, and their mean cosine."""

    layer: int | None
    norms: tuple[float, ...]
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """How the sizes of the changes differ between models: what DO-Merging (arXiv 2505.15875) puts right.

    ``ratio`` is how many times larger the largest change of a tensor is than the smallest, in the median of the
    ``tensors`` that several models change; ``variance`` the variance of the norms over their squared mean, in the mean
    of these tensors. ``columns`` is the same of the norms of single columns, one an input feature, of the ``modules``
    among them whose changes are factors or small enough to be decomposed.
    """

    ratio: float
    variance: float
    tensors: int
    columns: float | None
    modules: int


@dataclass(frozen=True, slots=True)
class Overlaps:
    """How far the subspaces of at most ``directions`` leading directions coincide, of outputs and of inputs, in the
    mean over the tensors; by ``chance``, random subspaces of these sizes do."""

    outputs: Matrix
    inputs: Matrix
    directions: int
    chance_outputs: float
    chance_inputs: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the entries that both models change, the share changed in the same direction; ``entries`` of ``total`` were
    looked at."""

    matrix: Matrix
    entries: int
    total: int


@dataclass(frozen=True, slots=True)
class IntruderCount:
    """One model's intruder dimensions: how many among the ``directions`` leading singular vectors of the ``matrices``
    that it changes, how many of these are ``touched``, the mean ``share`` of a matrix's energy that they carry, and the
    mean rank of the ``first``."""

    count: int
    matrices: int
    touched: int
    directions: int
    share: float
    first: float | None
    by_tensor: dict[str, Intruders]

    def below(self, threshold: float) -> int:
        """How many there are at another threshold of similarity than a half."""
        return sum(each.below(threshold) for each in self.by_tensor.values())


@dataclass(frozen=True, slots=True)
class Comparison:
    """How models lie to one another; all matrices are in the order of ``models``."""

    models: tuple[Profile, ...]
    base: str | None
    cosines: Matrix
    layers: tuple[LayerNorms, ...]
    magnitudes: Magnitudes | None
    overlaps: Overlaps | None
    signs: Agreement | None
    intruders: tuple[IntruderCount, ...]
    notices: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The models' short names."""
        return [model.name for model in self.models]

    def pairs(self) -> list[tuple[float, int, int]]:
        """All pairs of models by their cosine, the closest first."""
        rows = range(len(self.models))
        pairs = [(self.cosines[i][j] or 0.0, i, j) for i in rows for j in rows[i + 1 :]]
        return sorted(pairs, key=lambda pair: -pair[0])

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return asdict(self)


def compare(
    models: Sequence[ModelLike],
    *,
    signs: Literal["sample", "all"] | None = "sample",
    intruders: bool = False,
    full_spectra: bool = False,
    directions: int = 16,
    max_memory: int = MEMORY,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Compare what models change: their angles, sizes, spectra, subspaces, signs and, if asked for, intruders.

    ``signs`` counts how often they agree, over a sample of every tensor or over all entries
    (:func:`~merging.geometry.signs.sign_agreement`). ``intruders`` looks for
    intruder dimensions against the base, each of whose matrices is decomposed for it: seconds to minutes each for
    those of large models. ``full_spectra`` decomposes full changes of any size, not only of a short side of up to
    :data:`~merging.geometry.spectrum.SIDE`; factors always are. ``directions`` is how many leading directions of each
    change the overlap of subspaces is taken over. ``max_memory`` is in bytes, for inner products and signs; what is
    decomposed is held whole, one tensor at a time. ``options`` are those of
    :func:`~merging.geometry.alignment.align` (``base`` and others). Raises :class:`~merging.errors.MergingError`.
    """
    plan = align(models, reads_base=intruders, **options)
    if intruders and plan.base is None:
        raise OptionError("intruder dimensions are told against the base: give it with --base")
    where = torch.device(device)
    few = len(plan.models) <= OVERLAPPING
    wanted = WalkOptions(intruders, full_spectra, directions if few else 0)
    found = walk(plan, wanted, max_memory, where, progress)
    counted = count_signs(plan, signs, max_memory, where) if signs else None
    return Comparison(
        models=_profiles(plan, found),
        base=None if plan.base is None else str(plan.base.path),
        cosines=_matrix(normalised(found.total)[1]),
        layers=tuple(LayerNorms(each.number, each.norms, each.cosine) for each in found.layers),
        magnitudes=_magnitudes(found),
        overlaps=_overlaps(found, wanted.directions),
        signs=None if counted is None else Agreement(_matrix(counted.agreement), counted.entries, counted.total),
        intruders=tuple(_intruders(found.intruders[slot]) for slot in range(len(plan.models))) if intruders else (),
        notices=_notices(plan, found, few),
    )


def _matrix(values: Tensor) -> Matrix:
    return tuple(tuple(None if isnan(value) else value for value in row) for row in values.tolist())


def _profiles(plan: Plan, found: WalkResult) -> tuple[Profile, ...]:
    paths = [str(model.path) for model in plan.models]
    norms = found.total.diagonal().sqrt().tolist()
    changed = (torch.stack(found.norms) > 0).sum(0).tolist()
    profiles = []
    for slot, (name, model) in enumerate(zip(short_names(paths), plan.models, strict=True)):
        brought = [each for item in plan.items if (each := item.inputs[slot]) is not None]
        ranks = sorted({each.rank for each in brought if isinstance(each, Change) and each.rank})
        spectra = found.spectra[slot]
        profiles.append(
            Profile(
                name,
                paths[slot],
                "adapter" if isinstance(model, Adapter) else "checkpoint",
                changed[slot],
                tuple(ranks),
                norms[slot],
                len(spectra),
                _mean_spectrum(spectra) if spectra else None,
            )
        )
    return tuple(profiles)


def _mean_spectrum(spectra: Sequence[Spectrum]) -> Spectrum:
    length = min(_CURVE, max(len(each.curve) for each in spectra))
    curves = [(*each.curve[:length], *[1.0] * (length - len(each.curve))) for each in spectra if each.curve]
    return Spectrum(
        max(each.largest for each in spectra),
        fmean(each.effective for each in spectra),
        fmean(each.stable for each in spectra),
        fmean(each.energy90 for each in spectra),
        fmean(each.energy99 for each in spectra),
        tuple(map(fmean, zip(*curves, strict=True))),
    )


def _magnitudes(found: WalkResult) -> Magnitudes | None:
    shared = [norms[norms > 0] for norms in found.norms if int((norms > 0).sum()) > 1]
    if not shared:
        return None
    return Magnitudes(
        median(float(norms.max() / norms.min()) for norms in shared),
        fmean(float(norms.var(correction=0) / norms.mean() ** 2) for norms in shared),
        len(shared),
        fmean(found.columns) if found.columns else None,
        len(found.columns),
    )


def _overlaps(found: WalkResult, directions: int) -> Overlaps | None:
    pairs = found.overlapped.triu(1) > 0
    if not directions or not bool(pairs.any()):
        return None
    outputs, inputs = found.overlap / found.overlapped
    chance = (found.chance / found.overlapped)[:, pairs].mean(1)
    return Overlaps(_matrix(outputs), _matrix(inputs), directions, *chance.tolist())


def _intruders(by_tensor: dict[str, Intruders]) -> IntruderCount:
    each = list(by_tensor.values())
    firsts = [one.first for one in each if one.first is not None]
    return IntruderCount(
        sum(len(one.which) for one in each),
        len(each),
        len(firsts),
        LEADING,
        fmean(one.share for one in each) if each else 0.0,
        fmean(firsts) if firsts else None,
        by_tensor,
    )


def _notices(plan: Plan, found: WalkResult, few: bool) -> tuple[str, ...]:
    notices = [*plan.notices, *plan.matched[len(plan.models) :]]
    if found.undecomposed:
        notices.append(
            f"{found.undecomposed} full changes of matrices with a short side above {SIDE} are not in the spectra and "
            f"overlaps: --full-spectra decomposes them too"
        )
    if not few:
        notices.append(f"the overlap of subspaces is left out, as there are more than {OVERLAPPING} models")
    return tuple(notices)
