"""What no PEFT adapter may be merged with or without: told by name, with the reason, before anything is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import FormatError, InputError, MergingError
from merging.hub.open_model import open_model
from merging.sources.peft.adapter_types import PEFT_TYPES
from merging.sources.peft.unsupported_types import UNSUPPORTED
from support.adapters import (
    QUIRKS,
    State,
    copied,
    edit_config,
    edit_tensors,
    llama_adapters,
    peft,
    save_base,
    train,
)

pytestmark = QUIRKS


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its adapters, which no test changes."""
    return llama_adapters(tmp_path_factory.mktemp("llama"))


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "niter": ({"init_lora_weights": "pissa_niter_4"}, "random SVD.*path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, "statistics of data.*path_initial_model_for_weight_conversion"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "gradients that the file does not hold"),
    "loftq": ({"init_lora_weights": "loftq"}, "quantised approximation"),
    "unknown start": ({"init_lora_weights": "nova"}, "'nova'"),
    "other type": ({"peft_type": "XLORA"}, "type XLORA: what it adds depends on each input"),
    "unknown type": ({"peft_type": "NOVA"}, "type NOVA: this type is not known"),
    "another's type": ({"peft_type": "VERA"}, "lora_A.weight is neither a part of VERA"),
    "replication": ({"layer_replication": [[0, 2], [0, 2]]}, "repeated layers"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "no rows of tokens"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "no factors for it"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "aLoRA"),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "has no lora_diag"),
    "rank": ({"r": 5}, "has rank 4, and its config says 5"),
    "rank pattern": ({"rank_pattern": {"q_proj": 3}}, "q_proj has rank 4, and its config says 3"),
    "no pattern": ({"rank_pattern": [1]}, "rank_pattern in its config is not a mapping"),
    "alpha": ({"lora_alpha": "six"}, "lora_alpha of .* is 'six'"),
    "catastrophic": ({"rank_pattern": {r"(?:\w|.|\w\w)*[A-Z]": 2}}, "takes too long to match"),
    "long": ({"alpha_pattern": {"q+" * 6000: 2}}, "takes too long to match"),
    "counts": ({"rank_pattern": {"(q{99}){99}": 2}}, "takes too long to match"),
    "no regex": ({"rank_pattern": {"q_proj(": 2}}, "is not a regular expression"),
    "base": ({"base_model_name_or_path": 7}, "base_model_name_or_path in its config is 7"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_config_that_cannot_be_followed_is_refused(llama: Path, tmp_path: Path, case: str) -> None:
    """With its reason, before anything is written, with a base at hand or without."""
    fields, reason = REFUSED_CONFIGS[case]
    adapter = edit_config(copied(llama, tmp_path / "a"), **fields)
    for base in (None, llama / "base"):
        with pytest.raises(FormatError, match=reason) as refusal:
            merging.merge([adapter], method="task_arithmetic", base=base, output=tmp_path / "out")
        assert str(adapter) in str(refusal.value)
    assert not (tmp_path / "out").exists()


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

REFUSED_TENSORS: dict[str, tuple[Callable[[State], State], str]] = {
    "typo": (
        lambda t: {name.replace("layers.1.self_attn.q_proj", "layers.1.self_attn.q_porj"): t[name] for name in t},
        r"layers\.1\.self_attn\.q_porj\.weight is not a tensor of the base \(did you mean .*\(1 of 6 targets",
    ),
    "no B": (lambda t: without(t, f"{Q0}.lora_B.weight"), "layers.0.self_attn.q_proj has no lora_B"),
    "no A": (lambda t: without(t, f"{Q0}.lora_A.weight"), "layers.0.self_attn.q_proj has no lora_A"),
    "shapes": (lambda t: t | {f"{Q0}.lora_B.weight": torch.ones(32, 3)}, r"\(4, 32\) and \(32, 3\) do not multiply"),
    "flat": (lambda t: t | {f"{Q0}.lora_B.weight": torch.ones(32)}, "do not multiply"),
    "rank 0": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(0, 32), f"{Q0}.lora_B.weight": torch.ones(32, 0)},
        "do not multiply",
    ),
    "kernel in B": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(4, 8, 2, 2), f"{Q0}.lora_B.weight": torch.ones(32, 4, 2, 2)},
        "has a kernel",
    ),
    "integers": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)},
        "I32 factors: only F16, BF16, F32 and F64",
    ),
    "wrong width": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(4, 31)},
        r"\(32, 31\), and the base's tensor \(32, 32\)",
    ),
    "odd leaf": (lambda t: t | {f"{Q0}.lora_odd": torch.ones(4)}, "lora_odd is neither a LoRA factor"),
    "bias of A": (lambda t: t | {f"{Q0}.lora_A.bias": torch.ones(4)}, "lora_A.bias has no place"),
    "unlisted module": (
        lambda t: t | {"base_model.model.model.norm.weight": torch.ones(96, 32)},
        "modules_to_save: none",
    ),
    "empty": (lambda _: {"x": torch.ones(1)}, "x is neither a LoRA factor"),
}


