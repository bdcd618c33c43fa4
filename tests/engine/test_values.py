"""Values that are refused: NaN, infinities, and sums beyond the range of their type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import InputError
from support.tiny import checkpoint, identical, load, save


def poisoned(tmp_path: Path, where: str, value: float) -> tuple[Path, list[Path]]:
    base, tuned = checkpoint(tmp_path)
    path = base if where == "base" else tuned[1]
    tensors = load(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save(path, tensors)
    return base, tuned


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["base", "tuned1"])
@pytest.mark.parametrize("method", ["task_arithmetic", "lines+slerp"])
def test_nonfinite_values_are_refused_by_name(tmp_path: Path, method: str, where: str, value: float) -> None:
    base, tuned = poisoned(tmp_path, where, value)
    name = r"model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(InputError, match=rf"{where}: {name} holds NaN or infinite values"):
        merging.merge(tuned, method=method, base=base, output=tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()


def test_nonfinite_values_can_be_allowed(tmp_path: Path) -> None:
    base, tuned = poisoned(tmp_path, "tuned1", NAN)
    merging.merge(tuned, method="task_arithmetic", base=base, output=tmp_path / "out", allow_nonfinite=True)
    wrong = {name: int((~value.isfinite()).sum()) for name, value in load(tmp_path / "out").items()}
    assert wrong.pop("model.layers.1.mlp.up_proj.weight") == 1
    assert not any(wrong.values())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["the base", "model 2"])
@pytest.mark.parametrize("method", ["task_arithmetic", "lines+slerp"])
def test_nonfinite_values_in_memory(tmp_path: Path, method: str, where: str, value: float) -> None:
    """As from files: refused by model and name, or let through."""
    base, tuned = poisoned(tmp_path, "base" if where == "the base" else "tuned1", value)
    models, name = [load(path) for path in tuned], "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match=rf"{where}: {re.escape(name)} holds NaN or infinite values"):
        merging.merge_state_dicts(models, method=method, base=load(base))
    merged = merging.merge_state_dicts(models, method="task_arithmetic", base=load(base), allow_nonfinite=True)
    assert int((~merged[name].isfinite()).sum()) == 1


@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_changes_in_memory(value: float) -> None:
    up, down = torch.ones(4, 2), torch.ones(2, 3)
    good, poor = merging.LowRank(up, down, (4, 3)), merging.LowRank(up * value, down, (4, 3))
    dense = merging.Dense(torch.full((4, 3), value))
    for bad in (poor, dense):
        with pytest.raises(InputError, match=r"adapter 2: a\.weight holds NaN or infinite values"):
            merging.merge_deltas([{"a.weight": good}, {"a.weight": bad}], method="linear")
        merged = merging.merge_deltas([{"a.weight": good}, {"a.weight": bad}], method="linear", allow_nonfinite=True)
        assert not merged["a.weight"].dense().isfinite().any()


def test_values_in_memory_beyond_their_type() -> None:
    models = [{"layers.0.w": torch.full((4,), 6e4, dtype=torch.float16)}] * 2
    with pytest.raises(InputError, match=r"layers\.0\.w: the merged values are beyond the range of torch\.float16"):
        merging.merge_state_dicts(models, method="linear", normalize=False)


def test_finite_values_whose_sum_is_not(tmp_path: Path) -> None:
    """The quick look at a tile's sum is no judgement."""
    tensors = {"layers.0.w": torch.full((64,), 3e38), "layers.1.w": torch.ones(2)}
    paths = [save(tmp_path / name, tensors) for name in "ab"]
    merging.merge(paths, method="linear", output=tmp_path / "out")
    assert identical(load(tmp_path / "out"), tensors)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_overflow_of_float16(tmp_path: Path, dtype: str | None) -> None:
    kind = torch.float32 if dtype else torch.float16
    one, two = ({"layers.0.w": torch.full((4,), value).to(kind)} for value in (6e4, 5e4))
    paths = [save(tmp_path / "a", one), save(tmp_path / "b", two)]
    options: dict[str, Any] = {"method": "linear", "normalize": False, "dtype": dtype}
    with pytest.raises(InputError, match=r"layers\.0\.w: the merged values are beyond the range of F16"):
        merging.merge(paths, output=tmp_path / "out", **options)
    merging.merge(paths, output=tmp_path / "out", **options | {"dtype": "bfloat16"})
    assert torch.allclose(load(tmp_path / "out")["layers.0.w"].float(), torch.tensor(1.1e5), rtol=0.01)
    merging.merge(paths, output=tmp_path / "out2", allow_nonfinite=True, **options)
    assert load(tmp_path / "out2")["layers.0.w"].isinf().all()


def test_overflow_in_float32_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.full((4,), 3e38)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="beyond the range of F32"):
        merging.merge(
            [tmp_path / "a.safetensors"] * 2, method="linear", normalize=False, output=tmp_path / "out.safetensors"
        )
    assert not (tmp_path / "out.safetensors").exists()
