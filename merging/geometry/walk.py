"""One walk over the tensors that models change, which computes all figures of a comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from merging.display.progress import Progress
from merging.display.tables import Displayed
from merging.engine.tiles import Tiler
from merging.geometry.alignment import read_change
from merging.geometry.grams import module_grams
from merging.geometry.spectrum import (
    Spectrum,
    decomposable,
    directions,
    overlaps,
    singular_values,
    spectrum_of,
)
from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.intruders import Intruders, intruders
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import decompose
from merging.methods.decouple import column_norms
from merging.methods.families.spherical import cosines as normalised
from merging.plan import Item, Plan
from merging.sources.changes import Change

__all__ = ["LEADING", "OVERLAPPING", "LayerNorms", "WalkOptions", "WalkResult", "walk"]

OVERLAPPING = 64
"""The most models whose subspaces are compared, since the bases of all are held at once."""

LEADING = 10
"""The number of leading singular vectors that may be intruders."""


@dataclass(frozen=True, slots=True)
class WalkOptions:
    """The figures to compute.

    Attributes:
        intruders: Whether to look for intruder dimensions.
        full_spectra: Whether to decompose full changes of any size.
        directions: The leading directions whose subspaces are compared; 0 for none.
    """

    intruders: bool
    full_spectra: bool
    directions: int


@dataclass(frozen=True, slots=True, repr=False)
class LayerNorms(Displayed):
    """One block of the model.

    Attributes:
        layer: The block's number; None for all tensors outside the blocks.
        norms: Each model's Frobenius norm there.
        cosine: The mean cosine of all pairs of models that change the block; None without a pair.
    """

    layer: int | None
    norms: tuple[float, ...]
    cosine: float | None


@dataclass(slots=True)
class WalkResult:
    """The results of a walk over ``n`` models, in their order.

    Attributes:
        total: Inner products over all tensors, ``[n, n]`` float64.
        overlap: Sums of the overlaps of outputs and of inputs, ``[2, n, n]``.
        chance: The same sums for random subspaces, ``[2, n, n]``.
        overlapped: The number of tensors in these sums, ``[n, n]``.
        layers: The norms by block.
        norms: The norms of every tensor, ``[n]`` each.
        columns: The relative variance of the norms of columns, one a tensor.
        spectra: The spectra of each model's matrices.
        undecomposed: The number of changes that were too large to be decomposed.
        intruders: The intruder dimensions by model and tensor.
    """

    total: Tensor
    overlap: Tensor
    chance: Tensor
    overlapped: Tensor
    layers: list[LayerNorms] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    columns: list[float] = field(default_factory=list)
    spectra: defaultdict[int, list[Spectrum]] = field(default_factory=lambda: defaultdict(list))
    undecomposed: int = 0
    intruders: defaultdict[int, dict[str, Intruders]] = field(default_factory=lambda: defaultdict(dict))


def walk(
    plan: Plan, wanted: WalkOptions, max_memory: int, device: torch.device, progress: Progress | None = None
) -> WalkResult:
    """Walk over an aligned plan layer by layer, and return the figures that ``wanted`` asks for.

    ``max_memory`` is in bytes. ``progress`` receives the bytes read so far and in total.
    """
    count = len(plan.models)
    square = torch.zeros(count, count, dtype=torch.float64)
    found = WalkResult(square, torch.stack([square, square]), torch.stack([square, square]), square.clone())
    layer, of_layer = plan.items[0].site.position.layer, square.clone()
    tiler = Tiler(plan, device)
    done, whole = 0, plan.read_bytes
    for item, products in module_grams(plan, max_memory, device):
        if item.site.position.layer != layer:
            found.layers.append(_layer_norms(layer, of_layer))
            layer, of_layer = item.site.position.layer, square.clone()
        of_layer += products
        found.total = found.total + products
        found.norms.append(products.diagonal().sqrt())
        _measure_changes(tiler, item, wanted, found)
        done += item.read_bytes
        if progress:
            progress(done, whole)
    found.layers.append(_layer_norms(layer, of_layer))
    return found


def _layer_norms(number: int | None, products: Tensor) -> LayerNorms:
    norms, angles = normalised(products)
    touched = norms > 0
    pairs = (touched[:, None] & touched).triu(1)
    cosine = float(angles[pairs].mean()) if bool(pairs.any()) else None
    return LayerNorms(number, tuple(norms.tolist()), cosine)


def _measure_changes(tiler: Tiler, item: Item, wanted: WalkOptions, found: WalkResult) -> None:
    """Add the spectra, columns, subspaces and intruders of each change of one tensor. Each change is read once.

    Zero changes have none of these.
    """
    base = _base(tiler, item) if wanted.intruders and item.site.kind == "matrix" else None
    site = replace(item.site, axis=1)
    columns: list[Tensor] = []
    bases: list[tuple[Tensor, Tensor] | None] = [None] * len(item.inputs)
    for slot, each in enumerate(item.inputs):
        if each is None or not float(found.norms[-1][slot]):
            continue
        deep = decomposable(tiler.plan, item, slot, wanted.full_spectra)
        found.undecomposed += item.site.kind == "matrix" and not deep
        if not deep and base is None and not isinstance(each, Change):
            continue
        delta = _upright(read_change(tiler, item, slot), item)
        if item.site.kind in ("matrix", "embedding", "experts"):
            columns.append(column_norms(delta, site).cpu())
        if deep:
            found.spectra[slot].append(spectrum_of(singular_values(delta)))
        if deep and wanted.directions and item.site.kind != "experts":
            bases[slot] = directions(delta, wanted.directions)
        if base is not None:
            weight, svd = base
            found.intruders[slot][item.site.name] = intruders(svd, delta, weight, k=LEADING)
    if len(columns) > 1:
        found.columns.append(_relative_variance(torch.stack(columns)))
    if wanted.directions:
        _add_overlaps(bases, found)


def _base(tiler: Tiler, item: Item) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the base's matrix, ``[out, in]`` float64, and its SVD."""
    assert item.base is not None
    weight = item.base.read().to(tiler.device, torch.float64)
    weight = weight.mT if item.site.axis == 0 else weight
    return weight, decompose(weight)


def _upright(delta: Delta, item: Item) -> Delta:
    """Return a change as ``[out, in]``; factors in the order in which they are multiplied."""
    turned = item.site.axis == 0
    if isinstance(delta, LowRank):
        return delta.oriented(turned)
    return Dense(delta.value.mT) if turned else delta


def _relative_variance(norms: Tensor) -> float:
    """Return the variance over models, ``[n, ...]``, relative to the squared mean; the mean over changed columns."""
    mean = norms.mean(0)
    changed = mean > 0
    if not bool(changed.any()):
        return 0.0
    return float((norms.var(0, correction=0)[changed] / mean[changed].square()).mean())


def _add_overlaps(bases: Sequence[tuple[Tensor, Tensor] | None], found: WalkResult) -> None:
    sizes = torch.tensor([0 if each is None else len(each[0]) for each in bases], dtype=torch.float64)
    both = (sizes[:, None] > 0) & (sizes > 0)
    larger = torch.maximum(sizes[:, None], sizes)
    for side in (0, 1):
        of_side = [None if each is None else each[side] for each in bases]
        width = next((each.shape[1] for each in of_side if each is not None), 1)
        found.overlap[side] += torch.where(both, overlaps(of_side), 0.0)
        found.chance[side] += torch.where(both, larger / width, 0.0)
    found.overlapped += both
