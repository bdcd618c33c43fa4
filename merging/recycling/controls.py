"""Control adapters without any knowledge: the gain of a merge of them is not transfer.

Each control keeps one property of the original adapters and destroys the rest. So the rest of a gain shows its cause.
All draws depend on the seed and on the adapter's name alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import factored_svd, squared_norm
from merging.maths.sums import safe_ratio
from merging.recycling.pool_adapters import Expert
from merging.recycling.seeds import generator, order

__all__ = ["CONTROLS", "Control", "random_norms", "random_spectra", "shuffle_modules"]


@dataclass(frozen=True, slots=True)
class Control:
    """A kind of control: the title of its row, the function that makes its adapters, and a description."""

    title: str
    make: Callable[[Expert, int], Expert]
    stand_in: str


def random_norms(expert: Expert, seed: int) -> Expert:
    """Return Gaussian factors of the same ranks, with the norm of each module's change kept."""
    deltas = {}
    for name, delta in expert.deltas.items():
        random = generator(seed, "norms", expert.name, name)
        up = torch.randn(delta.up.shape, generator=random)
        noise = LowRank(up, torch.randn(delta.down.shape, generator=random), delta.shape, delta.transposed)
        factor = safe_ratio(float(squared_norm(delta)) ** 0.5, float(squared_norm(noise)) ** 0.5)
        deltas[name] = noise.scaled(factor)
    return replace(expert, deltas=deltas)


def random_spectra(expert: Expert, seed: int) -> Expert:
    """Return changes of the same singular values, with singular vectors drawn uniformly (Haar measure)."""
    deltas = {}
    for name, delta in expert.deltas.items():
        random = generator(seed, "spectra", expert.name, name)
        values = factored_svd(delta.up, delta.down)[1].float()
        up = _orthonormal(delta.up.shape[0], len(values), random) * values
        down = _orthonormal(delta.down.shape[1], len(values), random).mT
        deltas[name] = LowRank(up, down.contiguous(), delta.shape, delta.transposed)
    return replace(expert, deltas=deltas)


def shuffle_modules(expert: Expert, seed: int) -> Expert:
    """Move every change to another module of equal shape. A change without such a module gets its inputs shuffled."""
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, delta in sorted(expert.deltas.items()):
        alike[(delta.shape, delta.transposed)].append(name)
    deltas: dict[str, LowRank] = {}
    for shape, names in alike.items():
        if len(names) == 1:
            deltas[names[0]] = _shuffle_inputs(expert.deltas[names[0]], seed, expert.name, names[0])
            continue
        mixed = [names[i] for i in order(len(names), seed, "shuffled", expert.name, shape)]
        # A cycle through a random order leaves nothing in its place.
        deltas |= {to: expert.deltas[of] for of, to in zip(mixed, mixed[1:] + mixed[:1], strict=True)}
    return replace(expert, deltas={name: deltas[name] for name in expert.deltas})


def _shuffle_inputs(delta: LowRank, seed: int, *purpose: object) -> LowRank:
    mixed = order(delta.down.shape[1], seed, "shuffled", *purpose)
    return LowRank(delta.up, delta.down[:, mixed], delta.shape, delta.transposed)


def _orthonormal(size: int, count: int, random: torch.Generator) -> Tensor:
    """Return orthonormal columns ``[size, count]``, drawn uniformly."""
    q, r = torch.linalg.qr(torch.randn(size, count, generator=random))
    uniform: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # else the signs that QR chooses would show
    return uniform


CONTROLS: Mapping[str, Control] = {
    "norms": Control("random, same norms", random_norms, "random numbers of the same norms"),
    "spectra": Control("random, same spectra", random_spectra, "random directions with the same singular values"),
    "shuffled": Control("modules shuffled", shuffle_modules, "the same changes on the wrong modules"),
}
"""The controls of every report, by short names."""
