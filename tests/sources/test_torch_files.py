"""PyTorch's own files: read at their places, tied weights found, and no code in them run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.sources.checkpoint import open_checkpoint
from support.checkpoints import values
from support.tiny import CONFIG, checkpoint, identical, load, model


def torch_folder(folder: Path, state: Any, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """A folder with pytorch_model.bin."""
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin", **options)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def tied_state() -> dict[str, torch.Tensor]:
    """A state dict whose head is its embedding, as torch saves it."""
    state = model(1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def test_pickled_tensors_are_read(tmp_path: Path) -> None:
    tensors = model(1, dtype=torch.bfloat16)
    assert identical(values(open_checkpoint(torch_folder(tmp_path / "m", tensors))), tensors)
    assert identical(values(open_checkpoint(torch_folder(tmp_path / "n", {"state_dict": tensors}))), tensors)


def test_tied_weights_are_dropped_when_tied(tmp_path: Path) -> None:
    opened = open_checkpoint(torch_folder(tmp_path / "m", tied_state(), {"tie_word_embeddings": True}))
    assert opened.tensors.keys() == tied_state().keys() - {"lm_head.weight"}
    assert opened.lookup("lm_head.weight") is opened.tensors["model.embed_tokens.weight"]


def test_tied_weights_are_kept_when_the_config_unties_them(tmp_path: Path) -> None:
    """Otherwise the head would be missing, and transformers would draw it at random."""
    opened = open_checkpoint(torch_folder(tmp_path / "m", tied_state(), {"tie_word_embeddings": False}))
    assert opened.tensors.keys() == tied_state().keys()
    assert opened.shared == {"lm_head.weight": "model.embed_tokens.weight"}


def test_views_of_one_storage_that_differ_are_not_tied(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    state = {"a": whole[:6], "b": whole[6:], "c": whole.view(3, 4)}
    assert identical(values(open_checkpoint(torch_folder(tmp_path / "m", state))), state)


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    state = {"x.weight": torch.arange(12.0).view(3, 4).mT}
    opened = open_checkpoint(torch_folder(tmp_path / "m", state))
    assert torch.equal(opened.tensors["x.weight"].read(), state["x.weight"])


def test_pickled_shards(tmp_path: Path) -> None:
    tensors = model(1)
    parts = {"a.bin": dict(list(tensors.items())[:3]), "b.bin": dict(list(tensors.items())[3:])}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    listed = {key: name for name, part in parts.items() for key in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert identical(values(open_checkpoint(tmp_path)), tensors)


class Payload:
    """Leaves a file behind if it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder = torch_folder(tmp_path / "m", {**model(1), "x": Payload(tmp_path / "trace")})
    with pytest.raises(FormatError, match="holds more than tensors, and nothing in it is run"):
        open_model(folder)
    assert not (tmp_path / "trace").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists(), "the payload is armed"


@pytest.mark.parametrize("keep", [0, 100, -1, -200])
def test_truncated_pickle(tmp_path: Path, keep: int) -> None:
    folder = torch_folder(tmp_path / "m", model(1))
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: is (not|a damaged)"):
        open_model(folder)


def test_pickle_of_the_old_format(tmp_path: Path) -> None:
    folder = torch_folder(tmp_path / "m", model(1), _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="cannot be read lazily: load and save it as safetensors first"):
        open_model(folder)


@pytest.mark.parametrize("state", [[1, 2], {"epoch": 3, "x": torch.zeros(2)}, torch.zeros(3)])
def test_pickle_of_something_else(tmp_path: Path, state: object) -> None:
    with pytest.raises(FormatError, match="not a state dict"):
        open_model(torch_folder(tmp_path / "m", state))


def test_pickles_merge_like_safetensors(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path)
    pickled = [torch_folder(tmp_path / f"bin{i}", load(path), CONFIG) for i, path in enumerate(tuned)]
    merging.merge(tuned, method="linear", base=base, output=tmp_path / "one")
    merging.merge(pickled, method="linear", base=base, output=tmp_path / "other")
    assert identical(load(tmp_path / "one"), load(tmp_path / "other"))
