"""The comparison of models, computed in one walk over their tensors."""

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
from merging.geometry.walk import LEADING, OVERLAPPING, LayerNorms, WalkOptions, WalkResult, walk
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
"""The most points of a curve of energy."""

Matrix = tuple[tuple[float | None, ...], ...]
"""One row a model; None where a value is not defined."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One model.

    Attributes:
        name: A short name, distinct among the models.
        path: The model's path or address.
        kind: ``"adapter"`` or ``"checkpoint"``.
        tensors: The number of tensors that it changes.
        ranks: The ranks of its factors, ascending.
        norm: The Frobenius norm of its whole change.
        matrices: The number of its changes that were decomposed.
        spectrum: The mean spectrum of these changes.
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
        """The rank, the range of ranks, or ``full``."""
        return "full" if not self.ranks else "-".join(map(str, dict.fromkeys((self.ranks[0], self.ranks[-1]))))


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """Differences in size between models' changes, which DO-Merging (arXiv 2505.15875) corrects.

    Attributes:
        ratio: The largest norm of a tensor's changes divided by the smallest, in the median of the tensors.
        variance: The variance of the norms relative to their squared mean, in the mean of the tensors.
        tensors: The number of tensors that several models change.
        columns: The same variance for the norms of single columns (one an input feature).
        modules: The number of tensors in ``columns``: their changes are factors, or small enough to decompose.
    """

    ratio: float
    variance: float
    tensors: int
    columns: float | None
    modules: int


@dataclass(frozen=True, slots=True)
class Overlaps:
    """The overlap of the models' leading subspaces, in the mean over the tensors.

    Attributes:
        outputs: The overlap of the subspaces of outputs.
        inputs: The overlap of the subspaces of inputs.
        directions: The most directions of a subspace.
        chance_outputs: The overlap of random subspaces of the same sizes, for outputs.
        chance_inputs: The same for inputs.
    """

    outputs: Matrix
    inputs: Matrix
    directions: int
    chance_outputs: float
    chance_inputs: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of signs: the share of entries changed in the same direction, among those that both models change.

    ``entries`` of ``total`` were sampled.
    """

    matrix: Matrix
    entries: int
    total: int


