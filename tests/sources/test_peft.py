"""PEFT's adapters: every kind that can be read changes its base as PEFT's own merge does, every other is refused."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    QUIRKS,
    State,
    assert_close,
    baked,
    base_state,
    edit_config,
    edit_tensors,
    peft,
    reload,
    save_base,
    train,
)
from safetensors.torch import save_file

import merging
from merging.errors import FormatError, InputError, MergingError
from merging.sources import open_model

pytestmark = QUIRKS

LLAMA, BERT, GPT2 = ["q_proj", "k_proj", "up_proj"], ["query", "value"], ["c_attn", "c_proj"]

KINDS: dict[str, tuple[str, list[str] | str, dict[str, Any]]] = {
    "linear": ("llama", LLAMA, {}),
    "regex targets": ("llama", r".*layers\.1\..*(q|down)_proj", {}),
    "rslora": ("llama", LLAMA, {"use_rslora": True}),
    "patterns": (
        "llama",
        LLAMA,
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.mlp.up_proj": 7, "q_proj": 3},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.k_proj": 9, "up_proj": 1},
        },
    ),
    "rslora patterns": ("llama", LLAMA, {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 2}}),
    "moe router": ("mixtral", ["q_proj", "v_proj"], {}),
    "t5": ("t5", ["q", "v", "wo"], {}),
    "Conv1D": ("gpt2", GPT2, {"fan_in_fan_out": True}),
    "embedding": ("bert", ["word_embeddings", "value"], {}),
    "conv2d": ("vit", ["projection"], {}),
    "conv2d stack": ("resnet", ["convolution"], {"use_rslora": True}),
    "conv1d": ("whisper", ["conv1", "conv2", "fc1"], {}),
    "lora_bias": ("bert", BERT, {"lora_bias": True}),
    "bias all": ("whisper", ["q_proj", "fc1"], {"bias": "all"}),
    "bias lora_only": ("bert", BERT, {"bias": "lora_only"}),
    "modules_to_save": ("convnext", ["pwconv1", "pwconv2"], {"modules_to_save": ["classifier"]}),
    "head saved": ("llama", LLAMA, {"modules_to_save": ["lm_head"]}),
    "DoRA": ("llama", LLAMA, {"use_dora": True}),
    "DoRA Conv1D": ("gpt2", GPT2, {"use_dora": True, "fan_in_fan_out": True}),
    "DoRA embedding": ("bert", ["word_embeddings"], {"use_dora": True}),
    "DoRA conv2d": ("vit", ["projection"], {"use_dora": True}),
    "PiSSA": ("llama", LLAMA, {"init_lora_weights": "pissa"}),
    "PiSSA rslora": ("llama", LLAMA, {"init_lora_weights": "pissa", "use_rslora": True}),
    "PiSSA Conv1D": ("gpt2", GPT2, {"init_lora_weights": "pissa", "fan_in_fan_out": True}),
    "OLoRA": ("llama", LLAMA, {"init_lora_weights": "olora"}),
    "gaussian": ("llama", LLAMA, {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", LLAMA, {"init_lora_weights": "orthogonal"}),
    "bfloat16": ("llama", LLAMA, {"dtype": torch.bfloat16}),
    "float16": ("bert", BERT, {"dtype": torch.float16, "lora_bias": True}),
    "pickle": ("bert", BERT, {"pickle": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_baked_in_is_what_peft_bakes_in(tmp_path: Path, kind: str) -> None:
    """Every tensor within 1e-5 of PEFT's merge_and_unload, and some tensor far from the base."""
    name, targets, config = KINDS[kind]
    base = save_base(tmp_path / "base", name)
    adapter = train(tmp_path / "adapter", base, 1, targets, **config)
    out = tmp_path / "out"
    merging.merge([adapter], method="task_arithmetic", base=base, kind="model", output=out)
    wanted, before = baked(base, adapter), base_state(base)
    assert_close(base_state(out), wanted)
    assert max(float((wanted[key] - before[key]).abs().max()) for key in before) > 0.01


