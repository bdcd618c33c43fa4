"""Adapters mixed while a model runs: one fused low-rank product a module, and few numbers that say how much of each.

For a module, ``y = W0 x + B diag(f(c)) A x`` with ``A [R, in]`` and ``B [out, R]`` the factors of all adapters one
below or beside the other, ``R`` the sum of their ranks, and each adapter's coefficient repeated over its rows (section
1.5 of the recycling study's recipe, arXiv 2602.12323).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from merging.maths.delta import LowRank
from merging.maths.layers import Stacks
from merging.recycling.experts import Expert
from merging.recycling.places import Beside, Place, attached
from merging.recycling.settings import Granularity

__all__ = ["Activation", "Layout", "Mixture", "concatenated"]

Activation = Literal["linear", "leaky", "softmax"]
"""What becomes of a coefficient: itself; a leaky ReLU of slope 0.01; its softmax over the adapters of its group."""

_SLOPE = 0.01
_ATTENTION = ("attn", "attention", "self_attention", "crossattention", "encdecattention", "selfattention")


class Layout:
    """Which coefficient each rank row of each adapter has in each module.

    ``rows[name]`` holds a position among the ``size`` coefficients for each of the module's concatenated rows;
    ``groups[p]`` tells the group (layer, module...) and ``experts[p]`` the adapter of coefficient ``p``.
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

    def activated(self, coefficients: Tensor, activation: Activation) -> Tensor:
        """f(c) of all coefficients, ``[size]``."""
        if activation == "leaky":
            return nn.functional.leaky_relu(coefficients, _SLOPE)
        if activation == "softmax":
            groups = self.groups.to(coefficients.device)
            powers = (coefficients - coefficients.detach().max()).exp()
            totals = powers.new_zeros(int(self.groups.max()) + 1).index_add(0, groups, powers)
            return powers / totals[groups]
        return coefficients


def _group(name: str, row: int, granularity: Granularity, stacks: Stacks) -> str:
    """What a coefficient belongs to beside its adapter."""
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
    """Some adapters beside a network, ready to run at any coefficients.

    The factors are held once, concatenated, in the network's type and on its device; the coefficients are float32, and
    gradients reach them alone.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        experts: Sequence[Expert],
        granularity: Granularity = "module",
        activation: Activation = "linear",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.places, self.experts, self.activation = places, tuple(experts), activation
        self.layout = Layout([expert.deltas for expert in experts], granularity)
        self.size = self.layout.size
        self._device = torch.device(device)
        self._rows = {name: rows.to(device) for name, rows in self.layout.rows.items()}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.layout.rows:
            down, up = concatenated(experts, name)
            self._factors[name] = down.to(device, dtype), up.to(device, dtype)

    def full(self, value: float) -> Tensor:
        """All coefficients at one value, float32 ``[size]``."""
        return torch.full((self.size,), value, dtype=torch.float32, device=self._device)

    def gates(self, coefficients: Tensor) -> dict[str, Tensor]:
        """f(c) of every row of every module, ``[R]`` each."""
        activated = self.layout.activated(coefficients.to(self._device), self.activation)
        return {name: activated[rows] for name, rows in self._rows.items()}

    @contextmanager
    def at(self, coefficients: Tensor) -> Iterator[None]:
        """Within the block the network is the mixture at these coefficients."""
        gates = self.gates(coefficients)
        with attached(
            self.places, {name: Beside(*self._factors[name], gates[name]) for name in gates if len(gates[name])}
        ):
            yield

    def deltas(self, coefficients: Tensor) -> dict[str, LowRank]:
        """The mixture as one low-rank change a module, of the full sum of ranks, float32 on the CPU.

        Made of the adapters' own factors, not of what they are rounded to while the model runs.
        """
        found = {}
        for name, gate in self.gates(coefficients.detach()).items():
            down, up = concatenated(self.experts, name)
            place = self.places[name]
            found[name] = LowRank(up * gate.cpu(), down, place.shape, place.transposed)
        return found


def concatenated(experts: Sequence[Expert], name: str) -> tuple[Tensor, Tensor]:
    """``A [R, in]`` and ``B [out, R]`` of all experts that change a module."""
    present = [expert.deltas[name] for expert in experts if name in expert.deltas]
    return torch.cat([delta.down for delta in present], 0), torch.cat([delta.up for delta in present], 1)
