"""Adapters of the adapters library, with a non-linearity between their factors: MOS's merge of each stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.errors import FormatError


def save_adapter(folder: Path, seed: int, name: str = "stage") -> Path:
    """A bottleneck adapter of two layers, under the library's names of files and tensors."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"adapter_down.0.weight": (4, 32), "adapter_down.0.bias": (4,), "adapter_up.weight": (32, 4)}
    tensors = {
        f"bert.encoder.layer.{layer}.output.adapters.{name}.{part}": torch.randn(shape, generator=random)
        for layer in range(2)
        for part, shape in {**shapes, "adapter_up.bias": (32,)}.items()
    }
    folder.mkdir()
    config = {"config": {"non_linearity": "relu", "reduction_factor": 8}, "name": name, "version": "adapters.1.3.0"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def by_prefix_sums(stages: list[dict[str, Tensor]], share: float) -> dict[str, Tensor]:
    """The last stage as the released code merges it: from the sum of the stages before, which it keeps."""
    sums = {name: value.clone() for name, value in stages[0].items()}
    for stage in stages[1:-1]:
        for name, value in stage.items():
            sums[name] += value
    before = len(stages) - 1
    return {name: (1 - share) * value + share * sums[name] / before for name, value in stages[-1].items()}


def test_each_stage_is_pulled_to_the_mean_of_those_before(tmp_path: Path) -> None:
    """A store holds the mean, and a weighted mean of two files is the merge; both keep the library's names."""
    files = [save_adapter(tmp_path / f"stage{number}", number) for number in range(4)]
    store = merging.ContinualStore.create(tmp_path / "store", base=files[0], method="linear")
    for file in files[:-1]:
        store.add(file, allow_different_bases=True)
    mean = tmp_path / "mean.safetensors"
    store.export(mean, kind="model")
    out = tmp_path / "merged" / "adapter.safetensors"
    merging.merge([files[-1], mean], method="linear", weights=[0.9, 0.1], output=out)
    wanted, got = by_prefix_sums([load_file(file) for file in files], 0.1), load_file(out)
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[name], value, atol=1e-6) for name, value in wanted.items())


def test_a_folder_of_the_library_is_named(tmp_path: Path) -> None:
    """Its way out works."""
    one, other = (save_adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    with pytest.raises(
        FormatError, match=r"of the adapters library, and not of PEFT: .* such as .*adapter\.safetensors"
    ):
        merging.merge([one.parent, other.parent], method="linear", output=tmp_path / "out")
    assert merging.merge([one, other], method="linear", output=tmp_path / "out").tensors == 8
