"""The function that compares models: one walk over their tensors gives all figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from statistics import fmean, median
from typing import Literal

from typing_extensions import Unpack

from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.engine.devices import supply_operations
from merging.engine.resources import pick_device
from merging.errors import OptionError, option
from merging.geometry.alignment import MEMORY, AlignOptions, ModelLike, align
from merging.geometry.comparison import (
    Agreement,
    Comparison,
    IntruderCount,
    Magnitudes,
    Matrix,
    Overlaps,
    Profile,
)
from merging.geometry.signs import count_signs
from merging.geometry.spectrum import SIDE, Spectrum
from merging.geometry.walk import LEADING, OVERLAPPING, WalkOptions, WalkResult, walk
from merging.maths.intruders import Intruders
from merging.maths.lazy_torch import Tensor, torch
from merging.methods.families.spherical import cosines as normalised
from merging.plan import Plan
from merging.plan.sizes import parse_size
from merging.report.short_names import short_names
from merging.sources import Adapter
from merging.sources.changes import Change
from merging.type_checks import check_types

__all__ = ["compare"]

_CURVE = 64
"""The most points of a curve of energy."""


@check_types("max_memory", "progress")
def compare(
    models: Sequence[ModelLike],
    *,
    signs: Literal["sample", "all"] | None = "sample",
    intruders: bool = False,
    full_spectra: bool = False,
    directions: int = 16,
    max_memory: int | str = MEMORY,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
    **options: Unpack[AlignOptions],
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
        max_memory: The memory for inner products and signs, in bytes or as ``"500MB"``. A decomposed tensor is held
            whole, one at a time.
        device: The device that computes.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        **options: Options of :func:`~merging.geometry.alignment.align`, such as ``base``.

    Returns:
        The comparison.

    Raises:
        merging.errors.MergingError: For models that cannot be read or do not fit together, and for wrong options.

    Example:
        >>> import merging
        >>> comparison = merging.compare(["a", "b", "c"])
        >>> [profile.name for profile in comparison.models]
        ['a', 'b', 'c']
        >>> f"{comparison.cosines[0][1]:.2f}"
        '0.03'
    """
    progress = resolve_progress(progress, "comparing")
    if signs not in ("sample", "all", None):
        raise OptionError(f"signs = {signs!r}: use 'sample', 'all' or None")
    plan = align(models, reads_base=intruders, **options)
    if intruders and plan.base is None:
        raise OptionError(f"intruder dimensions are compared with the base: give it with {option('base')}")
    where = pick_device(device)
    few = len(plan.models) <= OVERLAPPING
    wanted = WalkOptions(intruders, full_spectra, directions if few else 0)
    room = parse_size(max_memory, "max_memory")
    with supply_operations(where):
        found = walk(plan, wanted, room, where, progress)
        counted = count_signs(plan, signs, room, where) if signs else None
    notices = _notices(plan, found, few)
    report_notices(notices)
    return Comparison(
        models=_profiles(plan, found),
        base=None if plan.base is None else str(plan.base.path),
        cosines=_matrix(normalised(found.total)[1]),
        layers=tuple(found.layers),
        magnitudes=_magnitudes(found),
        overlaps=_overlaps(found, wanted.directions),
        signs=None if counted is None else Agreement(_matrix(counted.agreement), counted.entries, counted.total),
        intruders=tuple(_intruders(found.intruders[slot]) for slot in range(len(plan.models))) if intruders else (),
        notices=notices,
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
            f"overlaps: {option('full_spectra', True)} decomposes them too"
        )
    if not few:
        notices.append(f"the overlap of subspaces is left out, as there are more than {OVERLAPPING} models")
    return tuple(notices)
