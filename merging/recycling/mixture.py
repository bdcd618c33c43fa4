"""Adapters mixed while a model runs: one fused low-rank product a module, with few coefficients.

For a module, ``y = W0 x + B diag(f(c)) A x``. ``A [R, in]`` and ``B [out, R]`` are the concatenated factors of all
adapters, ``R`` is the sum of their ranks, and each adapter's coefficient is repeated over its rows (section 1.5 of the
recycling study's recipe, arXiv 2602.12323).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from merging.maths.delta import LowRank
from merging.maths.layers import Stacks
from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.hooks import HookPoint, LowRankBranch, attach_branches
from merging.recycling.pool_adapters import Expert
from merging.recycling.settings import Granularity

__all__ = ["Activation", "CoefficientLayout", "Mixture", "concatenate_factors"]

Activation = Literal["linear", "leaky", "softmax"]
"""The function of a coefficient: identity; leaky ReLU of slope 0.01; softmax over the adapters of its group."""

_SLOPE = 0.01
_ATTENTION = ("attn", "attention", "self_attention", "crossattention", "encdecattention", "selfattention")


class CoefficientLayout:
    """The assignment of coefficients to the rank rows of adapters.

    Attributes:
        rows: For each module, the position of every concatenated row's coefficient.
        size: The number of coefficients.
        experts: The adapter of each coefficient, ``[size]``.
        groups: The group (layer, module...) of each coefficient, ``[size]``.
        names: The name of each coefficient's group.
    """

    def __init__(self, experts: Sequence[Mapping[str, LowRank]], granularity: Granularity) -> None:
        self.granularity = granularity
        names = list(dict.fromkeys(name for deltas in experts for name in deltas))
        stacks = Stacks.from_names(names, complete=False)
        positions: dict[tuple[int, str], int] = {}
        self.rows: dict[str, Tensor] = {}
        for name in names:
            rows: list[int] = []
            for number, deltas in enumerate(experts):
                for row in range(deltas[name].rank if name in deltas else 0):
                    group = _group(name, row, granularity, stacks)
                    rows.append(positions.setdefault((number, group), len(positions)))
            self.rows[name] = torch.tensor(rows, dtype=torch.long)
        self.size = len(positions)
        self.experts = torch.tensor([number for number, _ in positions], dtype=torch.long)
        self.names = [group for _, group in positions]
        numbered = {group: number for number, group in enumerate(dict.fromkeys(self.names))}
        self.groups = torch.tensor([numbered[group] for group in self.names], dtype=torch.long)

    def activate(self, coefficients: Tensor, activation: Activation) -> Tensor:
        """Return f(c) of all coefficients, ``[size]``."""
        if activation == "leaky":
            return nn.functional.leaky_relu(coefficients, _SLOPE)
        if activation == "softmax":
            groups = self.groups.to(coefficients.device)
            powers = (coefficients - coefficients.detach().max()).exp()
            totals = powers.new_zeros(int(self.groups.max()) + 1).index_add(0, groups, powers)
            return powers / totals[groups]
        return coefficients


def _group(name: str, row: int, granularity: Granularity, stacks: Stacks) -> str:
    """Return the group of a rank row's coefficient."""
    if granularity == "expert":
        return ""
    if granularity in ("module", "rank"):
        module = name.removesuffix(".weight")
        return module if granularity == "module" else f"{module}[{row}]"
    position = stacks.position(name)
    layer = f"{position.stack}{position.layer}" if position.layer is not None else name.removesuffix(".weight")
    if granularity == "layer" or position.layer is None:
        return layer
    inside = any(word in part.lower() for part in name.split(".") for word in _ATTENTION)
    return f"{layer} {'attention' if inside else 'mlp'}"


class Mixture:
    """Adapters on a network, ready to run at any coefficients.

    The factors are held once, concatenated, in the network's dtype and on its device. The coefficients are float32, and
    only they receive gradients.
    """

    def __init__(
        self,
        hook_points: Mapping[str, HookPoint],
        experts: Sequence[Expert],
        granularity: Granularity = "module",
        activation: Activation = "linear",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.hook_points, self.experts, self.activation = hook_points, tuple(experts), activation
        self.layout = CoefficientLayout([expert.deltas for expert in experts], granularity)
        self.size = self.layout.size
        self._device = torch.device(device)
        self._rows = {name: rows.to(device) for name, rows in self.layout.rows.items()}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.layout.rows:
            down, up = concatenate_factors(experts, name)
            self._factors[name] = down.to(device, dtype), up.to(device, dtype)

    def full(self, value: float) -> Tensor:
        """Return all coefficients at one value, float32 ``[size]``."""
        return torch.full((self.size,), value, dtype=torch.float32, device=self._device)

    def gates(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return f(c) for every row of every module, ``[R]`` each."""
        activated = self.layout.activate(coefficients.to(self._device), self.activation)
        return {name: activated[rows] for name, rows in self._rows.items()}

    @contextmanager
    def at(self, coefficients: Tensor) -> Iterator[None]:
        """Make the network the mixture at these coefficients within the block."""
        gates = self.gates(coefficients)
        branches = {name: LowRankBranch(*self._factors[name], gate) for name, gate in gates.items() if len(gate)}
        with attach_branches(self.hook_points, branches):
            yield

    def deltas(self, coefficients: Tensor) -> dict[str, LowRank]:
        """Return the mixture as one low-rank change a module, of the full sum of ranks, float32 on the CPU.

        It is made of the adapters' own factors, not of their rounded copies on the network.
        """
        found = {}
        for name, gate in self.gates(coefficients.detach()).items():
            down, up = concatenate_factors(self.experts, name)
            point = self.hook_points[name]
            found[name] = LowRank(up * gate.cpu(), down, point.shape, point.transposed)
        return found


def concatenate_factors(experts: Sequence[Expert], name: str) -> tuple[Tensor, Tensor]:
    """Return ``A [R, in]`` and ``B [out, R]`` of all experts that change a module."""
    present = [expert.deltas[name] for expert in experts if name in expert.deltas]
    return torch.cat([delta.down for delta in present], 0), torch.cat([delta.up for delta in present], 1)
