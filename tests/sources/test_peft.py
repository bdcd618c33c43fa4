"""PEFT's adapters: every kind that can be read changes its base as PEFT's own merge does, under whatever names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merging
from merging.errors import InputError
from support.adapters import (
    LLAMA,
    QUIRKS,
    State,
    assert_close,
    baked,
    base_state,
    copied,
    edit_config,
    edit_tensors,
    llama_adapters,
    peft,
    reload,
    save_base,
    train,
)

pytestmark = QUIRKS

BERT, GPT2 = ["query", "value"], ["c_attn", "c_proj"]

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
    "rslora patterns": (
        "llama",
        LLAMA,
        {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 2}},
    ),
    "beside experts": ("mixtral", ["q_proj", "v_proj"], {}),
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
    "names in memory": ("vit", ["q_proj", "v_proj"], {"modules_to_save": ["classifier"]}),
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


TIED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "embedding targeted": (["embed_tokens", "q_proj"], {"ensure_weight_tying": True}),
    "embedding saved": (["q_proj"], {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "one end saved": (["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    "both ends saved": (["q_proj"], {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.filterwarnings("ignore:(?s).*tie_word_embeddings=True")
@pytest.mark.parametrize("as_adapter", [True, False], ids=["adapter", "model"])
@pytest.mark.parametrize("case", TIED)
def test_tied_models_compute_what_they_did_with_their_adapter(tmp_path: Path, case: str, as_adapter: bool) -> None:
    """PEFT's merge of tied weights changes both ends, so here the outputs of the networks are compared."""
    targets, config = TIED[case]
    base = save_base(tmp_path / "base", "llama-tied")
    adapter = train(tmp_path / "a", base, 1, targets, **config)
    out, kind = tmp_path / "out", "adapter" if as_adapter else "model"
    merging.merge([adapter], method="task_arithmetic", base=base, kind=kind, output=out)
    ours = peft.PeftModel.from_pretrained(reload(base), out) if as_adapter else reload(out)
    theirs = peft.PeftModel.from_pretrained(reload(base), adapter)
    text = torch.arange(12)[None]
    with torch.no_grad():
        got, wanted, before = (model.eval()(text).logits for model in (ours, theirs, reload(base)))
    assert float((got - wanted).abs().max()) < 1e-5
    assert float((wanted - before).abs().max()) > 5e-4
    if as_adapter:
        names = [name for name in load_file(out / "adapter_model.safetensors") if ".lora_" not in name]
        listed = json.loads((out / "adapter_config.json").read_text())["modules_to_save"] or []
        assert all(name.removesuffix(".weight").endswith(tuple(listed)) for name in names)


@pytest.mark.parametrize("trained", [False, True])
def test_layer_saved_beside_its_factors_is_the_base_s(tmp_path: Path, trained: bool) -> None:
    """PEFT saves an embedding that it targets along; the factors mean nothing on top of any other one."""
    base = save_base(tmp_path / "base", "llama")
    adapter = train(tmp_path / "a", base, 1, ["embed_tokens"])
    layer = "base_model.model.model.embed_tokens.base_layer.weight"
    if not trained:
        wanted = baked(base, adapter)
        edit_tensors(adapter, lambda t: t | {layer: t[layer].bfloat16()})
        assert_close(changed(adapter, base, tmp_path / "out"), wanted)
        return
    edit_tensors(adapter, lambda t: t | {layer: t[layer] + 0.1 * (torch.arange(96) == 95)[:, None]})
    with pytest.raises(InputError, match=r"embed_tokens\.weight: the layer .* is not the base's"):
        changed(adapter, base, tmp_path / "out")


# ---- where the config comes from, and how names find their place


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its adapters, which no test changes."""
    return llama_adapters(tmp_path_factory.mktemp("llama"))


def changed(path: Path, base: Path, out: Path, **options: Any) -> State:
    """The base with one adapter baked in by us."""
    merging.merge([path], method="task_arithmetic", base=base, kind="model", output=out, **options)
    return base_state(out)


RENAMINGS: dict[str, Callable[[str], str]] = {
    ".default. in the names": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix of PEFT's": lambda name: name.removeprefix("base_model.model."),
    "no prefix of the model's": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "a wrapper's prefix": lambda name: name.replace(
        "base_model.model.model.", "base_model.model.language_model.model."
    ),
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
    """Its scale is 1, which one notice says; lora_alpha= sets it."""
    other = copied(llama, tmp_path / "a") / "other.safetensors"
    (other.parent / "adapter_model.safetensors").rename(other)
    at_one = baked(llama / "base", edit_config(copied(llama, tmp_path / "b"), lora_alpha=4))
    done = merging.merge([other], method="linear", base=llama / "base", kind="model", output=tmp_path / "one")
    assert [notice for notice in done.notices if "lora_alpha=" in notice] == list(done.notices)
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