@dataclass(frozen=True, slots=True)
class IntruderCount:
    """One model's intruder dimensions.

    Attributes:
        count: The number of intruders in all matrices.
        matrices: The number of changed matrices.
        touched: The number of matrices with an intruder.
        directions: The number of leading singular vectors that were tested in each matrix.
        share: The intruders' mean share of a matrix's energy.
        first: The mean rank of the first intruder, from 1.
        by_tensor: The results by tensor.
    """

    count: int
    matrices: int
    touched: int
    directions: int
    share: float
    first: float | None
    by_tensor: dict[str, Intruders]

    def below(self, threshold: float) -> int:
        """Return the number of intruders at another threshold of similarity (the default is a half)."""
        return sum(each.below(threshold) for each in self.by_tensor.values())


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of models. All matrices are in the order of ``models``."""

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
        """Return all pairs of models as (cosine, row, column), the largest cosine first."""
        rows = range(len(self.models))
        pairs = [(self.cosines[i][j] or 0.0, i, j) for i in rows for j in rows[i + 1 :]]
        return sorted(pairs, key=lambda pair: -pair[0])

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
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
    """Compare the changes of models: angles, sizes, spectra, subspaces, signs and, on request, intruder dimensions.

    Args:
        models: The models: paths, addresses, or opened models.
        signs: Whether the agreement of signs is counted over a sample of every tensor or over all entries
            (:func:`~merging.geometry.signs.sign_agreement`); None for neither.
        intruders: Whether to look for intruder dimensions. This needs the base, and decomposes each of its matrices:
            seconds to minutes each for large models.
        full_spectra: Whether to decompose full changes of any size. By default the shorter side is at most
            :data:`~merging.geometry.spectrum.SIDE`. Factors are always decomposed.
        directions: The number of leading directions of each change in the overlap of subspaces.
        max_memory: Bytes for inner products and signs. A decomposed tensor is held whole, one at a time.
        device: The device that computes.
        progress: Receives the bytes read so far and in total.
        **options: Options of :func:`~merging.geometry.alignment.align`, such as ``base``.

    Returns:
        The comparison.

    Raises:
        merging.errors.MergingError: For models that cannot be read or do not fit together, and for wrong options.
    """
    plan = align(models, reads_base=intruders, **options)
    if intruders and plan.base is None:
        raise OptionError("intruder dimensions are compared with the base: give it with --base")
    where = torch.device(device)
    few = len(plan.models) <= OVERLAPPING
    wanted = WalkOptions(intruders, full_spectra, directions if few else 0)
    found = walk(plan, wanted, max_memory, where, progress)
    counted = count_signs(plan, signs, max_memory, where) if signs else None
    return Comparison(
        models=_profiles(plan, found),
        base=None if plan.base is None else str(plan.base.path),
        cosines=_matrix(normalised(found.total)[1]),
        layers=tuple(found.layers),
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
        changes = [item.inputs[slot] for item in plan.items]
        ranks = sorted({each.rank for each in changes if isinstance(each, Change) and each.rank})
        spectra = found.spectra[slot]
        profiles.append(
            Profile(
                name=name,
                path=paths[slot],
                kind="adapter" if isinstance(model, Adapter) else "checkpoint",
                tensors=changed[slot],
                ranks=tuple(ranks),
                norm=norms[slot],
                matrices=len(spectra),
                spectrum=_mean_spectrum(spectra) if spectra else None,
            )
        )
    return tuple(profiles)


def _mean_spectrum(spectra: Sequence[Spectrum]) -> Spectrum:
    length = min(_CURVE, max(len(each.curve) for each in spectra))
    curves = [(*each.curve[:length], *[1.0] * (length - len(each.curve))) for each in spectra if each.curve]
    return Spectrum(
        largest=max(each.largest for each in spectra),
        effective=fmean(each.effective for each in spectra),
        stable=fmean(each.stable for each in spectra),
        energy90=fmean(each.energy90 for each in spectra),
        energy99=fmean(each.energy99 for each in spectra),
        curve=tuple(map(fmean, zip(*curves, strict=True))),
    )


def _magnitudes(found: WalkResult) -> Magnitudes | None:
    shared = [norms[norms > 0] for norms in found.norms if int((norms > 0).sum()) > 1]
    if not shared:
        return None
    return Magnitudes(
        ratio=median(float(norms.max() / norms.min()) for norms in shared),
        variance=fmean(float(norms.var(correction=0) / norms.mean() ** 2) for norms in shared),
        tensors=len(shared),
        columns=fmean(found.columns) if found.columns else None,
        modules=len(found.columns),
    )


def _overlaps(found: WalkResult, directions: int) -> Overlaps | None:
    pairs = found.overlapped.triu(1) > 0
    if not directions or not bool(pairs.any()):
        return None
    outputs, inputs = found.overlap / found.overlapped
    chance_outputs, chance_inputs = (found.chance / found.overlapped)[:, pairs].mean(1).tolist()
    return Overlaps(
        outputs=_matrix(outputs),
        inputs=_matrix(inputs),
        directions=directions,
        chance_outputs=chance_outputs,
        chance_inputs=chance_inputs,
    )


def _intruders(by_tensor: dict[str, Intruders]) -> IntruderCount:
    found = by_tensor.values()
    firsts = [each.first for each in found if each.first is not None]
    return IntruderCount(
        count=sum(len(each.which) for each in found),
        matrices=len(found),
        touched=len(firsts),
        directions=LEADING,
        share=fmean(each.share for each in found) if found else 0.0,
        first=fmean(firsts) if firsts else None,
        by_tensor=by_tensor,
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
