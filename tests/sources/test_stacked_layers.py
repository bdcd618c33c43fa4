"""Stacks of layers: their tensors bit for bit, settings by block in config.json, heads, scales, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, equal

import merging
from merging.errors import InputError, OptionError
from support.tiny import CONFIG, fine_tune, load, model, save

TYPES = ["sliding", "sliding", "full", "sliding", "sliding", "full"]


def stack(folder: Path, *parts: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of a stack; a part is a folder's name and a range, and perhaps a scale."""
    keys = ("model", "layers", "scale")
    stated = [{"model": str(folder / part[0]), **dict(zip(keys[1:], part[1:], strict=False))} for part in parts]
    stacked = merging.LayerStack.model_validate({"stack": stated})
    merging.merge([stacked], method="passthrough", output=folder / "out", overwrite=True, **options)
    return load(folder / "out"), json.loads((folder / "out" / "config.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models of six blocks, ``a`` and ``b``, whose configs state settings by block."""
    config = {**CONFIG, "num_hidden_layers": 6, "layer_types": TYPES}
    save(tmp_path / "a", model(0, layers=6), config)
    save(tmp_path / "b", model(1, layers=6), config)
    return tmp_path


def block(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def with_config(folder: Path, **settings: Any) -> None:
    for name in ("a", "b"):
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 6, **settings}))


def test_blocks_of_two_models(folder: Path) -> None:
    tensors, config = stack(folder, ("a", "0:4"), ("b", "2:5"), ("a", "5:6"))
    a, b = load(folder / "a"), load(folder / "b")
    order = [(a, 0), (a, 1), (a, 2), (a, 3), (b, 2), (b, 3), (b, 4), (a, 5)]
    for place, (source, index) in enumerate(order):
        got, want = block(tensors, place), block(source, index)
        assert got.keys() == want.keys()
        assert all(equal(got[name], want[name]) for name in want)
    assert len(tensors) == len(a) + 2 * 2
    assert (config["num_hidden_layers"], config["layer_types"]) == (8, [TYPES[index] for _, index in order])
    assert equal(tensors["lm_head.weight"], a["lm_head.weight"])


