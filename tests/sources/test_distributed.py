"""Folders of torch.distributed.checkpoint and checkpoints of Lightning: read in place, and no code in them run."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from argparse import Namespace
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import filesystem, save
from torch.distributed.checkpoint import metadata as dcp

import merging
from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.sources import Checkpoint
from support.checkpoints import values
from support.commands import ok
from support.tiny import Tensors, fine_tune, identical, load, model


def opened(path: Path) -> Tensors:
    found = open_model(path)
    assert isinstance(found, Checkpoint)
    return values(found)


def save_distributed(folder: Path, state: dict[str, Any]) -> Path:
    """A checkpoint as one process saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, that there is one process
        save(state, checkpoint_id=folder)
    return folder


def states(tensors: Tensors) -> dict[str, Any]:
    """States of an optimizer, which are twice the size of the model."""
    return {name: {"exp_avg": torch.ones_like(value), "step": torch.tensor(3.0)} for name, value in tensors.items()}


@pytest.mark.parametrize("key", ["model", "state_dict", ""])
def test_a_distributed_checkpoint(key: str, tmp_path: Path) -> None:
    """The model's tensors under their own names, whatever else the program saved with them."""
    tensors = model(1, dtype=torch.bfloat16)
    state = {key: tensors} if key else dict(tensors)
    folder = save_distributed(tmp_path / "step-5", {**state, "optimizer": states(tensors), "train_state": {"step": 5}})
    assert identical(opened(folder), tensors)
    ok("-m", "passthrough", folder, "-o", tmp_path / "plain")
    assert identical(load(tmp_path / "plain"), tensors)


def shard(folder: Path, tensors: Tensors, ranks: int, axis: int = 0) -> Path:
    """The same, cut along an axis as several processes of FSDP save it: a file each, and one list."""
    folder.mkdir()
    listed, places = {}, {}
    offsets = dict.fromkeys(range(ranks), 0)
    for name, value in tensors.items():
        cut = axis if value.dim() > axis else 0
        chunks, start = [], 0
        for rank, piece in enumerate(value.tensor_split(ranks, cut)):
            offset = torch.Size(start if each == cut else 0 for each in range(value.dim()))
            start += piece.shape[cut]
            chunks.append(dcp.ChunkStorageMetadata(offset, piece.shape))
            file = folder / f"__{rank}_0.distcp"
            with file.open("ab") as stream:
                torch.save(piece.clone(), stream)
            size = file.stat().st_size - offsets[rank]
            place = filesystem._StorageInfo(file.name, offsets[rank], size)
            places[dcp.MetadataIndex(f"model.{name}", offset)] = place
            offsets[rank] += size
        properties = dcp.TensorProperties(value.dtype)
        listed[f"model.{name}"] = dcp.TensorStorageMetadata(properties, value.shape, chunks)
    paths: Any = {f"model.{name}": ("model", name) for name in tensors}
    content = dcp.Metadata(listed, planner_data=paths, storage_data=places)  # type: ignore[arg-type]
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return folder