# ---- where the config comes from, and how names find their place


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama (base) and adapters of it (plain, dora, pissa), which no test changes."""
    root = tmp_path_factory.mktemp("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".is_gradient_checkpointing. is deprecated")
        save_base(root / "base", "llama")
        train(root / "plain", root / "base", 1, LLAMA)
        train(root / "dora", root / "base", 2, LLAMA, use_dora=True)
        train(root / "pissa", root / "base", 3, LLAMA, init_lora_weights="pissa")
    return root


def changed(path: Path, base: Path, out: Path, **options: Any) -> State:
    """The base with one adapter baked in by us."""
    merging.merge([path], method="task_arithmetic", base=base, kind="model", output=out, **options)
    return base_state(out)


def copied(llama: Path, folder: Path, name: str = "plain") -> Path:
    """An adapter of the fixture, to be changed."""
    return Path(shutil.copytree(llama / name, folder))


RENAMINGS: dict[str, Callable[[str], str]] = {
    ".default. in the names": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix of PEFT's": lambda name: name.removeprefix("base_model.model."),
    "no prefix of the model's": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "a wrapper's prefix": lambda name: name.replace("base_model.model.model.", "base_model.model.language_model.model."),
}


@pytest.mark.parametrize("drift", RENAMINGS)
def test_drifted_names_find_their_place(llama: Path, tmp_path: Path, drift: str) -> None:
    """The same factors under other names change the same tensors."""
    rename = RENAMINGS[drift]
    drifted = edit_tensors(copied(llama, tmp_path / "a"), lambda t: {rename(name): value for name, value in t.items()})
    assert_close(changed(drifted, llama / "base", tmp_path / "out"), baked(llama / "base", llama / "plain"))


def test_names_without_the_prefix_on_the_disk_of_the_base(llama: Path, tmp_path: Path) -> None:
    """An adapter of the whole language model, and a base saved as its inner model alone."""
    inner = tmp_path / "inner"
    reload(llama / "base").model.save_pretrained(inner)
    wanted = baked(llama / "base", llama / "plain")
    bare = {name.removeprefix("model."): value for name, value in wanted.items() if name != "lm_head.weight"}
    assert_close(changed(llama / "plain", inner, tmp_path / "out"), bare)


def test_config_beside_adapter_model_is_used_for_the_file_itself(llama: Path, tmp_path: Path) -> None:
    file = llama / "plain" / "adapter_model.safetensors"
    assert_close(changed(file, llama / "base", tmp_path / "out"), baked(llama / "base", llama / "plain"))


def test_config_beside_a_file_of_another_name_is_not_its_own(llama: Path, tmp_path: Path) -> None:
    """Its scale is 1, which one notice says; --lora-alpha sets it."""
    other = copied(llama, tmp_path / "a") / "other.safetensors"
    (other.parent / "adapter_model.safetensors").rename(other)
    at_one = baked(llama / "base", edit_config(copied(llama, tmp_path / "b"), lora_alpha=4))
    done = merging.merge([other], method="linear", base=llama / "base", kind="model", output=tmp_path / "one")
    assert [notice for notice in done.notices if "--lora-alpha" in notice] == list(done.notices)
    assert len(done.notices) == 1
    assert_close(base_state(tmp_path / "one"), at_one)
    done = merging.merge(
        [other], method="linear", base=llama / "base", kind="model", output=tmp_path / "six", lora_alpha=6
    )
    assert not done.notices
    assert_close(base_state(tmp_path / "six"), baked(llama / "base", llama / "plain"))


@pytest.mark.parametrize("config", [True, False], ids=["config", "no config"])
def test_square_conv1d_is_not_turned_round(tmp_path: Path, config: bool) -> None:
    """GPT-2's square c_proj is [in, out]: its flag says it, or in a bare file the other modules of the adapter."""
    base = save_base(tmp_path / "base", "gpt2")
    adapter = train(tmp_path / "a", base, 1, GPT2, fan_in_fan_out=True)
    bare = tmp_path / "bare.safetensors"
    shutil.copyfile(adapter / "adapter_model.safetensors", bare)
    out = changed(adapter if config else bare, base, tmp_path / "out", lora_alpha=6)
    assert_close(out, baked(base, adapter))


# ---- what is refused, and what is said about it


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "niter": ({"init_lora_weights": "pissa_niter_4"}, "random SVD.*path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, "statistics of data.*path_initial_model_for_weight_conversion"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "gradients that the file does not hold"),
    "loftq": ({"init_lora_weights": "loftq"}, "quantised approximation"),
    "unknown start": ({"init_lora_weights": "nova"}, "'nova'"),
    "other type": ({"peft_type": "VERA"}, "type VERA; only LORA"),
    "replication": ({"layer_replication": [[0, 2], [0, 2]]}, "repeated layers"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trained token rows"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "expert parameters"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "aLoRA"),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "KaSA"),
    "rank": ({"r": 5}, "has rank 4, and its config says 5"),
    "rank pattern": ({"rank_pattern": {"q_proj": 3}}, "q_proj has rank 4, and its config says 3"),
    "no pattern": ({"rank_pattern": [1]}, "rank_pattern in its config is no mapping"),
    "alpha": ({"lora_alpha": "six"}, "lora_alpha of .* is 'six'"),
    "catastrophic": ({"rank_pattern": {r"(a+)+b": 2}}, "take for ever"),
    "long": ({"alpha_pattern": {"q" * 2000: 2}}, "take for ever"),
    "no regex": ({"rank_pattern": {"q_proj(": 2}}, "is no regular expression"),
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
        r"layers\.1\.self_attn\.q_porj\.weight is no tensor of the base \(did you mean .*\(1 of 6 targets",
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
    "wrong width": (lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(4, 31)}, r"\(32, 31\), and the base's tensor \(32, 32\)"),
    "odd leaf": (lambda t: t | {f"{Q0}.lora_diag": torch.ones(4)}, "lora_diag is neither a LoRA factor"),
    "bias of A": (lambda t: t | {f"{Q0}.lora_A.bias": torch.ones(4)}, "lora_A.bias has no place"),
    "unlisted module": (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(96, 32)}, "modules_to_save: none"),
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
    with pytest.raises(InputError, match=rf"{reason}.*--base"):
        merging.merge([llama / "plain", llama / kind], method="linear", output=tmp_path / "out")
    with pytest.raises(InputError, match=r"a model can be made of adapters only with --base"):
        merging.merge([llama / kind], method="linear", kind="model", output=tmp_path / "out")


