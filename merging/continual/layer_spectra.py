"""How the merged change of a store is spread over the layers of the model, and over directions within matrices."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import sqrt

from merging.display.tables import Displayed
from merging.maths.delta import LowRank
from merging.maths.layers import Stacks
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import factored_svd
from merging.maths.sums import safe_ratio
from merging.sources.adapter import Adapter
from merging.sources.changes import Change

__all__ = ["LayerSpectrum", "spectra"]

_POWERS = 30


@dataclass(frozen=True, slots=True, repr=False)
class LayerSpectrum(Displayed):
    """The merged change of one block of the model, or (None) of the tensors outside the blocks.

    It has the norm of the change, the share of the energy of its matrices in their leading directions, and their mean
    stable rank: the energy over the energy of the leading direction.
    """

    layer: int | None
    tensors: int
    norm: float
    leading: float
    stable_rank: float


def spectra(state: Adapter, names: list[str]) -> list[LayerSpectrum]:
    """Return the layers of a state in order; ``names`` are the base's tensors. One tensor is in memory at a time."""
    stacks = Stacks.from_names(names)
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for name, change in state.changes.items():
        layer = stacks.position(name).layer
        found[-1 if layer is None else layer].append(_energies(change))
    return [_layer(layer, found[layer]) for layer in sorted(found)]


def _layer(layer: int, energies: list[tuple[float, float]]) -> LayerSpectrum:
    total = sum(each for each, _ in energies)
    matrices = [(energy, first) for energy, first in energies if first]
    energy, leading = sum(each for each, _ in matrices), sum(first for _, first in matrices)
    ranks = [energy / first for energy, first in matrices]
    return LayerSpectrum(
        None if layer < 0 else layer,
        len(energies),
        sqrt(total),
        safe_ratio(leading, energy),
        safe_ratio(sum(ranks), len(ranks)),
    )


def _energies(change: Change) -> tuple[float, float]:
    """Return the squared norm of a change, and the square of its largest singular value (0 unless it is a matrix)."""
    delta = change.read(change.shape, _no_base, torch.float32)
    if isinstance(delta, LowRank):
        values = factored_svd(delta.up, delta.down)[1]
        return float(values.square().sum()), float(values[:1].square().sum())
    value = delta.dense()
    energy = float(value.double().square().sum())
    return energy, _largest(value) ** 2 if value.dim() == 2 and energy else 0.0


def _largest(matrix: Tensor) -> float:
    """Return the largest singular value to about one per cent, by power iterations from a fixed start."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(_POWERS):
        vector = matrix.mT @ (matrix @ (vector / vector.norm()))
    return float((matrix @ (vector / vector.norm())).norm())


def _no_base() -> Tensor:
    raise AssertionError("what is held needs no base")
