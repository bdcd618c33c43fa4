"""LARV: the factors of matrices against a reference, on full changes and on factors, and where the base is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.errors import MergingError, OptionError
from support import references
from support.changes import F64
from support.tiny import adapters, fine_tune, identical, load, model, save

NAMES = {f"layers.{layer}.{part}.weight": (layer + 1) / 3 for layer in range(3) for part in "qk"}
OTHERS = ("layers.1.norm.weight", "head.weight")


def tensors(seed: int, size: float = 1.0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    shapes: Any = dict.fromkeys(NAMES, (9, 6)) | {OTHERS[0]: (6,), OTHERS[1]: (5, 6)}
    made = {name: torch.randn(*shape, generator=random, dtype=F64) for name, shape in shapes.items()}
    for name in NAMES:  # spectra of unlike widths
        made[name] = made[name] @ torch.diag(torch.arange(1, 7, dtype=F64) ** (seed % 4))
    return {name: size * value for name, value in made.items()}


def test_each_change_has_its_factor() -> None:
    base, changes = tensors(0), [tensors(seed, 0.1) for seed in (1, 2, 3)]
    tuned = [{name: base[name] + change[name] for name in base} for change in changes]
    factors = [references.larv_factors(base, change, NAMES, 0.4) for change in changes]
    assert len({round(value, 6) for each in factors for value in each.values()}) == 18
    got = merging.merge_state_dicts(tuned, base=base, method="larv", strength=0.4)
    for name in base:
        wanted = base[name] + sum(
            each[name] * factor.get(name, 1.0) for each, factor in zip(changes, factors, strict=True)
        )
        assert torch.allclose(got[name], wanted, rtol=1e-9, atol=1e-12)
    thinned = merging.merge_state_dicts(tuned, base=base, method="larv+ties", strength=0.4)
    scaled = [
        {name: base[name] + change[name] * factor.get(name, 1.0) for name in base}
        for change, factor in zip(changes, factors, strict=True)
    ]
    wanted = merging.merge_state_dicts(scaled, base=base, method="ties")
    assert all(torch.allclose(thinned[name], wanted[name], rtol=1e-9, atol=1e-12) for name in base)


def deltas_of(folder: Path) -> Any:
    return merging.peft_deltas(load(folder), json.loads((folder / "adapter_config.json").read_text()))


@pytest.mark.parametrize("method", ["larv", "larv+ties"])
def test_files_as_tensors(method: str, tmp_path: Path) -> None:
    base = model(0)
    tuned = [fine_tune(base, seed) for seed in (1, 2)]
    for name, state in zip(("base", "a", "b"), (base, *tuned), strict=True):
        save(tmp_path / name, state)
    merging.merge([tmp_path / "a", tmp_path / "b"], base=tmp_path / "base", method=method, output=tmp_path / "out")
    wanted = merging.merge_state_dicts(tuned, base=base, method=method)
    assert identical(load(tmp_path / "out"), wanted)


def test_adapters_need_the_base(tmp_path: Path) -> None:
    """And are merged as factors, as their changes are in full."""
    base, loras = adapters(tmp_path, 2)
    with pytest.raises(MergingError, match="larv\\+task_arithmetic looks at the base's weights: give base="):
        merging.merge(loras, method="larv", output=tmp_path / "out")
    merging.merge(loras, method="larv", base=base, output=tmp_path / "factors")
    merging.merge(loras, method="larv", base=base, kind="model", output=tmp_path / "model")
    before, after = load(base), load(tmp_path / "model")
    plain = merging.merge_deltas(list(map(deltas_of, loras)), method="task_arithmetic")
    for name, delta in deltas_of(tmp_path / "factors").items():
        assert torch.allclose(before[name] + delta.dense(), after[name], atol=1e-5)
        assert not torch.allclose(delta.dense(), plain[name].dense(), atol=1e-3)


@pytest.mark.parametrize("chain", ["pico+larv", "dare+larv+ties"])
def test_no_wrapper_of_changes_comes_before_it(chain: str) -> None:
    base = tensors(0)
    with pytest.raises(OptionError, match=f"in a chain {chain.partition('+')[0]} comes after it"):
        merging.merge_state_dicts([tensors(1)], base=base, method=chain)