def test_shards_of_several_processes(tmp_path: Path) -> None:
    """As torch itself loads them; a norm of 8 rows on 3 processes is cut unevenly."""
    tensors = model(2)
    folder = shard(tmp_path / "sharded", tensors, 3)
    wanted = {name: torch.zeros_like(value) for name, value in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.load({"model": wanted}, checkpoint_id=folder)  # type: ignore[attr-defined]
    assert identical(wanted, tensors)
    assert identical(opened(folder), tensors)
    found = open_model(folder)
    assert isinstance(found, Checkpoint)
    piece = torch.empty(50)  # from the second file into the third
    found.tensors["model.layers.0.mlp.up_proj.weight"].read_into(piece, 60)
    assert torch.equal(piece, tensors["model.layers.0.mlp.up_proj.weight"].flatten()[60:110])


def test_a_run_of_fsdp(tmp_path: Path) -> None:
    """transformers' Trainer saves FSDP's shards in a folder of their own in each checkpoint."""
    runs = [fine_tune(model(), seed) for seed in range(2)]
    for step, tensors in zip((100, 200), runs, strict=True):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        shard(tmp_path / "run" / f"checkpoint-{step}" / "pytorch_model_fsdp_0", tensors, 2)
        save_distributed(tmp_path / "run" / f"checkpoint-{step}" / "optimizer_0", {"optimizer": states(tensors)})
    merging.soup(tmp_path / "run", output=tmp_path / "soup")
    for name, value in load(tmp_path / "soup").items():
        assert torch.allclose(value, (runs[0][name] + runs[1][name]) / 2)


class Payload:
    """Leaves a folder behind if it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_what_is_refused_names_the_remedy(tmp_path: Path) -> None:
    remedy = r"convert it with `python -m torch\.distributed\.checkpoint\.format_utils dcp_to_torch FOLDER model\.pt`"
    with pytest.raises(FormatError, match=f"cut along other axes than the first.*{remedy}"):
        open_model(shard(tmp_path / "columns", model(), 2, axis=1))
    folder = shard(tmp_path / "whole", model(), 2)
    for name, content, message in (
        (".metadata", b"\x80\x04N.", "its list has another value in the place of Metadata"),
        (".metadata", pickle.dumps(Payload(tmp_path / "trace")), "its list has another value"),
        ("__1_0.distcp", b"", "ends after 0 bytes, and should have"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(content)
        with pytest.raises(FormatError, match=f"{message}.*{remedy}"):
            open_model(copy)
        shutil.rmtree(copy)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"whole: its file __1_0\.distcp is missing: complete the checkpoint"):
        open_model(folder)
    assert not (tmp_path / "trace").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists(), "the payload is armed"


def lightning(path: Path, tensors: Tensors, **settings: Any) -> Path:
    """A checkpoint with the entries that Lightning writes."""
    state = {
        "epoch": 1, "global_step": 90, "pytorch-lightning_version": "2.5.0", "state_dict": tensors,
        "optimizer_states": [{"state": states(tensors)}], "lr_schedulers": [], "loops": {"fit_loop": {"done": True}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5)}},
        "hparams_name": "kwargs", "hyper_parameters": settings,
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
    return path


def test_checkpoints_of_lightning(tmp_path: Path) -> None:
    """Settings of any class stand next to the tensors: they are left out, and nothing of them is run."""
    tensors = [fine_tune(model(), seed) for seed in range(2)]
    odd = {
        "paths": Path("data"), "options": Namespace(rate=0.1, names={"a"}), "scores": np.float64(3),
        "queue": deque([1]), "counts": defaultdict(list, a=[1]), "array": np.ones(3),
        "payload": Payload(tmp_path / "trace"), "dtype": torch.bfloat16,
        "size": torch.Size([3]), "device": torch.device("cpu"),
    }  # fmt: skip
    files = [
        lightning(tmp_path / "checkpoints" / f"epoch={number}-step={90 * number + 90}.ckpt", each, **odd)
        for number, each in enumerate(tensors)
    ]
    lightning(tmp_path / "checkpoints" / "last.ckpt", tensors[1])
    assert identical(opened(files[0]), tensors[0])
    merging.soup(tmp_path, output=tmp_path / "soup.safetensors")
    for name, value in load(tmp_path / "soup.safetensors").items():
        assert torch.allclose(value, (tensors[0][name] + tensors[1][name]) / 2)
    assert not (tmp_path / "trace").exists()


def test_other_endings_take_no_objects(tmp_path: Path) -> None:
    file = lightning(tmp_path / "a.ckpt", model(), paths=Path("data"))
    shutil.copy(file, tmp_path / "a.pt")
    with pytest.raises(FormatError, match="holds more than tensors, and nothing in it is run: it names pathlib"):
        open_model(tmp_path / "a.pt")
