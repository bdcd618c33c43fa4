"""Every type of PEFT adapter that changes weights: read from its files, it changes what PEFT's own merge changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.adapters import State, assert_close, edit_config, edit_tensors, peft
from support.architectures import build
from support.peft_types import CASES, TYPES, changes_by_peft, changes_by_us, make, opened

pytestmark = TYPES


@pytest.mark.parametrize("case", CASES)
def test_change_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    adapter = opened(make(tmp_path / "a", case))
    wanted = changes_by_peft(tmp_path / "a", build(CASES[case][0], 0))
    got = changes_by_us(adapter, build(CASES[case][0], 0))
    off = {name: float((got[name] - wanted[name]).abs().max()) for name in wanted}
    assert not {name: error for name, error in off.items() if not error <= 1e-5}
    assert max(float(change.abs().max()) for change in wanted.values()) > 0.01


def test_names_with_the_adapter_s_name_in_them(tmp_path: Path) -> None:
    """Files that were saved from a raw state dict."""
    for case in ("LoHa", "HRA", "VeRA", "VB-LoRA best", "LayerNorm"):
        folder = make(tmp_path / case, case)
        wanted = changes_by_us(opened(folder), build(CASES[case][0], 0))
        edit_tensors(folder, lambda tensors: {_raw(name): value for name, value in tensors.items()})
        assert_close(changes_by_us(opened(folder), build(CASES[case][0], 0)), wanted, 0)


def _raw(name: str) -> str:
    stem, topk, rest = name.partition("_topk_")
    if topk:
        return f"{stem}.default_topk_{rest}"
    stem, dot, end = name.rpartition(".")
    return f"{stem}.default.{end}" if end in ("weight", "bias") else f"{stem}{dot}{end}.default"


@pytest.mark.parametrize("case", ["AdaLoRA", "LoHa", "VeRA", "MiSS", "OFT exact", "IA3", "HRA", "GraLoRA", "DeLoRA"])
def test_bfloat16_adapters_are_read_to_the_last_bit_that_peft_keeps(tmp_path: Path, case: str) -> None:
    """PEFT rounds the change to bfloat16 and then the sum; we round the sum alone: one unit in the last place apart."""
    folder = make(tmp_path / "a", case, torch.bfloat16)
    base = build(CASES[case][0], 0, torch.bfloat16)
    got = changes_by_us(opened(folder), base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    for name, value in before.items():
        ours, theirs = (value.float() + got[name].float()).bfloat16(), merged[name]
        # a unit in the last place of the largest number that either program rounds on its way
        unit = torch.maximum(torch.maximum(value.abs(), theirs.abs()), got[name].abs()).float() * 2**-7
        assert bool(((ours.float() - theirs.float()).abs() <= unit).all()), name


def test_float64_adapters_are_computed_in_float64(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "LoHa", torch.float64)
    got = changes_by_us(opened(folder), build("llama", 0, torch.float64), torch.float64)
    base = build("llama", 0, torch.float64)
    assert_close(got, changes_by_peft(folder, base), 1e-13)


def test_pruned_adalora_keeps_the_scale_of_its_first_rank(tmp_path: Path) -> None:
    """Modules lost ranks, one of them all; PEFT scales by the rank before."""
    folder = make(tmp_path / "a", "AdaLoRA")
    before = changes_by_us(opened(folder), build("llama", 0))
    kept = {"model.layers.0.self_attn.q_proj": [0, 2, 3], "model.layers.1.mlp.up_proj": []}
    masks = {f"{path}.lora_E": [i in kept.get(path, range(6)) for i in range(6)] for path in _paths(folder)}

    def prune(tensors: State) -> State:
        for path, ranks in kept.items():
            for leaf, axis in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
                name = f"base_model.model.{path}.{leaf}"
                tensors[name] = tensors[name].index_select(axis, torch.tensor(ranks, dtype=torch.long))
        return tensors

    edit_tensors(edit_config(folder, rank_pattern=masks), prune)
    got = changes_by_us(opened(folder), build("llama", 0))
    assert_close(got, changes_by_peft(folder, build("llama", 0)))
    assert not bool(got["model.layers.1.mlp.up_proj.weight"].any())
    assert_close(got | {f"{path}.weight": before[f"{path}.weight"] for path in kept}, before)


def _paths(folder: Path) -> list[str]:
    return sorted({name.split(".weight")[0] for name in opened(folder).changes})


def test_bone_is_what_miss_was_called(tmp_path: Path) -> None:
    for case in ("MiSS", "MiSS bat"):
        folder = make(tmp_path / case, case)
        wanted = changes_by_us(opened(folder), build("llama", 0))
        edit_config(folder, peft_type="BONE")
        edit_tensors(folder, lambda t: {name.replace("miss_block", "bone_block"): value for name, value in t.items()})
        assert_close(changes_by_us(opened(folder), build("llama", 0)), wanted, 0)
