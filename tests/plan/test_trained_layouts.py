"""Adapters as trainers leave them: fused and renamed layouts and odd prefixes are baked as PEFT bakes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from support.adapters import (
    QUIRKS,
    State,
    assert_close,
    baked,
    base_state,
    copied,
    edit_tensors,
    peft,
    reload,
    save_base,
    train,
)
from support.architectures import ARCHITECTURES, DECODER, EXPERTS, HEAD, VISION, tiny

UNMATCHED = "ignore:The following (rank|alpha)_pattern keys did not match any targeted module:RuntimeWarning"
pytestmark = [*QUIRKS, pytest.mark.filterwarnings(UNMATCHED)]

LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
HYBRID = {**DECODER, **HEAD, **LINEAR, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
SEEING = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
STACKED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
GATED = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj"]

MODELS: dict[str, tuple[Callable[[], Any], list[str], dict[str, Any]]] = {
    "llama": (ARCHITECTURES["llama"], ["q_proj", "up_proj"], {}),
    "qwen2-vl": (ARCHITECTURES["qwen2-vl"], ["q_proj", "up_proj", "qkv"], {}),
    "llava": (ARCHITECTURES["llava"], ["q_proj", "up_proj", "linear_1"], {}),
    "gemma3": (
        tiny(
            "Gemma3Config",
            "Gemma3ForConditionalGeneration",
            text_config={**DECODER, **HEAD},
            vision_config=VISION,
            mm_tokens_per_image=4,
        ),
        ["q_proj", "up_proj"],
        {},
    ),
    "qwen3-moe": (ARCHITECTURES["qwen3-moe"], ["q_proj"], STACKED),
    "gpt-oss": (ARCHITECTURES["gpt-oss"], ["q_proj"], STACKED),
    "qwen3-next": (ARCHITECTURES["qwen3-next"], ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"], STACKED),
    "qwen3.5-text": (tiny("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", HYBRID), GATED, {}),
    "qwen3.5": (
        tiny("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", text_config=HYBRID, vision_config=SEEING),
        [*GATED, "qkv"],
        {},
    ),
    "qwen3.5-moe": (
        tiny(
            "Qwen3_5MoeConfig",
            "Qwen3_5MoeForConditionalGeneration",
            text_config={**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 40},
            vision_config=SEEING,
        ),
        GATED,
        STACKED,
    ),
}
"""A builder, the targets, and more settings of the adapter."""

NAMES: dict[str, list[tuple[str, str]]] = {
    "as PEFT saves it": [],
    "default": [(r"\.(lora_[AB])\.weight", r".\1.default.weight")],
    "wrapped twice": [("^", "base_model.model.")],
    "model.model": [(r"^base_model\.model\.", "base_model.model.model.")],
    "bare": [(r"^base_model\.model\.", "")],
    "compiled": [("^", "_orig_mod.")],
    "compiled inside": [(r"^base_model\.model\.", "base_model.model._orig_mod.")],
    "compiled layers": [(r"((?:layers|blocks)\.\d+\.)", r"\1_orig_mod.")],
    "FSDP": [
        ("^", "_fsdp_wrapped_module."),
        (r"((?:layers|blocks)\.\d+\.)", r"\1_fsdp_wrapped_module."),
        (r"(lora_[AB])", r"\1.default._fsdp_wrapped_module"),
    ],
    "checkpointed": [(r"((?:layers|blocks)\.\d+\.)", r"\1_checkpoint_wrapped_module.")],
    "data-parallel": [("^", "module.")],
    "language_model.model": [(r"model\.language_model\.", "language_model.model."), (r"\.model\.visual", ".visual")],
    "before transformers 4.52": [(r"model\.language_model\.", "model."), (r"\.model\.visual", ".visual")],
    "behind language_model": [(r"^base_model\.model\.model\.layers", "base_model.model.model.language_model.layers")],
}
"""Replacements in the names that PEFT saves."""


def renamed(tensors: State, style: str) -> State:
    named: State = {}
    for name, value in tensors.items():
        for pattern, meant in NAMES[style]:
            name = re.sub(pattern, meant, name)
        named[name] = value
    return named


def check_styles(folder: Path, model: str, styles: list[str]) -> None:
    """Under all names, the adapter is baked as PEFT bakes it under its own."""
    build, targets, settings = MODELS[model]
    torch.manual_seed(3)
    build().save_pretrained(folder / "base")
    adapter = train(folder / "adapter", folder / "base", 1, targets, **settings)
    wanted = baked(folder / "base", adapter)
    before = load_file(adapter / "adapter_model.safetensors")
    for style in styles:
        if NAMES[style] and renamed(before, style).keys() == before.keys():
            continue
        shutil.copytree(adapter, folder / style)
        edit_tensors(folder / style, lambda tensors, style=style: renamed(tensors, style))
        merging.bake([folder / style], base=folder / "base", output=folder / "out" / style)
        assert_close(base_state(folder / "out" / style), wanted)


@pytest.mark.parametrize("model", ["llama", "qwen2-vl", "qwen3.5-moe"])
def test_layouts(tmp_path: Path, model: str) -> None:
    few = {
        "llama": ["FSDP", "model.model"],
        "qwen2-vl": ["before transformers 4.52", "language_model.model"],
        "qwen3.5-moe": ["as PEFT saves it", "language_model.model"],
    }
    check_styles(tmp_path, model, few[model])


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", MODELS)
def test_all_layouts(tmp_path: Path, model: str) -> None:
    check_styles(tmp_path, model, list(NAMES))


def trained(base: Path, config: peft.PeftConfig, rows: int = 0) -> peft.PeftModel:
    """Return a wrapped model whose trained tensors all differ from the base's."""
    model = reload(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = peft.get_peft_model(model, config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=random))
    return wrapped


