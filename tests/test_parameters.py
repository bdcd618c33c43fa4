"""Parameters that differ from place to place, and tensors that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import references
import torch
from changes import (
    changes,
    dense,
)
from references import flatten, unflatten
from tiny import fine_tune, identical, load, model, save
from torch import Tensor, equal

import merging
from merging.errors import OptionError

# ---- parameters that differ from place to place, and what is left out

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)), "lm_head.weight"]


def weights_of(method: str, **options: Any) -> list[Tensor]:
    """What each model counts in the tensors before, in and behind three blocks."""
    models = [{name: torch.eye(2)[i] for name in NAMES} for i in range(2)]
    got = merging.merge_deltas(dense(models), method=method, **options)
    return torch.stack([got[name].dense() for name in NAMES])


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        ("0:1", [0, 0, 0.5, 1, 1], [0, 0, 0.5, 1, 1]),
        (("0:1:0", 0.25), [0, 0, 1, 0, 0], [0.25] * 5),
        (("1:3", "2:0"), [1, 1, 2, 3, 3], [2, 2, 1, 0, 0]),
        ({"mlp": 0.3, "*": "0:1"}, [0, 0.3, 0.3, 0.3, 1], [0, 0.3, 0.3, 0.3, 1]),
        (({"layers.1": 5, "*": "2:4"}, {"*head*": -1, "*": 1}), [2, 2, 5, 4, 4], [1, 1, 1, 1, -1]),
    ],
)
def test_weights_by_depth_and_name(weights: Any, first: Any, second: Any) -> None:
    wanted = torch.tensor([first, second]).T.float()
    assert torch.allclose(weights_of("task_arithmetic", weights=weights), wanted)
    scaled = weights_of("task_arithmetic", weights=weights, scale="2:4")
    assert torch.allclose(scaled, wanted * torch.tensor([[2.0], [2], [3], [4], [4]]))
    if bool((wanted.sum(1) != 0).all()):
        mean = weights_of("linear", weights=weights)
        assert torch.allclose(mean, wanted / wanted.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("density", "first", "second"),
    [
        ("0.21:0.83", [0.21, 0.21, 0.52, 0.83, 0.83], [0.21, 0.21, 0.52, 0.83, 0.83]),
        (("0.21:0.83", 0.4), [0.21, 0.21, 0.52, 0.83, 0.83], [0.4] * 5),
        ({"mlp": "0.3:0.9:0.5", "*": 1.0}, [1.0, 0.3, 0.9, 0.5, 1.0], [1.0, 0.3, 0.9, 0.5, 1.0]),
    ],
)
def test_density_by_depth_and_name(density: Any, first: Any, second: Any) -> None:
    models = changes(2, 3, shapes=dict.fromkeys(NAMES, (11, 17)))
    got = merging.merge_deltas(dense(models), method="ties", scope="tensor", density=density)
    for name, *shares in zip(NAMES, first, second, strict=True):
        tau = flatten([{name: each[name]} for each in models])
        assert equal(got[name].dense().flatten(), references.ties(tau, shares))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"density": "0.2:0.8"}, "scope = tensor"),
        ("ties", {"density": ("0.2:0.8", 0.3)}, "scope = tensor"),
        ("ties", {"density": "0.2:1.4", "scope": "tensor"}, "density"),
        ("ties", {"density": (0.5, "0.2:-0.1"), "scope": "tensor"}, "density"),
        ("task_arithmetic", {"weights": {"mlp": 0.3, "embed": "0:1"}}, "no pattern matches lm_head.weight"),
        ("consensus", {"threshold": "0.2:-0.2"}, "threshold"),
        ("dare", {"drop": {"layers.2": 1.0, "*": 0.5}}, "drop"),
        ("linear", {"weights": (1, "1:-1")}, "sum to zero"),
        ("linear", {"weights": ({"layers.1": -1, "*": 1}, 1)}, "sum to zero"),
    ],
)
def test_refused_somewhere(method: str, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        weights_of(method, **options)


@pytest.mark.parametrize("method", ["pcb", "ties", "opcm", "lines+ties", "linear"])
def test_exclude(method: str, tmp_path: Path) -> None:
    """What is left out stays the base's, and counts nowhere."""
    base = model(1)
    tuned = [{name: value * 1.5 for name, value in fine_tune(base, i).items()} for i in range(2)]
    out = {name for name in base if "embed" in name or name == "model.layers.1.input_layernorm.weight"}
    patterns = ("embed", "*.1.*norm*")
    got = merging.merge_state_dicts(tuned, method=method, base=base, exclude=patterns)
    rest = [{name: value for name, value in each.items() if name not in out} for each in (base, *tuned)]
    assert identical({name: got[name] for name in out}, {name: base[name] for name in out})
    wanted = merging.merge_state_dicts(rest[1:], method=method, base=rest[0])
    assert identical({name: got[name] for name in rest[0]}, wanted)
    if method in ("pcb", "ties"):
        tau = flatten([{name: each[name] - base[name] for name in rest[0]} for each in tuned])
        change = unflatten(getattr(references, method)(tau), rest[0])
        assert all(equal(got[name], base[name] + change[name]) for name in change)
    paths = [save(tmp_path / str(i), each) for i, each in enumerate((base, *tuned))]
    options: Any = {"method": method, "base": paths[0], "output": tmp_path / "out"}
    merging.merge(paths[1:], exclude=patterns, **options)
    found = load(tmp_path / "out")
    assert found.keys() == got.keys() and all(torch.allclose(found[name], got[name], atol=1e-6) for name in got)
    assert identical({name: found[name] for name in out}, {name: base[name] for name in out})
    for refused in (lambda: merging.merge_state_dicts(tuned, method=method, base=base, exclude=["embed", "nothing"]),
                    lambda: merging.merge(paths[1:], exclude=["nothing"], overwrite=True, **options)):  # fmt: skip
        with pytest.raises(OptionError, match="'nothing' matches no tensor"):
            refused()