def test_ends_come_from_the_first_and_the_last_part(folder: Path) -> None:
    tensors, _ = stack(folder, ("a", "0:3"), ("b", "3:6"))
    a, b = load(folder / "a"), load(folder / "b")
    assert equal(tensors["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert equal(tensors["model.norm.weight"], b["model.norm.weight"])
    assert equal(tensors["lm_head.weight"], b["lm_head.weight"])


@pytest.mark.parametrize("alike", [True, False])
def test_heads_that_are_tied(tmp_path: Path, alike: bool) -> None:
    """The head of the last part's model is its own embedding, so that a tied head is written unless both are equal."""
    config = {**CONFIG, "tie_word_embeddings": True, "num_hidden_layers": 3}
    tied = {name: value for name, value in model(0).items() if name != "lm_head.weight"}
    other = fine_tune(tied, 1)
    other = other | ({"model.embed_tokens.weight": tied["model.embed_tokens.weight"]} if alike else {})
    save(tmp_path / "a", tied, config)
    save(tmp_path / "b", other, config)
    tensors, written = stack(tmp_path, ("a", "0:2"), ("b", "1:3"))
    assert ("lm_head.weight" in tensors) != alike
    assert written["tie_word_embeddings"] is alike
    if not alike:
        assert equal(tensors["lm_head.weight"], other["model.embed_tokens.weight"])
    tensors, written = stack(tmp_path, ("a", "0:2"), ("a", "1:3"))
    assert "lm_head.weight" not in tensors
    assert written["tie_word_embeddings"] is True


def test_scales_by_name(folder: Path) -> None:
    tensors, _ = stack(folder, ("a", "0:3"), ("a", "1:3", {"up_proj": 0, "layernorm": "1:3", "*": 1}), ("a", "3:6"))
    a = load(folder / "a")
    assert not tensors["model.layers.3.mlp.up_proj.weight"].any()
    for place, factor in ((3, 1), (4, 3)):
        want = a[f"model.layers.{place - 2}.input_layernorm.weight"] * factor
        assert equal(tensors[f"model.layers.{place}.input_layernorm.weight"], want)
    assert equal(tensors["model.layers.2.mlp.up_proj.weight"], a["model.layers.2.mlp.up_proj.weight"])
    with pytest.raises(OptionError, match=r"no pattern matches model.layers.0.input_layernorm"):
        stack(folder, ("a", "0:3", {"mlp": 0, "embed": 1}))


def test_products_are_rounded_once_to_the_type_of_the_output(tmp_path: Path) -> None:
    save(tmp_path / "a", model(0, dtype=torch.bfloat16))
    tensors, _ = stack(tmp_path, ("a", "0:1", {"up_proj": 0.7071, "*": 1}), dtype="float32")
    want = load(tmp_path / "a")["model.layers.0.mlp.up_proj.weight"].float() * 0.7071
    assert equal(tensors["model.layers.0.mlp.up_proj.weight"], want)


def test_stacks_are_models_of_other_merges(folder: Path) -> None:
    """A stack is merged with others like any model: its blocks are counted from 0."""
    stacks = [merging.LayerStack.model_validate({"model": str(folder / name), "layers": "2:5"}) for name in "ab"]
    merging.merge(stacks, method="linear", weights=[0.25, 0.75], output=folder / "out", dtype="float64")
    a, b, got = load(folder / "a"), load(folder / "b"), load(folder / "out")
    for place in range(3):
        for name in block(a, 0):
            want = block(a, place + 2)[name].double() * 0.25 + block(b, place + 2)[name].double() * 0.75
            assert torch.allclose(block(got, place)[name], want, rtol=0, atol=1e-12)
    assert json.loads((folder / "out" / "config.json").read_text())["layer_types"] == TYPES[2:5]


@pytest.mark.parametrize(
    ("settings", "parts", "want"),
    [
        ({"layer_types": ["x"] * 6}, [("a", "0:2")], {"layer_types": ["x"] * 2}),
        ({"mlp_types": [1, 2, 3, 4, 5, 6]}, [("a", "4:6"), ("b", "0:1")], {"mlp_types": [5, 6, 1]}),
        ({"compress_ratios": [0, 4, 8, 4, 8, 0]}, [("a", "1:4")], {"compress_ratios": [4, 8, 4]}),
        ({"no_rope_layers": [1, 1, 1, 0, 1, 1]}, [("a", "2:5")], {"no_rope_layers": [1, 0, 1]}),
        ({"hybrid_override_pattern": "M-M*M-"}, [("a", "2:5")], {"hybrid_override_pattern": "M*M"}),
        ({"mlp_only_layers": [0, 4]}, [("a", "0:1"), ("a", "3:6")], {"mlp_only_layers": [0, 2]}),
        ({"first_k_dense_replace": 2}, [("a", "1:6"), ("a", "3:6")], {"first_k_dense_replace": 1}),
        ({"max_window_layers": 28}, [("a", "0:6"), ("a", "0:6")], {"max_window_layers": 28}),
        ({"max_window_layers": 6}, [("a", "0:6"), ("a", "0:6")], {"max_window_layers": 12}),
        ({"num_kv_shared_layers": 2}, [("a", "0:3"), ("a", "3:6")], {"num_kv_shared_layers": 2}),
        ({"eos_token_id": [1, 2, 3, 4, 5, 6]}, [("a", "0:2")], {"eos_token_id": [1, 2, 3, 4, 5, 6]}),
        ({"sliding_window_pattern": 3}, [("a", "0:3"), ("a", "0:6")], {"sliding_window_pattern": 3}),
        ({"model_type": "gemma2"}, [("a", "1:3"), ("a", "1:2")],
         {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, [("a", "1:4")],
         {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
)  # fmt: skip
def test_settings_by_block(folder: Path, settings: dict[str, Any], parts: list[Any], want: dict[str, Any]) -> None:
    with_config(folder, **settings)
    _, config = stack(folder, *parts)
    assert {key: config[key] for key in want} == want


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        ({"first_k_dense_replace": 2}, [("a", "0:3"), ("a", "1:6")], r"the first blocks .* block 3 of the stack"),
        ({"num_kv_shared_layers": 2}, [("a", "0:6"), ("a", "0:2")], r"the last blocks .* at the end"),
        ({"sliding_window_pattern": 3}, [("a", "1:6")], r"every 3 blocks differ .* block 1 cannot become block 0"),
        ({"attn_layer_period": 2}, [("a", "0:3"), ("a", "2:6")], r"block 2 cannot become block 3: move blocks"),
        ({"hidden_size_per_layer_input": 4}, [("a", "0:3")], "one table of embeddings for all of its blocks"),
        ({}, [("a", "0:7")], r"has 6 blocks \(model.layers.0 to model.layers.5\), and 0:7 is asked for"),
        ({}, [("a", "decoder=0:3")], r"has no stack of blocks 'decoder': model.layers \(6 blocks\)"),
    ],
)  # fmt: skip
def test_stacks_that_are_refused(folder: Path, settings: dict[str, Any], parts: list[Any], message: str) -> None:
    with_config(folder, **settings)
    with pytest.raises(InputError, match=message):
        stack(folder, *parts)
    assert not (folder / "out").exists()


def test_models_that_are_built_otherwise(folder: Path) -> None:
    save(folder / "wide", model(2, layers=6, width=16), {**CONFIG, "num_hidden_layers": 6})
    with pytest.raises(InputError, match=r"has the shape \(16,\), and .*a has \(8,\): blocks of models of one width"):
        stack(folder, ("a", "0:2"), ("wide", "0:2"))
    tensors = {name.replace("up_proj", "fc"): value for name, value in model(2, layers=6).items()}
    save(folder / "other", tensors, {**CONFIG, "num_hidden_layers": 6})
    with pytest.raises(
        InputError, match=r"other has model.layers.0.mlp.fc.weight, and no block of .*a has such a tensor"
    ):
        stack(folder, ("a", "0:2"), ("other", "0:2"))
    with_config(folder, layer_types=TYPES)
    (folder / "b" / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 6}))
    with pytest.raises(InputError, match=r"b: its config.json has no layer_types with a value for each"):
        stack(folder, ("a", "0:2"), ("b", "0:2"))


def test_tensors_are_copied_in_their_types(folder: Path) -> None:
    halves = {name: value.bfloat16() for name, value in model(3, layers=6).items()}
    save(folder / "half", halves, {**CONFIG, "num_hidden_layers": 6})
    tensors, _ = stack(folder, ("half", "0:2"), ("half", "1:6"))
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())
    widened, config = stack(folder, ("half", "0:2"), ("half", "1:6"), dtype="float32")
    assert all(equal(widened[name], value.float()) for name, value in tensors.items())
    assert config["dtype"] == "float32"
    halves["model.norm.weight"][0] = torch.nan
    save(folder / "half", halves, {**CONFIG, "num_hidden_layers": 6})
    with pytest.raises(InputError, match=r"half.*model.norm.weight holds NaN or infinite values"):
        stack(folder, ("half", "0:2"))
    stack(folder, ("half", "0:2"), allow_nonfinite=True)
