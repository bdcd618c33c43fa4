"""The table of all methods: a row a method or chain with parameters, and which laws hold for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = ["CHANGES", "LINES", "TABLE", "Row", "Tensors", "on_changes", "rows"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A method or chain with parameters, and what holds of it.

    ``alone`` are the parameters at which one model is returned as it is (None: there are none), of those that merge
    one at all (``least``). ``swapped`` are those of the merge of the models in reverse order, the same where nothing
    goes with a model; ``ordered``: the order matters. Of more than ``most`` models the first are merged.
    ``homogeneous``: scaled changes scale the result. ``on_changes``: it merges adapters without their base; ``dense``:
    full changes as it merges factors. ``gradients`` are the coefficients that have one.
    ``within`` is how well it knows its result in float32, where it makes nearly parallel directions orthogonal.
    """

    chain: str
    parameters: dict[str, Any]
    swapped: dict[str, Any]
    gradients: dict[str, Any]
    alone: dict[str, Any] | None = None
    homogeneous: bool = True
    on_changes: bool = True
    needs_base: bool = True
    idempotent: bool = True
    dense: bool = True
    ordered: bool = False
    least: int = 1
    most: int | None = None
    within: float = 1e-4

    def __str__(self) -> str:
        """The chain and the words among its parameters, as the name of a test."""
        return "-".join([self.chain, *(value for value in self.parameters.values() if isinstance(value, str))])


