"""Malformed adapters of PEFT's types: refused by the name of the module, from the header where that tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import FormatError, MergingError
from merging.hub.open_model import open_model
from support.adapters import State, assert_close, edit_config, edit_tensors, save_base
from support.architectures import build
from support.peft_types import CASES, TYPES, changes_by_peft, changes_by_us, make, opened

pytestmark = TYPES


def no_part(leaf: str) -> Callable[[State], State]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(f"{Q0}.{leaf}")}


def part(leaf: str, value: Any) -> Callable[[State], State]:
    return lambda tensors: tensors | {f"base_model.model.{Q0}.{leaf}": value}


Q0 = "model.layers.0.self_attn.q_proj"

MALFORMED: dict[str, tuple[str, Callable[[State], State], dict[str, Any], str]] = {
    "missing part": ("LoHa", no_part("hada_w2_b"), {}, "q_proj has no hada_w2_b: the file is incomplete"),
    "ranks differ": ("LoHa", part("hada_w1_b", torch.ones(4, 32)), {}, r"hada_w1_b has the shape \(4, 32\).*r = 3"),
    "rank and config": ("LoHa", dict, {"r": 5}, "has rank 3, and its config says 5"),
    "axes": ("LoHa", part("hada_w1_b", torch.ones(3, 32, 1)), {}, r"should be \[r, i\]"),
    "integers": ("LoHa", part("hada_w1_b", torch.ones(3, 32).int()), {}, "I32 factors: only F16, BF16"),
    "empty": ("LoHa", part("hada_w1_b", torch.ones(3, 0)), {}, "holds nothing"),
    "odd part": ("LoHa", part("hada_t1", torch.ones(3, 3, 1, 1)), {}, "q_proj: .*|has no hada_t2"),
    "alpha": ("LoHa", dict, {"alpha": "x"}, "alpha of .*_proj is 'x', and should be a number"),
    "infinite alpha": ("LoKr", dict, {"alpha": 1e400}, "should be a number"),
    "rank zero": ("LoKr", dict, {"r": 0}, "should be a whole number above 0"),
    "stranger": ("LoHa", part("ia3_l", torch.ones(3)), {}, "ia3_l is neither a part of LOHA"),
    "unpruned": ("AdaLoRA", dict, {"init_r": 4}, "has rank 6, and init_r in its config is 4"),
    "projections": ("VeRA", lambda t: {n: v for n, v in t.items() if "vera_A" not in n}, {}, "save_projection=True"),
    "bases": ("RandLoRA", lambda t: {n: v for n, v in t.items() if "_B" not in n}, {}, "save_projection=True"),
    "few bases": ("RandLoRA", part("randlora_B", torch.ones(48, 2, 5)), {}, "needs 7 random bases"),
    "triangle": ("OFT", part("oft_R.weight", torch.ones(8, 5)), {}, "no square block"),
    "sharing": ("OFT", dict, {"block_share": True}, "has (8|12) blocks"),
    "terms": ("OFT", dict, {"num_cayley_neumann_terms": 2**40}, "whole number above 0"),
    "butterfly": ("BOFT", part("boft_R", torch.zeros(2, 8, 4, 4)), {}, "2 butterfly factors"),
    "variant": ("RoAD 1", dict, {"variant": "road_3"}, "variant in its config is 'road_3'"),
    "groups": ("RoAD 1", dict, {"group_size": 7}, "do not make pairs in groups of 7"),
    "seed": ("FourierFT", dict, {"random_loc_seed": 2**70}, "random_loc_seed"),
    "wavelet": ("WaveFT", dict, {"wavelet_family": "sym2"}, "'sym2', and only db1"),
    "topk": ("VB-LoRA", dict, {"topk": 21}, "topk is 21"),
    "gralora": ("GraLoRA", dict, {"gralora_k": 3}, "has 4 groups of rank 8"),
    "pattern": ("LoHa", dict, {"rank_pattern": {"(": 3}}, "is not a regular expression"),
    "feed-forward": ("IA3 conv2d", dict, {"feedforward_modules": "("}, "is not a regular expression"),
    "tokens": ("trainable tokens", dict, {"token_indices": [1, 1, 2]}, "not as many different indices"),
    "blocks": ("BD-LoRA", dict, {"use_bdlora": {"nblocks": 3, "target_modules_bd_b": ["q_proj"]}}, "3 blocks|do not"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_by_the_name_of_the_module(tmp_path: Path, case: str) -> None:
    """From the header, whatever the numbers would be."""
    name, edit, config, reason = MALFORMED[case]
    folder = edit_config(edit_tensors(make(tmp_path / "a", name), edit), **config)
    with pytest.raises(FormatError, match=reason) as refusal:
        open_model(folder)
    assert str(folder) in str(refusal.value)


VALUES: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "entries outside": ("SHiRA", "shira_indices", lambda v: v + 40, "q_proj: has entries outside of its weight"),
    "vectors outside": ("VB-LoRA best", "vblora_logits_A_topk_indices", lambda v: v + 30, "points at vectors"),
    "not finite": ("HRA", "hra_u", lambda v: v * float("nan"), "NaN or infinite values"),
    "not finite either": ("LoHa", "hada_w1_a", lambda v: v / 0, "NaN or infinite values"),
    "spectrum": ("KaSA", "lora_diag", lambda v: v * float("inf"), "NaN or infinite values"),
    "another's base": ("C3A", "c3a_kernel", lambda v: v[:, :1].contiguous(), r"has the shape \(32, 16\)"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_make_no_sense_are_refused(tmp_path: Path, case: str) -> None:
    """Before anything is written."""
    name, leaf, edit, reason = VALUES[case]
    folder = make(tmp_path / "a", name)
    edit_tensors(folder, lambda t: t | {(key := f"base_model.model.{Q0}.{leaf}"): edit(t[key])})
    base = save_base(tmp_path / "base", CASES[name][0])
    with pytest.raises(MergingError, match=reason):
        merging.merge([folder], method="task_arithmetic", base=base, kind="model", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bare_files_of_other_types_need_their_config(tmp_path: Path) -> None:
    """Beside them, or in their own header."""
    folder = make(tmp_path / "a", "LoHa")
    bare = folder / "other.safetensors"
    (folder / "adapter_model.safetensors").rename(bare)
    with pytest.raises(FormatError, match="PEFT adapter of type LOHA, which needs its config"):
        open_model(bare)
    tensors, config = load_file(bare), (folder / "adapter_config.json").read_text()
    save_file(tensors, bare, {"adapter_config": config})
    wanted = changes_by_peft(make(tmp_path / "b", "LoHa"), build("llama", 0))
    assert_close(changes_by_us(opened(bare), build("llama", 0)), wanted)
