"""Folders and files as savers and trainers leave them: tied copies, nests, wrappers, shards without an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources import Adapter
from merging.sources.checkpoint import Checkpoint
from support.tiny import identical, load, model, save

INDEX = "model.safetensors.index.json"


def values(opened: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in opened.tensors.items()}


def list_in_index(folder: Path, name: str) -> None:
    """Have an index say that a tensor is in the shard of the shared embedding."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = index["weight_map"]["shared.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def save_t5(folder: Path, seed: int) -> Path:
    """A tiny Flan-T5 whose index lists a copy of its shared embedding that no shard holds, as google/flan-t5-xl's."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, tie_word_embeddings=False,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="4KB")
    list_in_index(folder, "encoder.embed_tokens.weight")
    return folder


def test_index_that_lists_a_tied_copy_which_no_shard_holds(tmp_path: Path) -> None:
    """transformers loads such a model, and what is merged of it."""
    one, two = save_t5(tmp_path / "a", 1), save_t5(tmp_path / "b", 2)
    states = [T5ForConditionalGeneration.from_pretrained(each).state_dict() for each in (one, two)]
    merging.merge([one, two], method="linear", output=tmp_path / "out")
    found = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == states[0].keys()
    for name, value in found.items():
        assert torch.allclose(value, (states[0][name] + states[1][name]) / 2, atol=1e-7), name


def test_index_that_lists_a_tensor_no_shard_holds_is_refused(tmp_path: Path) -> None:
    folder = save_t5(tmp_path / "a", 1)
    list_in_index(folder, "decoder.gone.weight")
    with pytest.raises(FormatError, match=r"lacks decoder.gone.weight: .* get them again together"):
        open_model(folder)


@pytest.mark.parametrize(
    "nest", [("model",), ("module",), ("state_dict",), ("model_state_dict",), ("state_dict", "model")]
)
def test_state_dicts_inside_of_what_trainers_save(tmp_path: Path, nest: tuple[str, ...]) -> None:
    state: Any = model(1)
    for name in nest:
        state = {name: state, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(state, tmp_path / "m.pt")
    opened = open_model(tmp_path / "m.pt")
    assert isinstance(opened, Checkpoint)
    assert identical(values(opened), model(1))


def test_two_state_dicts_in_one_file_are_not_chosen_from(tmp_path: Path) -> None:
    torch.save({"model": model(1), "module": model(2)}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match="save its state dict as safetensors"):
        open_model(tmp_path / "m.pt")


def wrapped(name: str, style: str) -> str:
    """A tensor's name under a wrapper for training, around the model or inside of it."""
    if style == "inner":
        return name.replace("model.", "model._orig_mod.", 1) if name.startswith("model.") else name
    return style + name


@pytest.mark.parametrize("style", ["_orig_mod.", "module.", "module._orig_mod.", "inner"])
def test_wrappers_of_training_are_taken_off_the_names(tmp_path: Path, style: str) -> None:
    """What torch.compile and data-parallel training put before names; the output has those that libraries load."""
    state = {wrapped(name, style): value for name, value in model(1).items()}
    plain, other = save(tmp_path / "plain", model(1)), save(tmp_path / "other", model(2))
    for first, out in ((save(tmp_path / "wrapped", state), "one"), (plain, "two")):
        merging.merge([first, other], method="linear", output=tmp_path / out)
    assert identical(load(tmp_path / "one"), load(tmp_path / "two"))


def test_a_folder_with_a_model_and_an_adapter_asks_which(tmp_path: Path) -> None:
    """Each way that is named opens the one it names."""
    folder = save(tmp_path / "m", model(1))
    factors = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(InputError, match=r"holds a full model .* and an adapter .* name the file") as refused:
        open_model(folder)
    ways = str(refused.value).partition("that is meant: ")[2].split(" or ")
    assert [type(open_model(way)) for way in ways] == [Checkpoint, Adapter]
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="and the config of an adapter") as refused:
        open_model(folder)
    opened = open_model(str(refused.value).partition("that is meant: ")[2])
    assert isinstance(opened, Checkpoint) and opened.config


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_without_an_index(tmp_path: Path, form: str) -> None:
    state = list(model(1).items())
    for number in (1, 2):
        part = dict(state[number - 1 :: 2])
        path = tmp_path / f"model-{number:05}-of-00002.{form}"
        save_file(part, path) if form == "safetensors" else torch.save(part, path)
    opened = open_model(tmp_path)
    assert isinstance(opened, Checkpoint)
    assert identical(values(opened), model(1))
    (tmp_path / f"model-00001-of-00002.{form}").unlink()
    with pytest.raises(InputError, match=rf"1 of the 2 shards .* model-00001-of-00002.{form} is missing: complete"):
        open_model(tmp_path)


def test_a_folder_of_adapters_or_models_says_what_is_there(tmp_path: Path) -> None:
    save(tmp_path / "runs" / "one", model(1))
    save(tmp_path / "runs" / "two", model(2))
    with pytest.raises(InputError, match="but folders that do: name those to merge: ") as refused:
        open_model(tmp_path / "runs")
    names = str(refused.value).partition("to merge: ")[2].split(", ")
    assert [type(open_model(name)) for name in names] == [Checkpoint, Checkpoint]
