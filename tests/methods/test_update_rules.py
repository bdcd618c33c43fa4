"""A merge that is continued model by model is the merge of all models at once, on changes in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merging
from merging.continual.update_rules import continual_methods
from merging.errors import OptionError
from merging.maths.delta import Delta, Dense
from merging.methods import METHODS, chain
from merging.methods.contract.update_rule import History, UpdateStep

Changes = dict[str, Delta]

CASES: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in continual_methods()),
    ("opcm", {"mode": "two_sided", "alpha": 0.3}),
    ("ties", {"density": 0.5, "zero": "plus", "normalize": False, "scale": 0.4}),
    ("magmax", {"scale": -0.5}),
    ("lines+task_arithmetic", {"alpha": 0.2, "beta": 0.3, "tail": "depth"}),
    ("lines+linear", {"published": True}),
]


def models(count: int = 4) -> list[Changes]:
    random = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    return [{name: Dense(torch.randn(6, 4, generator=random)) for name in [*names, "norm"]} for _ in range(count)]


def norm(changes: Changes) -> float:
    return sum(float(change.dense().square().sum()) for change in changes.values()) ** 0.5


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_continued_merges_equal_merges_at_once(method: str, parameters: dict[str, Any]) -> None:
    rule = chain(method, parameters).update_rule()
    assert rule is not None
    zero: Changes = {name: change.scaled(0.0) for name, change in models(1)[0].items()}
    parts = dict.fromkeys(rule.parts, zero)
    norms: list[float] = []
    for number, model in enumerate(models(), 1):
        parts = {
            name: merging.merge_deltas([parts[name], model], method=UpdateStep(then=update), layers=2)
            for name, update in rule.parts.items()
        }
        norms.append(norm(model))
        history = History(tuple(norms), norm(next(iter(parts.values()))))
        got = merging.merge_deltas(list(parts.values()), method=rule.result(history), layers=2)
        wanted = merging.merge_deltas(models()[:number], method=method, layers=2, **parameters)
        for name, change in wanted.items():
            assert torch.allclose(got[name].dense(), change.dense(), atol=1e-5), (number, name)


def test_methods_that_must_see_all_models() -> None:
    continued = {name for name in METHODS if chain(name).update_rule() is not None}
    assert continued == {"linear", "task_arithmetic", "ties", "magmax", "opcm", "dop", "lines"}
    assert all(chain(method).update_rule() is None for method in ("lines+ties", "lines+opcm", "dare+task_arithmetic"))


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("linear", {"normalize": False}, "is the mean of its models"),
        ("ties", {"scope": "tensor"}, "with scope = model"),
        ("ties", {"density": (0.2, 0.3)}, "one density above 0 for all models"),
    ],
)
def test_parameters_with_which_a_method_cannot_be_continued(
    method: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        chain(method, parameters).update_rule()
