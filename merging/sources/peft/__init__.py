"""PEFT's adapters: a folder with adapter_config.json, or a bare safetensors file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging.errors import FormatError, option
from merging.sources.adapter import Adapter
from merging.sources.changes import Change, LoraChange, Replacement
from merging.sources.computed import ComputedChange
from merging.sources.links import check_inside
from merging.sources.lora_headers import METADATA_KEY, component_configs, unstated_alpha
from merging.sources.opening import FileOpener, open_tensors
from merging.sources.peft.adapter_types import PEFT_TYPES, PeftType
from merging.sources.peft.config import Config, without_wrapped_layers
from merging.sources.peft.lora import TRAINING_STATE, lora_about
from merging.sources.peft.module import Module
from merging.sources.peft.trainable_tokens import TOKENS
from merging.sources.peft.unsupported_types import UNSUPPORTED
from merging.sources.small_files import is_there, parse_json, read_json
from merging.sources.stored import FileContents, Stored
from merging.sources.tied_weights import is_table
from merging.sources.token_rows import TokenRows
from merging.sources.training_leftovers import refuse_ungathered, without_wrappers

__all__ = ["CONFIG_KEY", "WEIGHTS", "open_peft", "peft_changes", "recognizes", "weights_of"]

CONFIG_KEY = "adapter_config"
"""The metadata entry in which our bare adapter files have their whole config."""

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The names of the weights in an adapter's folder of PEFT."""

_ADAPTERS_LIBRARY = ("adapter.safetensors", "pytorch_adapter.bin")
"""The names of the weights in an adapter's folder of the adapters library."""

_PREFIX = "base_model.model."
_DEFAULT = re.compile(r"\.default(?=\.|_topk_|$)")
"""The name of PEFT's only adapter, in files that were saved without PEFT's own function."""

_LORA = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")
_TRAINED = re.compile(rf"\.(?:lora_\w+|{re.escape(TOKENS)}|modules_to_save)(?:\.|$)")
"""Names of factors and of their like, of rows of tokens, and of modules saved in full."""

_ORIGINAL = ".original_module."
"""A part of the names of the base's own weights next to a module that is saved in full."""

_ANY = re.compile(rf"base_model\..*({'|'.join(kind.leaf.pattern for kind in PEFT_TYPES.values())})")


def recognizes(opened: FileContents) -> bool:
    """Whether a file has the tensor names of PEFT: LoRA under any prefix, the other types under PEFT's."""
    return any(_LORA.search(name) or _ANY.match(name) for name in opened[0])


def open_peft(
    path: Path,
    alpha: float | None = None,
    contents: FileContents | None = None,
    *,
    open_file: FileOpener = open_tensors,
) -> Adapter:
    """Open a PEFT adapter from its folder or its weights file; headers are read, values are not.

    ``alpha`` replaces the config's, whatever its type calls it. A bare file has its config in its own header, as this
    program or diffusers writes it, or next to it if it is called ``adapter_model``. Without a config its scale is 1,
    which the adapter's notices say. ``open_file`` opens the weights. Raises :class:`~merging.errors.FormatError` for an
    adapter that cannot be understood.
    """
    weights = path if path.is_file() else weights_of(path)
    tensors, metadata = contents or without_wrappers(open_file(weights))
    refuse_ungathered(path, tensors)
    config = _config_of(weights, metadata)
    notices: tuple[str, ...] = ()
    if config is None:
        config = {}
        if alpha is None:
            plain = (
                f"{path}: carries no config, so its scale alpha / r is taken as 1: set it with {option('lora_alpha')}"
            )
            notices = unstated_alpha(path, metadata) or (plain,)
    settings = Config(config, str(path))
    if alpha is not None and settings.kind in PEFT_TYPES:
        field = PEFT_TYPES[settings.kind].alpha
        if not field:
            raise settings.error(f"is of type {settings.kind}, which has no alpha: leave {option('lora_alpha')} out")
        config = {**config, field: alpha, "alpha_pattern": {}}
        settings = Config(config, str(path))
    trained = _without_frozen(tensors, settings)
    copies = len(tensors) - len(trained)
    if copies:
        notices += (
            f"{path}: {copies} of its {len(tensors)} tensors are copies of the base's own weights, which its config "
            f"does not train: left out",
        )
    return Adapter(
        path=path,
        changes=peft_changes(trained, config, str(path)),
        files=(weights,),
        dialect=f"PEFT {settings.kind}",
        base=settings.text("base_model_name_or_path"),
        config=config,
        notices=notices,
        about=lora_about(settings) if settings.kind == "LORA" else PEFT_TYPES[settings.kind].summary,
    )