def whole_state(model: peft.PeftModel, folder: Path, kept: str = "") -> None:
    """Save tensors of a wrapped model's ``state_dict()`` in place of PEFT's."""
    state = {name: value.clone() for name, value in model.state_dict().items() if re.search(kept, name)}
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


DUMPS: dict[str, tuple[dict[str, Any], str]] = {
    "trained tensors": ({"modules_to_save": ["lm_head"]}, r"lora_|modules_to_save"),
    "with the original of a saved module": ({"modules_to_save": ["lm_head"]}, r"lora_|modules_to_save|original_module"),
    "with the table of trained rows": ({"trainable_token_indices": [1, 5]}, r"lora_|token_adapter"),
    "with the weights of its layers": ({}, r"lora_|base_layer"),
    "the whole state": ({"modules_to_save": ["lm_head"]}, ""),
    "the whole state with biases": ({"bias": "all"}, ""),
}
"""Settings, and the tensors of the wrapped model's ``state_dict()`` that are saved instead of PEFT's."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama"), "llama-biases")


@pytest.mark.parametrize("case", DUMPS)
def test_state_dicts_of_wrapped_models(llama: Path, tmp_path: Path, case: str) -> None:
    """Copies of the base's own weights are left out, and the adapter says so."""
    settings, kept = DUMPS[case]
    model = trained(llama, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **settings))
    model.save_pretrained(tmp_path / "a")
    wanted = baked(llama, tmp_path / "a")
    whole_state(model, tmp_path / "a", kept)
    copies = any("are copies of the base" in each for each in open_model(tmp_path / "a").notices)
    assert copies == (case not in ("trained tensors", "with the table of trained rows"))
    merging.bake([tmp_path / "a"], base=llama, output=tmp_path / "out")
    assert_close(base_state(tmp_path / "out"), wanted)


def test_state_of_adalora(llama: Path, tmp_path: Path) -> None:
    model = trained(llama, peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10))
    model.save_pretrained(tmp_path / "a")
    wanted = baked(llama, tmp_path / "a")
    whole_state(model, tmp_path / "a")
    merging.bake([tmp_path / "a"], base=llama, output=tmp_path / "out")
    assert_close(base_state(tmp_path / "out"), wanted)


