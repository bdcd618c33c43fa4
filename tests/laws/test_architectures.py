"""Every architecture comes out whole: merged on disk, loaded by transformers, compared with the true average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

import merging
from support.architectures import ARCHITECTURES, build

pytestmark = pytest.mark.exhaustive

# Checkpoints come in all three precisions; the rest of the table is float32.
BF16 = {"llama", "llama-tied", "gemma3", "mixtral", "qwen3-moe", "gpt-oss", "t5-gated", "mamba", "resnet", "qwen2-vl"}
FP16 = {"phi3", "whisper"}
# Cut into several files with an index, one of them with experts spread over the files.
SHARDED = {"llama-biases": "20KB", "deepseek-v3": "30KB", "t5": "40KB"}


def dtype_of(name: str) -> torch.dtype:
    """The precision in which this architecture is saved."""
    if name in BF16:
        return torch.bfloat16
    return torch.float16 if name in FP16 else torch.float32


def save(model: PreTrainedModel, name: str, folder: Path) -> Path:
    """The model on disk as transformers writes it."""
    model.save_pretrained(folder, max_shard_size=SHARDED.get(name, "5GB"))
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (name in SHARDED)
    return folder


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of every tensor in the folder's files."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                assert name not in found, f"{name} is stored twice"
                piece = tensors.get_slice(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    return found


def average(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The average in float64, rounded once; what is not a floating-point number is the first model's."""
    if not first.is_floating_point():
        return first
    return ((first.double() + second.double()) / 2).to(first.dtype)


def test_the_table_is_wide_and_its_models_are_different() -> None:
    """At least 34 architectures; a seed gives its model again, another seed other numbers under the same names."""
    assert len(ARCHITECTURES) >= 34
    one, again, other = (build("resnet", seed).state_dict() for seed in (1, 1, 2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].numel() > 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merge_reload_compare(name: str, tmp_path: Path) -> None:
    """The average of two models loads without a missing or unexpected key and is right in every element."""
    first, second = (build(name, seed, dtype_of(name)) for seed in (1, 2))
    paths = [save(model, name, tmp_path / f"model{i}") for i, model in enumerate((first, second))]
    merging.merge(paths, method="linear", output=tmp_path / "merged")

    assert stored(tmp_path / "merged") == stored(paths[0])
    reloaded, report = type(first).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not {kind: keys for kind, keys in report.items() if keys}
    got, one, two = reloaded.state_dict(), first.state_dict(), second.state_dict()
    assert got.keys() == one.keys()
    # transformers may widen what it loads (some modules stay in float32), so numbers are compared and not their types
    wrong = [key for key in one if not torch.equal(got[key].double(), average(one[key], two[key]).double())]
    assert not wrong
