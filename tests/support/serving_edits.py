"""What is done to a sound file, so that some program refuses or ignores a part of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.adapters import State, edit_config, edit_tensors, peft, reload, train

__all__ = [
    "SERVED",
    "Edit",
    "again",
    "alone",
    "base_says",
    "both",
    "holds",
    "named",
    "of_type",
    "removed",
    "renamed",
    "saved_plainly",
    "says",
    "settings",
    "sharded",
    "unindexed",
    "with_nan",
    "without",
    "written",
]

Edit = Callable[[Path], Path]


SERVED = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
"""Targets that every program takes."""


def again(targets: Any = SERVED, base: str = "llama", **config: Any) -> Edit:
    """Another adapter in the place of the plain one, as PEFT trains and saves it."""

    def edit(folder: Path) -> Path:
        settings = json.loads((folder / "adapter_config.json").read_text())
        shutil.rmtree(folder)
        return train(folder, Path(settings["base_model_name_or_path"]).with_name(base), 3, targets, **config)

    return edit


def of_type(config: Any) -> Edit:
    """An adapter of another type."""

    def edit(folder: Path) -> Path:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        shutil.rmtree(folder)
        peft.get_peft_model(reload(Path(base)), deepcopy(config)).save_pretrained(folder)  # PEFT notes the base in it
        return folder

    return edit


def says(**fields: Any) -> Edit:
    return lambda folder: edit_config(folder, **fields)


def holds(change: Callable[[State], State]) -> Edit:
    """Other tensors in an adapter's file, or in a model's."""

    def edit(folder: Path) -> Path:
        if (folder / "adapter_model.safetensors").exists():
            return edit_tensors(folder, change)
        file = folder / "model.safetensors"
        save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file, {"format": "pt"})
        return folder

    return edit


def named(change: Callable[[str], str]) -> Edit:
    return holds(lambda state: {change(name): value for name, value in state.items()})


def without(part: str) -> Edit:
    return holds(lambda state: {name: value for name, value in state.items() if part not in name})


def both(one: Edit, other: Edit) -> Edit:
    return lambda path: other(one(path))


def alone(path: Path) -> Path:
    """The file out of its folder."""
    file = next(path.glob("*model.safetensors"))
    return file.rename(path.with_name(f"{path.name}.safetensors"))


def with_nan(state: State) -> State:
    first = min(state)
    return state | {first: state[first].index_fill(0, torch.tensor([0]), torch.nan)}


def settings(**fields: Any) -> Edit:
    """Other fields in a model's config; None removes one."""

    def edit(folder: Path) -> Path:
        file = next(folder / name for name in ("model_index.json", "config.json") if (folder / name).exists())
        config = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return edit


def base_says(**fields: Any) -> Edit:
    """Other fields in the config of an adapter's base, which is a copy."""

    def edit(folder: Path) -> Path:
        path = folder / "adapter_config.json"
        base = json.loads(path.read_text())["base_model_name_or_path"]
        copy = shutil.copytree(base, folder.with_name(f"{folder.name}-base"))
        settings(**fields)(copy)
        return edit_config(folder, base_model_name_or_path=str(copy))

    return edit


def renamed(old: str, new: str) -> Edit:
    def edit(folder: Path) -> Path:
        (folder / old).rename(folder / new)
        return folder

    return edit


def removed(name: str) -> Edit:
    def edit(folder: Path) -> Path:
        (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)
        return folder

    return edit


def written(name: str, content: Any) -> Edit:
    def edit(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(content))
        return folder

    return edit


def sharded(folder: Path) -> Path:
    """An index without metadata, of one shard."""
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    return written("model.safetensors.index.json", index)(folder)


def unindexed(folder: Path) -> Path:
    """All shards of a model, without their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(part, folder / f"model-0000{number + 1}-of-00002.safetensors", {"format": "pt"})
    return folder


def saved_plainly(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file(load_file(file), file)
    return folder