def weights_of(folder: Path) -> Path:
    """Return the weights in an adapter's folder. Raises :class:`~merging.errors.FormatError` without any."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return check_inside(folder / name, folder)
    other = next((name for name in _ADAPTERS_LIBRARY if (folder / name).is_file()), None)
    if other is not None:
        raise FormatError(
            f"{folder}: is an adapter of the adapters library, and not of PEFT: to average adapters that have one "
            f"name, name their files, such as {folder / other}"
        )
    raise FormatError(f"{folder}: has an adapter_config.json, but neither adapter_model.safetensors nor .bin")


def _without_frozen(tensors: Mapping[str, Stored], settings: Config) -> dict[str, Stored]:
    """Return the tensors without copies of the base's weights, as in files of a wrapped model's whole ``state_dict``.

    Weights of layers without factors count as copies only if layers with factors have their copies too. Tables of
    tokens are kept in any case, and show nothing: PEFT saves them itself, as their vocabulary may have grown.
    """
    kept = {name: stored for name, stored in tensors.items() if _ORIGINAL not in name}
    tables = {name for name in kept if is_table(without_wrapped_layers(name))}
    wrapped = {name.partition(".base_layer.")[0] for name in kept.keys() - tables if ".base_layer.weight" in name}
    factors = {name[: found.start()] for name in kept if (found := _LORA.search(name)) and not found[1]}
    if not settings.stated or not wrapped & factors:
        return kept
    biases = settings.get("bias", "none") != "none"
    return {
        name: stored
        for name, stored in kept.items()
        if _TRAINED.search(name)
        or (name.partition(".base_layer.")[0] not in factors and ".base_layer." in name)
        or name in tables
        or settings.saves(name)
        or (biases and name.endswith(".bias"))
    }


def _config_of(weights: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    sidecar = weights.parent / "adapter_config.json"
    if weights.stem == "adapter_model" and is_there(sidecar):
        return read_json(sidecar)
    if CONFIG_KEY not in metadata:
        return _component_config(weights, metadata)
    return parse_json(metadata[CONFIG_KEY], f"{weights}: the {CONFIG_KEY} in its header")


def _component_config(weights: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the config that diffusers wrote into a header; several cannot be told apart by this file's names."""
    configs = list(component_configs(weights, metadata).values())
    if any(each != configs[0] for each in configs):
        raise FormatError(
            f"{weights}: the {METADATA_KEY} in its header has {len(configs)} configs, and the names of its tensors do "
            f"not tell which is theirs: save every component in a file of its own"
        )
    return {"peft_type": "LORA", **configs[0]} if configs else None


def peft_changes(tensors: Mapping[str, Stored], config: Mapping[str, Any], where: str) -> dict[str, Change]:
    """Return the changes in the tensors of a PEFT file, by target; an empty ``config`` means a LoRA of scale 1.

    Raises :class:`~merging.errors.FormatError` for a type that is not read, for a variant that changes the base in a
    way that the file does not determine, and for any unknown name.
    """
    settings = Config(config, where)
    kind = _kind(settings, tensors)
    kind.check(settings)
    settings.check_common()
    modules, others = _modules(tensors, kind, settings)
    changes = {change.target: change for module in modules for change in kind.changes(module)}
    for name, stored in others.items():
        target = settings.full_target(name)
        factors = changes.get(target)
        if isinstance(factors, TokenRows) and not factors.fits(stored.shape):
            raise settings.error(f"{name} has the shape {stored.shape}, and no place for the rows saved along with it")
        if isinstance(factors, (LoraChange, ComputedChange, TokenRows)):
            changes[target] = replace(factors, layer=stored)
            continue
        changes[target] = Replacement(
            target,
            "bias" if target.endswith(".bias") and not settings.saves(target) else "full",
            value=stored,
            needs_base="it is saved in full, and what it changes is the difference from the base",
        )
    if not modules and not changes:
        raise settings.error(f"is a PEFT adapter of type {settings.kind} by its config, and holds nothing of one")
    _check_complete(settings, changes)
    return changes


def _check_complete(config: Config, changes: Mapping[str, Change]) -> None:
    """Refuse an adapter that lacks tensors which its config mentions in addition to the factors of modules."""
    if config.get("trainable_token_indices") and not any(change.kind == "tokens" for change in changes.values()):
        raise config.error("its config has trainable_token_indices, and the file no rows of tokens: it is incomplete")
    parameters = config.names("target_parameters")
    ends = tuple(f".{each}" for each in parameters)
    if parameters and not any(f".{target}".endswith(ends) for target in changes):
        raise config.error(f"its config names the parameter {parameters[0]}, and the file has no factors for it")


def _kind(config: Config, names: Iterable[str]) -> PeftType:
    """Return the type of an adapter. Refuse a type that is not read."""
    name = config.kind
    if not config.stated and not any(_LORA.search(each) for each in names):
        name = next((kind for kind in PEFT_TYPES if any(PEFT_TYPES[kind].leaf.search(each) for each in names)), name)
        if name != "LORA":
            raise config.error(
                f"holds tensors of a PEFT adapter of type {name}, which needs its config to be understood: give the "
                f"folder with its adapter_config.json"
            )
    if name in PEFT_TYPES:
        return PEFT_TYPES[name]
    reason = UNSUPPORTED.get(name, f"this type is not known here: {', '.join(PEFT_TYPES)} are read")
    raise config.error(f"is a PEFT adapter of type {name}: {reason}")


def _modules(tensors: Mapping[str, Stored], kind: PeftType, config: Config) -> tuple[list[Module], dict[str, Stored]]:
    """Return the modules that an adapter changes, and the tensors of no module, by their names in the model."""
    leaf = kind.leaf
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    shared: dict[str, Stored] = {}
    others: dict[str, Stored] = {}
    for key, stored in tensors.items():
        name = _DEFAULT.sub("", key).removeprefix(_PREFIX)
        if name.removeprefix("base_model.") in kind.shared:
            shared[name.removeprefix("base_model.")] = stored
        elif found := leaf.search(name):
            parts[name[: found.start()]][found[1] + (".bias" if found[2] == ".bias" else "")] = stored
        elif not any(f".{state}" in name for state in TRAINING_STATE):
            others[name] = stored
    return [Module(path, pieces, config, shared, parts) for path, pieces in parts.items()], others