OTHER_TYPES = {
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=LLAMA, init_r=4, total_step=10),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "LOHA": lambda: peft.LoHaConfig(target_modules=LLAMA, r=4),
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_other_types_of_peft_are_refused_by_their_name(llama: Path, tmp_path: Path, kind: str) -> None:
    """As folders by what the config says, and as bare files by what is in them."""
    peft.get_peft_model(reload(llama / "base"), OTHER_TYPES[kind]()).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=rf"is a PEFT adapter of type {kind}; only LORA"):
        open_model(tmp_path / "a")
    bare = tmp_path / "bare.safetensors"
    shutil.copyfile(tmp_path / "a" / "adapter_model.safetensors", bare)
    with pytest.raises(MergingError):
        merging.merge([bare], method="linear", base=llama / "base", kind="model", output=tmp_path / "out")


@pytest.mark.parametrize("targets", [{"trainable_token_indices": [1, 5]}, {"target_parameters": ["experts.down_proj"]}])
def test_rows_and_experts_are_refused_without_their_config_too(tmp_path: Path, targets: dict[str, Any]) -> None:
    """What PEFT really writes for them, as a folder and as a bare file."""
    base = save_base(tmp_path / "base", "mixtral")
    adapter = train(tmp_path / "a", base, 1, ["q_proj"], **targets)
    shutil.copyfile(adapter / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    for path in (adapter, tmp_path / "bare.safetensors"):
        with pytest.raises(MergingError, match="not read yet|neither a LoRA factor|is no tensor of the base"):
            merging.merge([path], method="linear", base=base, kind="model", output=tmp_path / "out")


def test_lora_on_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """PEFT itself cannot merge it."""
    base = save_base(tmp_path / "base", "convnext")
    adapter = train(tmp_path / "a", base, 1, ["dwconv"], r=16)
    with pytest.raises(MergingError, match="dwconv"):
        merging.merge([adapter], method="linear", base=base, kind="model", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a Kohya or ComfyUI LoRA"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "a diffusers or ComfyUI LoRA"),
        ("unet.down_blocks.0.attn1.processor.to_q_lora.lora.down.weight", "an old diffusers LoRA"),
        ("lycoris_blocks_0_attn.hada_w1_a", "a LyCORIS LoHa"),
        ("lycoris_blocks_0_attn.lokr_w1", "a LyCORIS LoKr"),
    ],
)
def test_files_of_other_programs_are_told_by_their_names(tmp_path: Path, name: str, kind: str) -> None:
    save_file({name: torch.ones(4, 8)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FormatError, match=rf"is {kind} file \({re.escape(name)}\).*convert it to PEFT first"):
        open_model(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("given", ["not json", "[1]", '"text"'])
def test_config_in_a_header_that_is_no_object(tmp_path: Path, given: str) -> None:
    tensors = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"adapter_config": given})
    with pytest.raises(FormatError, match="adapter_config in its header is not a JSON object"):
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
def test_adapters_of_different_bases_do_not_add_up(llama: Path, tmp_path: Path, one: str, other: str, same: bool) -> None:
    """Quantised mirrors, other owners and local copies of a base are that base."""
    adapters = [
        edit_config(copied(llama, tmp_path / name), base_model_name_or_path=name_of_base)
        for name, name_of_base in (("a", one), ("b", other))
    ]
    if same:
        merging.merge(adapters, method="linear", output=tmp_path / "out")
        return
    with pytest.raises(InputError, match="adapters of different bases do not add up.*--allow-different-bases"):
        merging.merge(adapters, method="linear", output=tmp_path / "out")
    merging.merge(adapters, method="linear", output=tmp_path / "out", allow_different_bases=True)