def test_state_with_a_saved_module_that_the_config_does_not_list(llama: Path, tmp_path: Path) -> None:
    """PEFT adds the heads of classifiers by itself, and older releases do not write them into the config."""
    model = trained(llama, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "a")
    wanted = baked(llama, tmp_path / "a")
    whole_state(model, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": None}))
    merging.bake([tmp_path / "a"], base=llama, output=tmp_path / "out")
    assert_close(base_state(tmp_path / "out"), wanted)


def test_unknown_table_next_to_a_head_with_factors_is_no_copy(llama: Path, tmp_path: Path) -> None:
    """PEFT saves tables with factors itself, so their copies do not show that a file is a model's whole state."""
    model = trained(llama, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    model.save_pretrained(tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda t: {**t, "base_model.model.model.tok_embeddings.weight": torch.ones(96, 32)})
    with pytest.raises(FormatError, match=r"tok_embeddings\.weight is neither a LoRA factor"):
        open_model(tmp_path / "a")


TOKENS: dict[str, Callable[[list[int]], peft.PeftConfig]] = {
    "in a LoRA": lambda rows: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows),
    "alone": lambda rows: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=rows),
}
"""Configs of adapters with these rows of tokens."""


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("kind", TOKENS)
def test_rows_of_tokens_saved_with_their_table(tmp_path: Path, name: str, kind: str) -> None:
    """The rows take the place of the rows of the table, which must be the base's."""
    base, adapter = save_base(tmp_path / "base", name), tmp_path / "a"
    model = trained(base, TOKENS[kind]([1, 5]))
    model.save_pretrained(adapter, save_embedding_layers=True)
    wanted = model.merge_and_unload().state_dict()
    tables = [each for each in load_file(adapter / "adapter_model.safetensors") if "embed_tokens" in each]
    assert len(tables) == 2
    merging.bake([adapter], base=base, output=tmp_path / "out")
    assert_close(base_state(tmp_path / "out"), wanted)
    edit_tensors(adapter, lambda t: {key: t[key] + 1 if "base_layer" in key else t[key] for key in t})
    with pytest.raises(InputError, match=r"the layer saved along with its rows is not the base's"):
        merging.bake([adapter], base=base, output=tmp_path / "again")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", TOKENS)
def test_rows_of_tokens_of_a_vocabulary_that_has_grown(tmp_path: Path, kind: str) -> None:
    base, adapter = save_base(tmp_path / "base", "llama-tied"), tmp_path / "a"
    model = trained(base, TOKENS[kind]([1, 100]), rows=104)
    model.save_pretrained(adapter)
    wanted = model.merge_and_unload().state_dict()
    merging.bake([adapter], base=base, output=tmp_path / "out")
    assert_close(base_state(tmp_path / "out"), wanted)
    edit_tensors(adapter, lambda t: {key: t[key][:99] if "base_layer" in key else t[key] for key in t})
    with pytest.raises(FormatError, match=r"no place for the rows saved along with it"):
        open_model(adapter)


@pytest.mark.parametrize("missing", ["lora_", "lora_B", "layers.0.self_attn.q_proj", "lm_head"])
def test_weights_that_zero_3_did_not_gather(llama: Path, tmp_path: Path, missing: str) -> None:
    adapter = train(tmp_path / "a", llama, 1, ["q_proj"], modules_to_save=["lm_head"])
    edit_tensors(adapter, lambda t: {name: torch.zeros(0) if missing in name else value for name, value in t.items()})
    for path in (adapter, shutil.copy(adapter / "adapter_model.safetensors", tmp_path / "alone.safetensors")):
        with pytest.raises(FormatError, match=r"is empty \(\d of 5 tensors are\): DeepSpeed's ZeRO-3"):
            open_model(path)


def test_checkpoints_that_zero_3_or_fsdp_did_not_gather(llama: Path, tmp_path: Path) -> None:
    state = load_file(llama / "model.safetensors")
    empty = {name: torch.zeros(0) if "q_proj" in name else value for name, value in state.items()}
    save_file(empty, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"q_proj\.weight is empty"):
        open_model(tmp_path / "a.safetensors")
    save_file({"model.layers.0._fsdp_wrapped_module._flat_param": torch.ones(9)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match=r"is a flat parameter of FSDP.*FULL_STATE_DICT"):
        open_model(tmp_path / "b.safetensors")


def test_a_name_that_is_no_factor_is_refused_still(llama: Path, tmp_path: Path) -> None:
    adapter = copied(tmp_path, tmp_path / "b", str(train(tmp_path / "a", llama, 1, ["q_proj"])))
    edit_tensors(adapter, lambda tensors: {**tensors, "base_model.model.model.norm.weight": torch.ones(32)})
    with pytest.raises(FormatError, match=r"norm\.weight is neither a LoRA factor"):
        open_model(adapter)


def test_head_that_no_adapter_saved_grows_with_the_embedding(tmp_path: Path) -> None:
    """PEFT saves the tables that it targets alone, and a model with tables of two sizes does not load."""
    base, adapter = save_base(tmp_path / "base", "llama"), tmp_path / "a"
    model = trained(base, peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]), rows=104)
    model.save_pretrained(adapter)
    wanted = model.merge_and_unload().state_dict()
    head = base_state(base)["lm_head.weight"]
    made = merging.bake([adapter], base=base, output=tmp_path / "out")
    wanted["lm_head.weight"] = torch.cat([head, head.mean(0).expand(8, -1)])
    assert_close(base_state(tmp_path / "out"), wanted)
    assert any("lm_head.weight: no model has rows of it for the new tokens" in line for line in made.notices)
