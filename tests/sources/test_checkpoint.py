"""Full checkpoints as they are found: files, shards, PyTorch's pickles, and all that must be refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources.checkpoint import Checkpoint, content_key, open_checkpoint
from merging.sources.quantized.quantized_weights import QUANTIZED
from support.checkpoints import values
from support.tiny import CONFIG, identical, model, save

INDEX = "model.safetensors.index.json"


def edit_index(folder: Path, **fields: Any) -> None:
    """Replace fields of a folder's index; None removes one."""
    index = json.loads((folder / INDEX).read_text()) | fields
    (folder / INDEX).write_text(json.dumps({key: value for key, value in index.items() if value is not None}))


def weight_map(folder: Path) -> dict[str, str]:
    """What a folder's index says lies where."""
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path, shards: int) -> None:
    tensors = model(1)
    opened = open_checkpoint(save(tmp_path / "m", tensors, shards=shards))
    assert identical(values(opened), tensors)
    assert len(opened.files) == shards
    assert opened.config == CONFIG
    assert not opened.tied


def test_file_and_index_are_opened_like_their_folder(tmp_path: Path) -> None:
    single, sharded = save(tmp_path / "one", model(1)), save(tmp_path / "two", model(2), shards=2)
    for path in (single / "model.safetensors", sharded / INDEX):
        opened = open_model(path)
        assert isinstance(opened, Checkpoint)
        assert (opened.folder, opened.config) == (path.parent, CONFIG)


def test_a_bare_file_has_no_config(tmp_path: Path) -> None:
    save_file(model(1), tmp_path / "weights.safetensors")
    opened = open_checkpoint(tmp_path / "weights.safetensors")
    assert (opened.folder, opened.config, opened.layers) == (None, {}, None)


def test_single_file_wins_over_index(tmp_path: Path) -> None:
    """As in transformers, where both lie side by side."""
    folder = save(tmp_path / "m", model(1), shards=2)
    save(folder, model(2))
    assert identical(values(open_checkpoint(folder)), model(2))


def test_pieces_of_a_tensor_are_read_at_their_place(tmp_path: Path) -> None:
    tensors = model(1)
    stored = open_checkpoint(save(tmp_path / "m", tensors)).tensors["lm_head.weight"]
    piece = torch.empty(7)
    stored.read_into(piece, 20)
    assert torch.equal(piece, tensors["lm_head.weight"].flatten()[20:27])


def test_shard_with_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    listed = weight_map(folder)
    shard = listed.pop("model.norm.weight")
    edit_index(folder, weight_map=listed)
    with pytest.raises(FormatError, match=rf"{shard}: holds model\.norm\.weight, which the index does not list"):
        open_checkpoint(folder)


def test_index_that_lists_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    listed = weight_map(folder)
    edit_index(folder, weight_map=listed | {"model.extra.weight": listed["model.norm.weight"]})
    with pytest.raises(FormatError, match=r"lacks model\.extra\.weight.*different saves"):
        open_checkpoint(folder)


