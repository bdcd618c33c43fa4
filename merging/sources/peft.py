"""PEFT's LoRA adapters: a folder with adapter_config.json, or a bare safetensors file."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

from merging.errors import FormatError
from merging.sources.adapter import Adapter, AddedBias, Change, LoraChange, Replacement
from merging.sources.checkpoint import HEADS, read_json
from merging.sources.stored import Opened, Stored, open_tensors

__all__ = ["CONFIG_KEY", "WEIGHTS", "open_peft", "peft_changes", "recognises"]

CONFIG_KEY = "adapter_config"
"""The metadata entry in which our bare adapter files carry their whole config."""

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the weights in an adapter's folder."""

_PREFIX = "base_model.model."
_LEAF = re.compile(r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(\.weight|\.bias)?$")
_PLAIN_STARTS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal", "mica")
_LOST_STARTS = {
    "corda": "it started from statistics of data that the file does not hold",
    "lora_ga": "it started from gradients that the file does not hold",
    "loftq": "its base was replaced by a quantised approximation of it",
}
_CONVERT = (
    "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain LoRA"
)
_UNSUPPORTED = {
    "layer_replication": "it was trained on a base with repeated layers",
    "target_parameters": "it changes expert parameters, which are not read yet",
    "trainable_token_indices": "it holds trained token rows, which are not read yet",
    "use_qalora": "its factors are grouped for a quantised base (QALoRA)",
    "use_bdlora": "its factors are block diagonal (BD-LoRA)",
    "arrow_config": "it routes between experts at run time (Arrow)",
    "alora_invocation_tokens": "it acts only on what follows certain tokens (aLoRA)",
    "kasa_config": "its base was cut to a lower rank at the start (KaSA)",
}
_CATASTROPHIC = re.compile(r"\([^)]*[*+}][^)]*\)[*+{]")


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
        base=_text(config, "base_model_name_or_path", where),
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
    """What the tensors of a PEFT LoRA file change, by target; ``config`` may be empty, which means scale 1.

    Raises :class:`~merging.errors.FormatError` for another PEFT type, for a variant that changes the base in a way
    the file does not tell, and for any name that has no place.
    """
    start = _check_config(config, where)
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    others: dict[str, Stored] = {}
    for key, stored in tensors.items():
        name = re.sub(r"\.default(?=\.|$)", "", key).removeprefix(_PREFIX)
        leaf = _LEAF.search(name)
        if leaf:
            parts[name[: leaf.start()]][leaf[1] + (".bias" if leaf[2] == ".bias" else "")] = stored
        else:
            others[name] = stored
    changes: dict[str, Change] = {}
    for module, pieces in parts.items():
        for change in _lora(module, pieces, config, start, where):
            changes[change.target] = change
    for name, stored in others.items():
        target = _full_target(name, config, where)
        factors = changes.get(target)
        if isinstance(factors, LoraChange):
            changes[target] = replace(factors, layer=stored)
            continue
        changes[target] = Replacement(
            target,
            "bias" if target.endswith(".bias") and not _saved_module(target, config) else "full",
            value=stored,
            needs_base="it is saved in full, and what it changes is the difference from the base",
        )
    if not changes:
        raise FormatError(f"{where}: holds no LoRA factors")
    return changes


def _check_config(config: Mapping[str, Any], where: str) -> Literal["pissa", "olora"] | None:
    """Refuse what is no LoRA that the file tells completely; the start that must be taken off, if any."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise FormatError(f"{where}: is a PEFT adapter of type {kind}; only LORA is read so far")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise FormatError(f"{where}: cannot be merged: {reason} ({key} in its config)")
    start = config.get("init_lora_weights", True)
    if start in ("pissa", "olora"):
        return "pissa" if start == "pissa" else "olora"
    if isinstance(start, str) and start.startswith("pissa_niter_"):
        raise FormatError(f"{where}: started from a random SVD ({start}) that cannot be repeated: {_CONVERT}")
    if start not in _PLAIN_STARTS:
        reason = _LOST_STARTS.get(str(start), "this start is not known")
        raise FormatError(f"{where}: cannot be merged as it is: {reason} (init_lora_weights = {start!r}): {_CONVERT}")
    return None


def _lora(
    module: str,
    pieces: dict[str, Stored],
    config: Mapping[str, Any],
    start: Literal["pissa", "olora"] | None,
    where: str,
) -> list[Change]:
    embedding = "lora_embedding_A" in pieces or "lora_embedding_B" in pieces
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in names:
        if name not in pieces:
            raise FormatError(f"{where}: {module} has no {name}: the file is incomplete, save or download it again")
    down, up = pieces[names[0]], pieces[names[1]]
    rank = down.shape[0] if down.shape else 0
    if len(up.shape) != len(down.shape) or len(up.shape) not in (2, 3, 4, 5) or up.shape[1] != rank or rank == 0:
        raise FormatError(f"{where}: {module}: factors of shapes {down.shape} and {up.shape} do not multiply")
    if any(size != 1 for size in up.shape[2:]):
        raise FormatError(f"{where}: {module}: its up factor {up.shape} has a kernel, which no LoRA has")
    for stored in (down, up):
        if not stored.floating:
            raise FormatError(f"{where}: {module} holds {stored.kind} factors: only F16, BF16, F32 and F64 are read")
    scale = _scale(module, rank, config, where)
    magnitude = pieces.get("lora_magnitude_vector")
    if config.get("use_dora") and magnitude is None:
        raise FormatError(f"{where}: {module} has no lora_magnitude_vector, and its config says DoRA: it is incomplete")
    reasons = {
        "DoRA gives every output of the base's weight a new length": magnitude is not None,
        f"{start} took a part of the base's weight away at the start": start is not None,
    }
    changes: list[Change] = [
        LoraChange(
            f"{module}.weight",
            "embedding" if embedding else "linear" if len(up.shape) == 2 else "conv",
            down,
            up,
            scale,
            transposed=embedding or (len(up.shape) == 2 and bool(config.get("fan_in_fan_out"))),
            magnitude=magnitude,
            start=start,
            needs_base=next((reason for reason, holds in reasons.items() if holds), None),
        )
    ]
    if "lora_B.bias" in pieces:
        changes.append(AddedBias(f"{module}.bias", "bias", pieces["lora_B.bias"], scale))
    known = {*names, "lora_magnitude_vector", "lora_B.bias"}
    unknown = next((name for name in pieces if name not in known), None)
    if unknown:
        raise FormatError(f"{where}: {module}.{unknown} has no place beside {names[0]} and {names[1]}")
    return changes


def _scale(module: str, rank: int, config: Mapping[str, Any], where: str) -> float:
    stated = _pattern(config, "rank_pattern", module, config.get("r", rank), where)
    if stated != rank:
        raise FormatError(
            f"{where}: {module} has rank {rank}, and its config says {stated}: they do not belong together"
        )
    # A config that leaves alpha out means PEFT's default, no config at all means scale 1.
    default = config.get("lora_alpha", 8 if "peft_type" in config else rank)
    alpha = _pattern(config, "alpha_pattern", module, default, where)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise FormatError(f"{where}: lora_alpha of {module} is {alpha!r}, and should be a number")
    if config.get("use_rslora"):
        return alpha / sqrt(rank)
    return alpha / rank


def _pattern(config: Mapping[str, Any], field: str, module: str, default: Any, where: str) -> Any:
    """The first value whose key matches the end of the module's path as a regular expression, as PEFT looks it up."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise FormatError(f"{where}: {field} in its config is no mapping")
    for key, value in patterns.items():
        if len(key) > 1000 or _CATASTROPHIC.search(key):
            raise FormatError(f"{where}: the {field} {key[:80]!r} could take for ever to match: write it out")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise FormatError(f"{where}: the {field} {key!r} is no regular expression: {error}") from None
    return default


def _full_target(name: str, config: Mapping[str, Any], where: str) -> str:
    """The base's tensor that one saved in full replaces, or a refusal of a name that has no place."""
    target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    biases = config.get("bias", "none") in ("all", "lora_only") and target.endswith(".bias")
    if biases or target != name or _saved_module(target, config):
        return target
    saved = config.get("modules_to_save") or []
    raise FormatError(
        f"{where}: {name} is neither a LoRA factor nor part of a module saved in full "
        f"(modules_to_save: {', '.join(map(str, saved)) or 'none'})"
    )


def _saved_module(target: str, config: Mapping[str, Any]) -> bool:
    if config.get("ensure_weight_tying") and target.endswith(HEADS):
        return True  # the head is saved along with the embedding that it is tied to
    saved = config.get("modules_to_save") or []
    parts = target.split(".")[:-1]
    paths = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return any(isinstance(module, str) and module in paths for module in saved)


def _text(config: Mapping[str, Any], key: str, where: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{where}: {key} in its config is {value!r}, and should be a name")
    return value or None
