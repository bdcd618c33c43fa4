"""Low-rank changes of a running model: hooks on its linear layers and embeddings add them to the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from merging.maths.lazy_torch import Tensor

__all__ = ["HookPoint", "LowRankBranch", "attach_branches", "find_hook_points"]


@dataclass(frozen=True, slots=True, eq=False)
class HookPoint:
    """A module whose weight can be changed.

    ``shape`` is the shape of the weight: ``[out, in]``, or ``[in, out]`` where ``transposed``.
    """

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


def find_hook_points(network: nn.Module) -> dict[str, HookPoint]:
    """Find all hook points of a network by the names of their weights: linear layers, GPT-2's Conv1D, embeddings."""
    found = {}
    for name, module in network.named_modules():
        sizes: Any = module
        if isinstance(module, nn.Embedding):
            point = HookPoint(module, "embedding", (sizes.num_embeddings, sizes.embedding_dim), True)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            point = HookPoint(module, "linear", (sizes.nx, sizes.nf), True)
        elif hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight"):
            point = HookPoint(module, "linear", (sizes.out_features, sizes.in_features), False)
        else:
            continue
        found[f"{name}.weight"] = point
    return found


@dataclass(frozen=True, slots=True, eq=False)
class LowRankBranch:
    """A change ``up @ diag(gate) @ down``, computed in parallel to a module as two thin products.

    ``down`` is ``[r, in]``, ``up`` is ``[out, r]``, and ``gate`` is ``[r]``. Gradients flow to the gate.
    """

    down: Tensor
    up: Tensor
    gate: Tensor

    def __call__(self, point: HookPoint, given: Tensor) -> Tensor:
        """Return the change's part of the module's output for inputs ``[..., in]``, or for tokens ``[...]``."""
        if point.kind == "embedding":
            inside = nn.functional.embedding(given, self.down.mT)
            scale = getattr(point.module, "embed_scale", 1.0)  # Gemma's embeddings come out scaled, adapted or not
        else:
            inside, scale = nn.functional.linear(given.to(self.down.dtype), self.down), 1.0
        added: Tensor = nn.functional.linear(inside * self.gate.to(inside.dtype), self.up) * scale
        return added


@contextmanager
def attach_branches(hook_points: Mapping[str, HookPoint], changes: Mapping[str, LowRankBranch]) -> Iterator[None]:
    """Add these changes to the network within the block. A gate of zeros gives the base bit for bit."""

    def hook(point: HookPoint, change: LowRankBranch) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + change(point, given[0]).to(out.dtype)

        return add

    handles = [
        hook_points[name].module.register_forward_hook(hook(hook_points[name], each)) for name, each in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