def test_tensor_listed_in_the_wrong_shard(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    listed = weight_map(folder)
    other = next(shard for shard in listed.values() if shard != listed["model.norm.weight"])
    edit_index(folder, weight_map=listed | {"model.norm.weight": other})
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        open_checkpoint(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"its shard model-00002-of-00003\.safetensors is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard", ["../m/model.safetensors", "/etc/passwd", "a\\b", "", ".", "..", 7, None])
def test_shards_must_be_plain_file_names(tmp_path: Path, shard: object) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    edit_index(folder, weight_map=weight_map(folder) | {"model.norm.weight": shard})
    with pytest.raises(FormatError, match=re.escape(f"said to be in {shard!r}, which is not a plain file name")):
        open_checkpoint(folder)


@pytest.mark.parametrize("given", [None, {}, [1], "all"])
def test_index_without_weight_map(tmp_path: Path, given: object) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    edit_index(folder, weight_map=given)
    with pytest.raises(FormatError, match="has no weight_map"):
        open_checkpoint(folder)


def test_index_without_metadata_is_read(tmp_path: Path) -> None:
    """Nothing in it is needed, although transformers stumbles over its absence."""
    folder = save(tmp_path / "m", model(1), shards=2)
    edit_index(folder, metadata=None)
    assert identical(values(open_checkpoint(folder)), model(1))


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not valid JSON"), ("[1]", "holds a list"), ("[" * 99999, "not valid JSON")]
)
def test_index_and_config_that_are_no_json_object(tmp_path: Path, text: str, reason: str) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    (folder / INDEX).write_text(text)
    with pytest.raises(FormatError, match=f"{INDEX}.*{reason}"):
        open_checkpoint(folder)
    single = save(tmp_path / "n", model(1))
    (single / "config.json").write_text(text)
    with pytest.raises(FormatError, match=f"config.json.*{reason}"):
        open_checkpoint(single)


def test_folder_with_no_weights_or_several(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no weights: none of model.safetensors"):
        open_checkpoint(tmp_path / "empty")
    for name in ("x.safetensors", "y.safetensors"):
        save_file(model(1), tmp_path / "empty" / name)
    with pytest.raises(InputError, match=r"holds x\.safetensors, y\.safetensors: name the file"):
        open_checkpoint(tmp_path / "empty")


def test_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="holds no tensors"):
        open_checkpoint(tmp_path / "none.safetensors")


def test_missing_path_and_hub_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder, and no such model in the Hub"):
        open_model("org/name")
    with pytest.raises(InputError, match=r"no such file or folder$"):
        open_model(tmp_path / "nothing.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match="is not a weights file"):
        open_model(tmp_path / "notes.txt")


CODES = torch.zeros(4, dtype=torch.uint8)


NAMES = {
    key: f"model.layers.0.mlp{key}" if key.startswith(".") else f"model.layers.0.mlp.gate{key}" for key in QUANTIZED
}


@pytest.mark.parametrize("ending", QUANTIZED)
def test_quantised_by_the_name_of_a_tensor(tmp_path: Path, ending: str) -> None:
    folder = save(tmp_path / "m", {**model(1), NAMES[ending]: CODES})
    with pytest.raises(FormatError, match=re.escape(f"is quantised ({QUANTIZED[ending]}, says {NAMES[ending]})")):
        open_model(folder)


ON_DISK = {
    "bitsandbytes 4-bit": ("mlp.weight", "mlp.weight.absmax", "mlp.weight.quant_state.bitsandbytes__nf4"),
    "bitsandbytes 8-bit": ("mlp.weight", "mlp.SCB", "mlp.weight_format"),
    "GPTQ or AWQ": ("mlp.qweight", "mlp.qzeros", "mlp.scales", "mlp.g_idx"),
    "block FP8": ("mlp.weight_scale_inv",),
    "compressed-tensors": ("mlp.weight_packed", "mlp.weight_shape"),
    "MXFP4": ("experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"),
    "HQQ": ("mlp.W_q",),
    "AQLM": ("mlp.codes", "mlp.codebooks"),
}


@pytest.mark.parametrize("kind", ON_DISK)
def test_quantised_by_what_such_files_hold_together(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path / "m", {f"model.layers.0.{name}": CODES.clone() for name in ON_DISK[kind]})
    with pytest.raises(FormatError, match=re.escape(kind)):
        open_model(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantised_by_type(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "m", {"layer.weight": torch.zeros(4, 4).to(dtype)})
    with pytest.raises(FormatError, match=r"layer\.weight holds F8_.* codes, so the model is quantised"):
        open_model(folder)


@pytest.mark.parametrize("inner", [False, True])
def test_quantised_by_config(tmp_path: Path, inner: bool) -> None:
    stated: dict[str, Any] = {"quantization_config": {"quant_method": "hqq"}}
    folder = save(tmp_path / "m", model(1), {"text_config": stated} if inner else stated)
    with pytest.raises(FormatError, match=r"is quantised \(hqq, says its config\): merge the model it was made from"):
        open_model(folder)


def test_ordinary_names_are_not_taken_for_quantised(tmp_path: Path) -> None:
    tensors = {
        f"model.{name}": torch.zeros(2) for name in ("transformer_blocks.0.scale", "blocks", "absmax_pool.weight")
    }
    assert len(open_checkpoint(save(tmp_path / "m", tensors)).tensors) == 3


def test_a_single_shard_is_no_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=3)
    shard = folder / "model-00001-of-00003.safetensors"
    with pytest.raises(
        InputError, match=rf"is one of several shards of a model by its name: name their folder, {folder}"
    ):
        open_checkpoint(shard)
    assert open_checkpoint(folder).tensors.keys() == model(1).keys()


def test_content_keys_tell_models_apart(tmp_path: Path) -> None:
    """Also two that differ only in the middle of a large file, as fine-tunes of a few layers do."""
    tensors = {f"layers.{i}.weight": torch.zeros(64, 1024) for i in range(4)}
    other = tensors | {"layers.2.weight": torch.ones(64, 1024)}
    keys = [
        content_key(open_checkpoint(save(tmp_path / f"m{i}", t)).tensors)
        for i, t in enumerate([tensors, other, tensors])
    ]
    assert keys[0] == keys[2] != keys[1]
