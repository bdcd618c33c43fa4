"""Where low-rank changes act while a model runs: at its linear layers and embeddings, beside what these compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

__all__ = ["Beside", "Place", "attached", "places_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A module whose weight can be changed: ``shape`` is that weight's, ``[in, out]`` where ``transposed``."""

    module: nn.Module
    kind: Literal["linear", "embedding"]
    shape: tuple[int, int]
    transposed: bool

    @property
    def outputs(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def weight(self) -> Tensor:
        """The base's weight, ``[*shape]``."""
        weight: Tensor = self.module.get_parameter("weight")
        return weight


def places_of(network: nn.Module) -> dict[str, Place]:
    """All places of a network by the names of their weights: linear layers, GPT-2's Conv1D, embeddings."""
    found = {}
    for name, module in network.named_modules():
        sizes: Any = module
        if isinstance(module, nn.Embedding):
            place = Place(module, "embedding", (sizes.num_embeddings, sizes.embedding_dim), True)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            place = Place(module, "linear", (sizes.nx, sizes.nf), True)
        elif hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight"):
            place = Place(module, "linear", (sizes.out_features, sizes.in_features), False)
        else:
            continue
        found[f"{name}.weight"] = place
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """A change ``up @ diag(gate) @ down`` that is computed beside a module: two thin products, never a matrix.

    ``down`` is ``[r, in]``, ``up`` ``[out, r]``, ``gate`` ``[r]``, which gradients reach.
    """

    down: Tensor
    up: Tensor
    gate: Tensor

    def __call__(self, place: Place, given: Tensor) -> Tensor:
        """What the change adds to the output of a module that is given ``[..., in]``, or ``[...]`` tokens."""
        if place.kind == "embedding":
            inside = nn.functional.embedding(given, self.down.mT)
            scale = getattr(place.module, "embed_scale", 1.0)  # Gemma's embeddings come out scaled, adapted or not
        else:
            inside, scale = nn.functional.linear(given.to(self.down.dtype), self.down), 1.0
        added: Tensor = nn.functional.linear(inside * self.gate.to(inside.dtype), self.up) * scale
        return added


@contextmanager
def attached(places: Mapping[str, Place], changes: Mapping[str, Beside]) -> Iterator[None]:
    """Within the block the network computes with these changes; a gate of zeros gives the base bit for bit."""

    def hook(place: Place, change: Beside) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + change(place, given[0]).to(out.dtype)

        return add

    handles = [places[name].module.register_forward_hook(hook(places[name], each)) for name, each in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