LINES = {"beta": 0.4, "tail": "depth"}
CHANGES = {"space": "changes"}
TABLE = [
    Row(
        "linear", {"weights": (0.3, 0.6)}, {"weights": (0.6, 0.3)}, {"weights": torch.tensor([0.3, 0.6])},
        alone={}, needs_base=False,
    ),
    Row(
        "task_arithmetic", {"weights": (1.0, -0.5), "scale": 0.7}, {"weights": (-0.5, 1.0), "scale": 0.7},
        {"scale": torch.tensor(0.7), "weights": torch.tensor([1.0, -0.5])}, alone={}, idempotent=False,
    ),
    Row(
        "slerp", {"t": 0.3}, {"t": 0.7}, {"t": torch.tensor(0.3)},
        homogeneous=False, on_changes=False, needs_base=False, least=2,
    ),
    Row(
        "ties", {"density": (0.5, 0.3), "weights": (1.0, 0.5)}, {"density": (0.3, 0.5), "weights": (0.5, 1.0)},
        {"scale": torch.tensor(0.7), "weights": torch.tensor([1.0, 0.5])}, alone={"density": 1.0}, idempotent=False,
    ),
    Row(
        "ties", {"scope": "tensor", "weights": (1.0, -0.5), "vote": "weighted", "normalize": False, "zero": "plus"},
        {"scope": "tensor", "weights": (-0.5, 1.0), "vote": "weighted", "normalize": False, "zero": "plus"},
        {"scale": torch.tensor(0.7)}, alone={"density": 1.0, "scope": "tensor"}, idempotent=False,
    ),
    Row(
        "pcb", {"ratio": 0.3, "weights": (1.0, 0.5)}, {"ratio": 0.3, "weights": (0.5, 1.0)},
        {"scale": torch.tensor(0.7), "weights": torch.tensor([1.0, 0.5])}, homogeneous=False, idempotent=False,
    ),
    Row(
        "pcb", {"variant": "vision", "ratio": 0.3, "weights": (1.0, 0.5), "scope": "tensor"},
        {"variant": "vision", "ratio": 0.3, "weights": (0.5, 1.0), "scope": "tensor"}, {},
        homogeneous=False, idempotent=False,
    ),
    Row(
        "pcb", {"variant": "es", "ratio": 0.3, "weights": (1.0, 0.5)},
        {"variant": "es", "ratio": 0.3, "weights": (0.5, 1.0)}, {}, idempotent=False,
    ),
    Row(
        "pcb", {"variant": "paper", "ratio": 0.3, "weights": (1.0, 0.5)},
        {"variant": "paper", "ratio": 0.3, "weights": (0.5, 1.0)}, {}, idempotent=False,
    ),
    Row(
        "magmax", {"weights": (1.0, -0.5)}, {"weights": (-0.5, 1.0)},
        {"scale": torch.tensor(0.7), "weights": torch.tensor([1.0, -0.5])}, alone={},
    ),
    Row(
        "consensus", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)},
        {"scale": torch.tensor(0.7), "weights": torch.tensor([1.0, 0.5])}, alone={"agree": 1}, idempotent=False,
    ),
    Row("opcm", {"alpha": 0.4}, {"alpha": 0.4}, {}, alone={}, idempotent=False, ordered=True),
    Row(
        "opcm", {"mode": "two_sided", "svd": "thin"}, {"mode": "two_sided", "svd": "thin"}, {},
        alone={}, idempotent=False, ordered=True,
    ),
    Row("do", {"steps": 0}, {"steps": 0}, {"scale": torch.tensor(0.7)}, alone={"steps": 0}),
    Row("do", {"steps": 10}, {"steps": 10}, {}, alone={}, dense=False),
    Row(
        "lines", LINES | {"weights": (1.0, 0.5)}, LINES | {"weights": (0.5, 1.0)},
        {"beta": torch.tensor(0.4), "alpha": torch.tensor(0.2)},
        alone={"alpha": 1.0, "beta": 0.0}, idempotent=False,
    ),
    Row(
        "lines+linear", LINES | {"weights": (1.0, 0.5)}, LINES | {"weights": (0.5, 1.0)},
        {"beta": torch.tensor(0.4), "alpha": torch.tensor(0.2)},
        alone={"alpha": 1.0, "beta": 0.0}, idempotent=False,
    ),
    Row(
        "lines+slerp", LINES | {"t": 0.3}, LINES | {"t": 0.7}, {"beta": torch.tensor(0.4), "alpha": torch.tensor(0.2)},
        homogeneous=False, on_changes=False, idempotent=False, least=2,
    ),
    Row(
        "dare", {"drop": (0.5, 0.3), "weights": (1.0, 0.5)}, {"drop": (0.3, 0.5), "weights": (0.5, 1.0)},
        {"scale": torch.tensor(0.7)}, alone={"drop": 0.0}, idempotent=False,
    ),
    Row(
        "decouple", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)},
        alone={}, idempotent=False,
    ),
    Row(
        "orthogonalize", {"weights": (1.0, 0.5), "steps": 10}, {"weights": (0.5, 1.0), "steps": 10},
        {"scale": torch.tensor(0.7)}, alone={}, idempotent=False, dense=False,
    ),
    Row(
        "dare+ties", {"drop": 0.5, "rescale": "l1", "weights": (1.0, 0.5)},
        {"drop": 0.5, "rescale": "l1", "weights": (0.5, 1.0)}, {}, alone={"drop": 0.0, "density": 1.0},
        idempotent=False,
    ),
    Row(
        "lines+ties", LINES | {"weights": (1.0, 0.5)}, LINES | {"weights": (0.5, 1.0)}, {},
        alone={"alpha": 1.0, "beta": 0.0, "density": 1.0}, idempotent=False,
    ),
    Row(
        "lines+pcb", LINES | {"weights": (1.0, 0.5)}, LINES | {"weights": (0.5, 1.0)}, {},
        homogeneous=False, idempotent=False,
    ),
    Row("passthrough", {}, {}, {"scale": torch.tensor(0.7)}, alone={}, needs_base=False, ordered=True, most=1),
    Row("varm", {}, {}, {"scale": torch.tensor(0.7)}, alone={}),
    Row(
        "geometric_median", {"weights": (1.0, 0.8)}, {"weights": (0.8, 1.0)}, {"scale": torch.tensor(0.7)}, alone={},
    ),
    Row("sce", {"density": 0.3}, {"density": 0.3}, {"scale": torch.tensor(0.7)}, alone={}),
    Row(
        "sce", {"density": 0.5, "select": "deltas"}, {"density": 0.5, "select": "deltas"}, {},
        alone={"density": 1.0, "select": "deltas"}, idempotent=False,
    ),
    Row("ram", {"epsilon": 0.2}, {"epsilon": 0.2}, {"scale": torch.tensor(0.7)},
        alone={"epsilon": 0.0}, idempotent=False),
    Row("ramplus_tl", {"epsilon": 0.5, "r": 0.5, "alpha": 2.0}, {"epsilon": 0.5, "r": 0.5, "alpha": 2.0},
        {"scale": torch.tensor(0.7)}, alone={"epsilon": 0.0}, idempotent=False),
    Row("nearswap", {"t": 0.3}, {"t": 0.3}, {},
        alone={"t": 1e9}, homogeneous=False, idempotent=False, ordered=True, most=1),
    Row("arcee_fusion", {}, {}, {}, homogeneous=False, on_changes=False, needs_base=False, ordered=True, least=2),
    Row(
        "nuslerp", {"weights": (0.3, 0.6)}, {"weights": (0.6, 0.3)}, {"weights": torch.tensor([0.3, 0.6])},
        homogeneous=False, on_changes=False, needs_base=False, least=2,
    ),
    Row(
        "nuslerp", {"weights": (0.3, 0.6), "axis": "columns"}, {"weights": (0.6, 0.3), "axis": "columns"}, {},
        homogeneous=False, on_changes=False, needs_base=False, least=2,
    ),
    Row("nuslerp", CHANGES | {"weights": (0.3, 0.6)}, CHANGES | {"weights": (0.6, 0.3)}, {}, least=2),
    Row(
        "nuslerp", CHANGES | {"weights": (0.3, 0.6), "axis": "rows"},
        CHANGES | {"weights": (0.6, 0.3), "axis": "rows"}, {"weights": torch.tensor([0.3, 0.6])}, least=2,
    ),
    Row(
        "multislerp", {"weights": (0.3, 0.6)}, {"weights": (0.6, 0.3)}, {"weights": torch.tensor([0.3, 0.6])},
        alone={}, homogeneous=False, on_changes=False, needs_base=False,
    ),
    Row("multislerp", CHANGES | {"weights": (0.3, 0.6), "normalize": False},
        CHANGES | {"weights": (0.6, 0.3), "normalize": False}, {}, alone=CHANGES, idempotent=False),
    Row(
        "karcher", {"weights": (0.3, 0.6)}, {"weights": (0.6, 0.3)}, {"weights": torch.tensor([0.3, 0.6])},
        alone={}, homogeneous=False, on_changes=False, needs_base=False,
    ),
    Row("karcher", CHANGES | {"weights": (0.3, 0.6)}, CHANGES | {"weights": (0.6, 0.3)}, {}, alone=CHANGES),
    Row("model_stock", {}, {}, {}, least=2),
    Row("model_stock", {"filter_wise": True}, {"filter_wise": True}, {}, least=2),
    Row("tsv", {}, {}, {"scale": torch.tensor(0.7)}, alone={}, idempotent=False),
    Row("iso_c", {}, {}, {"scale": torch.tensor(0.7)}, idempotent=False),
    Row("dc_merge", {"keep": 0.1}, {"keep": 0.1}, {"scale": torch.tensor(0.7)},
        alone={"scale": 1.0, "smooth": "none"}, idempotent=False),
    Row("dc_merge", {"smooth": "linear"}, {"smooth": "linear"}, {}, idempotent=False),
    Row("dop", {}, {}, {"scale": torch.tensor(0.7)}, alone={}, ordered=True),
    Row("train_difference", {}, {}, {"scale": torch.tensor(0.7)}, idempotent=True, ordered=True, least=2, most=2),
    Row(
        "cosine", {"alpha": 0.5, "variant": "b"}, {"alpha": 0.5, "variant": "b"}, {},
        homogeneous=False, on_changes=False, needs_base=False, ordered=True, least=2, most=2,
    ),
    Row("svc", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)},
        alone={}, idempotent=False),
    Row("pico", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {"norm": torch.tensor(0.7)},
        alone={}, idempotent=False),
    Row("ctm", {"max_rank": 99, "weights": (1.0, 0.5)}, {"max_rank": 99, "weights": (0.5, 1.0)},
        {"scale": torch.tensor(0.7)}, alone={"max_rank": 99}, idempotent=False),
    Row("ctm+ties", {"max_rank": 3, "density": 0.5}, {"max_rank": 3, "density": 0.5}, {}, idempotent=False),
    Row("larv", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)},
        alone={"strength": 0.0}, idempotent=False, on_changes=False, homogeneous=False),
    Row("clamp", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)}, alone={}),
    Row("star", {}, {}, {"scale": torch.tensor(0.7)}, alone={"eta": 1.0}, idempotent=False),
    Row("actmat", {}, {}, {"scale": torch.tensor(0.7)}, alone={}),
    Row("ace", {}, {}, {"scale": torch.tensor(0.7)}, alone={}),
    Row("ace", {"threshold": 0.01}, {"threshold": 0.01}, {"scale": torch.tensor(0.7)}, alone={"threshold": 0.01}),
    Row("iso_cts", {"common": 0.5}, {"common": 0.5}, {"scale": torch.tensor(0.7)}, idempotent=False, within=2e-2),
    Row("wudi", {}, {}, {"scale": torch.tensor(0.7)}, alone={}),
    Row("wudi", {"mode": "adam", "steps": 5}, {"mode": "adam", "steps": 5}, {},
        alone={"mode": "adam"}, idempotent=False),
    Row("svd", {"energy": 0.8, "weights": (1.0, -0.5)}, {"energy": 0.8, "weights": (-0.5, 1.0)},
        {"scale": torch.tensor(0.7)}, alone={"energy": 1.0}, idempotent=False),
    Row("della", {"density": 0.5, "epsilon": 0.3, "weights": (1.0, 0.5)},
        {"density": 0.5, "epsilon": 0.3, "weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)},
        alone={"density": 1.0, "epsilon": 0.0}, idempotent=False),
    Row("breadcrumbs", {"density": (0.5, 0.8), "gamma": 0.1}, {"density": (0.8, 0.5), "gamma": 0.1},
        {"scale": torch.tensor(0.7)}, alone={"density": 1.0}, idempotent=False),
    Row("knots", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)},
        alone={}, idempotent=False),
    Row("core", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)},
        alone={}, idempotent=False),
    Row("knots+ties", {"density": 0.5, "weights": (1.0, 0.5)}, {"density": 0.5, "weights": (0.5, 1.0)},
        {}, alone={"density": 1.0}, idempotent=False),
    Row("core+tsv", {}, {}, {}, alone={}, idempotent=False),
    Row("della+ties", {"della.density": 0.5, "rescale": "l1", "weights": (1.0, 0.5)},
        {"della.density": 0.5, "rescale": "l1", "weights": (0.5, 1.0)}, {},
        alone={"della.density": 1.0, "epsilon": 0.0, "ties.density": 1.0}, idempotent=False),
    Row("blocks", {"blocks": ("layers.0:0.5,layers.1:2", "*:0.25"), "weights": (1.0, 0.5)},
        {"blocks": ("*:0.25", "layers.0:0.5,layers.1:2"), "weights": (0.5, 1.0)}, {"scale": torch.tensor(0.7)},
        alone={}, idempotent=False),
    Row("lines+opcm", LINES, LINES, {}, alone={"lines.alpha": 1.0, "beta": 0.0}, idempotent=False, ordered=True),
    Row(
        "decouple+ties", {"weights": (1.0, 0.5)}, {"weights": (0.5, 1.0)}, {},
        alone={"density": 1.0}, idempotent=False,
    ),
    Row(
        "orthogonalize+lines+task_arithmetic", LINES | {"weights": (1.0, 0.5), "steps": 10},
        LINES | {"weights": (0.5, 1.0), "steps": 10}, {}, alone={"alpha": 1.0, "beta": 0.0},
        idempotent=False, dense=False,
    ),
]  # fmt: skip


rows = pytest.mark.parametrize("row", TABLE, ids=str)
on_changes = pytest.mark.parametrize("row", [row for row in TABLE if row.on_changes], ids=str)