def without(tensors: State, name: str) -> State:
    """All tensors but one."""
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_do_not_belong_are_refused(llama: Path, tmp_path: Path, case: str) -> None:
    """Every one by name: an adapter is never merged in part."""
    edit, reason = REFUSED_TENSORS[case]
    adapter = edit_tensors(copied(llama, tmp_path / "a"), edit)
    with pytest.raises(MergingError, match=reason):
        merging.merge([adapter], method="task_arithmetic", base=llama / "base", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "reason"), [("dora", "DoRA gives every output"), ("pissa", "pissa took a part of the base's weight away")]
)
def test_variants_that_need_the_base_say_so(llama: Path, tmp_path: Path, kind: str, reason: str) -> None:
    """Neither alone nor beside a plain adapter."""
    with pytest.raises(InputError, match=rf"{reason}.*base="):
        merging.merge([llama / "plain", llama / kind], method="linear", output=tmp_path / "out")
    with pytest.raises(InputError, match=r"a model can be made of adapters only with base="):
        merging.merge([llama / kind], method="linear", kind="model", output=tmp_path / "out")


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_types_that_are_not_read_are_refused_by_their_name(llama: Path, tmp_path: Path, kind: str) -> None:
    """PEFT has each of them, and none that is named neither here nor among those that are read."""
    adapter = edit_config(copied(llama, tmp_path / "a"), peft_type=kind)
    with pytest.raises(FormatError, match=f"is a PEFT adapter of type {kind}: {re.escape(UNSUPPORTED[kind])}"):
        open_model(adapter)
    assert {each.value for each in peft.PeftType} == {*PEFT_TYPES, *UNSUPPORTED} - {"BONE"}


@pytest.mark.parametrize("targets", [{"trainable_token_indices": [1, 5]}, {"target_parameters": ["experts.down_proj"]}])
def test_rows_and_experts_are_refused_without_their_config(tmp_path: Path, targets: dict[str, Any]) -> None:
    """A bare file of what PEFT writes for them does not tell which they are."""
    base = save_base(tmp_path / "base", "mixtral")
    adapter = train(tmp_path / "a", base, 1, ["q_proj"], **targets)
    shutil.copyfile(adapter / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(MergingError, match=r"not as many different indices|is not a tensor of the base"):
        merging.merge(
            [tmp_path / "bare.safetensors"], method="linear", base=base, kind="model", output=tmp_path / "out"
        )


def test_lora_on_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """PEFT itself cannot merge it."""
    base = save_base(tmp_path / "base", "convnext")
    with pytest.warns(UserWarning, match="Merging is not supported"):
        adapter = train(tmp_path / "a", base, 1, ["dwconv"], r=48)
    with pytest.raises(MergingError, match="dwconv"):
        merging.merge([adapter], method="linear", base=base, kind="model", output=tmp_path / "out")


@pytest.mark.parametrize("given", ["not json", "[1]", '"text"'])
def test_config_in_a_header_that_is_no_object(tmp_path: Path, given: str) -> None:
    tensors = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"adapter_config": given})
    with pytest.raises(FormatError, match=r"adapter_config in its header: (is not valid JSON|should hold)"):
        open_model(tmp_path / "a.safetensors")


def test_folder_without_weights(llama: Path, tmp_path: Path) -> None:
    adapter = copied(llama, tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither adapter_model\.safetensors nor \.bin"):
        open_model(adapter)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B", True),
        ("/data/models/Qwen2.5-7B/", "Qwen/Qwen2.5-7B", True),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "mistralai/Mistral-7B-v0.1", True),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-70B", False),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3", False),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", False),
    ],
)
def test_adapters_of_different_bases_do_not_add_up(
    llama: Path, tmp_path: Path, one: str, other: str, same: bool
) -> None:
    """Quantised mirrors, other owners and local copies of a base are that base."""
    adapters = [
        edit_config(copied(llama, tmp_path / name), base_model_name_or_path=name_of_base)
        for name, name_of_base in (("a", one), ("b", other))
    ]
    if same:
        merging.merge(adapters, method="linear", output=tmp_path / "out")
        return
    with pytest.raises(InputError, match=r"adapters of different bases do not add up.*allow_different_bases=True"):
        merging.merge(adapters, method="linear", output=tmp_path / "out")
    merging.merge(adapters, method="linear", output=tmp_path / "out", allow_different_bases=True)


def test_adapters_that_share_nothing_are_not_put_side_by_side(llama: Path, tmp_path: Path) -> None:
    """Two bare files of different models; those of one model that adapt other modules are told how."""
    bert = save_base(tmp_path / "bert", "bert")
    other = train(tmp_path / "other", bert, 1, ["query", "value"])
    bare = tmp_path / "bare.safetensors"
    shutil.copy(other / "adapter_model.safetensors", bare)
    models, out = [llama / "plain", bare], tmp_path / "out"
    with pytest.raises(InputError, match=r"adapt no tensor in common.*base=, or use allow_different_bases=True"):
        merging.merge(models, method="linear", output=out)
    assert not out.exists()
    told = merging.merge(models, method="linear", output=out, allow_different_bases=True).notices
    assert any("put side by side" in notice for notice in told)


def test_adapters_of_one_base_may_share_nothing(tmp_path: Path) -> None:
    """Attention here, the rest there: the base that both state, or --base, says that they belong together."""
    base = save_base(tmp_path / "base", "llama")
    parts = [train(tmp_path / f"{i}", base, i, [name]) for i, name in enumerate(("q_proj", "up_proj"))]
    merging.merge(parts, method="linear", output=tmp_path / "stated")
    for part in parts:
        edit_config(part, base_model_name_or_path=None)
    with pytest.raises(InputError, match="adapt no tensor in common"):
        merging.merge(parts, method="linear", output=tmp_path / "out")
    merging.merge(parts, method="linear", output=tmp_path / "out", base=base)
    # a third that shares tensors with each of the two ties them together
    third = train(tmp_path / "third", base, 3, ["q_proj", "up_proj"])
    assert merging.merge([*parts, third], method="linear", output=tmp_path / "three").tensors == 8
