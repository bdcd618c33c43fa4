"""Two drivers carry out a method, one on files and one on tensors in memory: for every name they make the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.maths.delta import Delta, LowRank
from merging.methods import ALIASES, METHODS, chain
from support.laws import Row, Tensors, on_changes, rows
from support.tiny import fine_tune, load, model, save

SHAPES = {"mlp.up_proj": (16, 8), "self_attn.q_proj": (8, 8)}
"""Modules of every block that adapters change."""


def close(one: Tensors, other: Tensors, within: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.allclose(value, other[name], rtol=within, atol=within)
        for name, value in one.items()
    )


def on_files(folder: Path, base: Tensors, tuned: list[Tensors], **options: Any) -> tuple[Tensors, Any]:
    """The merge of full checkpoints from files, and the names by which methods draw random numbers."""
    paths = [save(folder / f"{i}", each) for i, each in enumerate(tuned)]
    options["base"] = save(folder / "base", base)
    merging.merge(paths, output=folder / "out", **options)
    return load(folder / "out"), merging.preview(paths, **options).keys


@rows
def test_full_checkpoints(row: Row, tmp_path: Path) -> None:
    base = model(3)
    tuned = [fine_tune(base, 3 + i, 0.5) for i in range(2)][: row.most]
    options: dict[str, Any] = {"method": row.chain, **row.parameters}
    got, keys = on_files(tmp_path, base, tuned, **options)
    assert close(got, merging.merge_state_dicts(tuned, base=base, keys=keys, **options))


@pytest.mark.parametrize("name", [*(name for name in METHODS if not METHODS[name].load().needs_statistics), *ALIASES])
def test_names_with_their_defaults(name: str, tmp_path: Path) -> None:
    """Methods and mergekit's names, without any parameter, on as many models as they take."""
    base = model(5)
    _, most = chain(name).models
    tuned = [fine_tune(base, i, 0.5) for i in range(min(3, most or 3))]
    got, keys = on_files(tmp_path, base, tuned, method=name)
    assert close(got, merging.merge_state_dicts(tuned, method=name, base=base, keys=keys))


def save_adapter(folder: Path, deltas: dict[str, Delta]) -> Path:
    """Low-rank changes as PEFT saves them."""
    tensors, rank = {}, 2
    for name, delta in deltas.items():
        assert isinstance(delta, LowRank)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": delta.down, f"{stem}.lora_B.weight": delta.up}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "tiny/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@on_changes
def test_adapters(row: Row, tmp_path: Path) -> None:
    """Written into their base, so that whatever full rank a method makes of them is there."""
    base, random = model(4), torch.Generator().manual_seed(4)
    adapters: list[dict[str, Delta]] = [
        {
            f"model.layers.{layer}.{module}.weight": LowRank(
                torch.randn(out, 2, generator=random), torch.randn(2, width, generator=random), (out, width)
            )
            for layer in range(3)
            for module, (out, width) in SHAPES.items()
        }
        for _ in range(2)
    ][: row.most]
    base |= {name: torch.randn(delta.shape, generator=random) for name, delta in adapters[0].items()}
    paths = [save_adapter(tmp_path / f"{i}", each) for i, each in enumerate(adapters)]
    options: dict[str, Any] = {"method": row.chain, **row.parameters}
    on_disk: dict[str, Any] = {"base": save(tmp_path / "base", base), "kind": "model"}
    merging.merge(paths, output=tmp_path / "out", **on_disk, **options)
    keys = merging.preview(paths, **on_disk, **options).keys
    wanted = dict(base)
    for name, delta in merging.merge_deltas(adapters, keys=keys, **options).items():
        wanted[name] = base[name] + delta.dense()
    assert close(load(tmp_path / "out"), wanted, row.within)
