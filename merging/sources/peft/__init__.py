"""PEFT's adapters: a folder with adapter_config.json, or a bare safetensors file."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.adapter import Adapter, Change, LoraChange, Replacement
from merging.sources.checkpoint import read_json
from merging.sources.peft.config import Config
from merging.sources.peft.kinds import KINDS
from merging.sources.peft.module import Module
from merging.sources.stored import Opened, Stored, open_tensors

__all__ = ["CONFIG_KEY", "WEIGHTS", "open_peft", "peft_changes", "recognises"]

CONFIG_KEY = "adapter_config"
"""The metadata entry in which our bare adapter files carry their whole config."""

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the weights in an adapter's folder."""

_PREFIX = "base_model.model."


def recognises(names: Mapping[str, Stored]) -> bool:
    """Whether these are the tensor names of a PEFT LoRA file."""
    return any(".lora_A" in name or ".lora_embedding_A" in name or ".lora_B" in name for name in names)


def open_peft(path: Path, alpha: float | None = None, opened: Opened | None = None) -> Adapter:
    """A PEFT adapter from its folder or its weights file; headers are read, values are not.

    ``alpha`` replaces the config's ``lora_alpha``. A bare file has its config in its own header or, if it is called
    ``adapter_model``, beside it; with neither its scale is 1, which the adapter's notices say. Raises
    :class:`~merging.errors.FormatError` for what cannot be understood exactly.
    """
    weights = path if path.is_file() else _weights_of(path)
    tensors, metadata = opened or open_tensors(weights)
    config = _config_of(weights, metadata)
    notices: tuple[str, ...] = ()
    if config is None:
        config = {}
        if alpha is None:
            notices = (f"{path}: carries no config, so its scale alpha / r is taken as 1: set it with --lora-alpha",)
    if alpha is not None:
        config = {**config, "lora_alpha": alpha, "alpha_pattern": {}}
    where = str(path)
    return Adapter(
        path=path,
        changes=peft_changes(tensors, config, where),
        files=(weights,),
        dialect="PEFT LoRA",
        base=Config(config, where).text("base_model_name_or_path"),
        config=config,
        notices=notices,
    )


def _weights_of(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FormatError(f"{folder}: has an adapter_config.json, but neither adapter_model.safetensors nor .bin")


def _config_of(weights: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    sidecar = weights.parent / "adapter_config.json"
    if weights.stem == "adapter_model" and sidecar.is_file():
        return read_json(sidecar)
    if CONFIG_KEY not in metadata:
        return None
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise FormatError(f"{weights}: the {CONFIG_KEY} in its header is not a JSON object")
    return config


def peft_changes(tensors: Mapping[str, Stored], config: Mapping[str, Any], where: str) -> dict[str, Change]:
    """What the tensors of a PEFT file change, by target; ``config`` may be empty, which means a LoRA of scale 1.

    Raises :class:`~merging.errors.FormatError` for a type that is not read, for a variant that changes the base in a
    way the file does not tell, and for any name that has no place.
    """
    settings = Config(config, where)
    name = config.get("peft_type", "LORA")
    if name not in KINDS:
        raise settings.error(f"is a PEFT adapter of type {name}; only LORA is read so far")
    kind = KINDS[name]
    kind.check(settings)
    leaf = kind.leaf
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    others: dict[str, Stored] = {}
    for key, stored in tensors.items():
        name = re.sub(r"\.default(?=\.|$)", "", key).removeprefix(_PREFIX)
        found = leaf.search(name)
        if found:
            parts[name[: found.start()]][found[1] + (".bias" if found[2] == ".bias" else "")] = stored
        else:
            others[name] = stored
    changes: dict[str, Change] = {}
    for path, pieces in parts.items():
        for change in kind.changes(Module(path, pieces, settings)):
            changes[change.target] = change
    for name, stored in others.items():
        target = settings.full_target(name)
        factors = changes.get(target)
        if isinstance(factors, LoraChange):
            changes[target] = replace(factors, layer=stored)
            continue
        changes[target] = Replacement(
            target,
            "bias" if target.endswith(".bias") and not settings.saves(target) else "full",
            value=stored,
            needs_base="it is saved in full, and what it changes is the difference from the base",
        )
    if not changes:
        raise settings.error("holds no LoRA factors")
    return changes
