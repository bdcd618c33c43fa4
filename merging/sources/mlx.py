"""Adapters of MLX (mlx-lm): LoRA and DoRA with factors called ``lora_a`` and ``lora_b``, and layers trained in full.

Both factors are transposed, ``lora_a`` is ``[in, r]`` and ``lora_b`` is ``[r, out]``, and the config states the scale
itself instead of an alpha."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging.errors import FormatError, option
from merging.sources.adapter import Adapter
from merging.sources.changes import Change, LoraChange, Replacement
from merging.sources.opening import open_tensors
from merging.sources.peft.config import Config
from merging.sources.peft.module import Module
from merging.sources.small_files import is_there, read_json
from merging.sources.stored import FileContents, Stored
from merging.sources.tensor_views import view
from merging.sources.tied_weights import is_head, is_table

__all__ = ["WEIGHTS", "open_mlx", "recognizes"]

WEIGHTS = "adapters.safetensors"
"""The name of the weights in an adapter's folder of MLX, and the end of the names of its checkpoints."""

_CONFIG = "adapter_config.json"
_LEAF = re.compile(r"\.(lora_a|lora_b|m)$")
_EXPERTS = re.compile(r"^(?P<block>.*\.)switch_mlp\.(?P<part>gate|up|down)_proj$")
"""The projections of all experts of a layer, which MLX stacks."""

_MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}
"""Mixtral's own names of an expert's projections."""


def recognizes(opened: FileContents) -> bool:
    """Whether a file has pairs of MLX's factors."""
    names = opened[0]
    return any(name.endswith(".lora_a") and f"{name.removesuffix('a')}b" in names for name in names)


def open_mlx(path: Path, alpha: float | None = None, opened: FileContents | None = None) -> Adapter:
    """Open such a file as an adapter, with the config next to it.

    ``alpha`` replaces the scale that the config states: the scale becomes alpha / r. Raises
    :class:`~merging.errors.FormatError` for a file without a scale, and for any unknown name.
    """
    tensors, _ = opened or open_tensors(path)
    config = _config_of(path)
    kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
    stated = config.get("lora_parameters")
    settings = Config(stated if isinstance(stated, dict) else {}, f"{path}: lora_parameters in its {_CONFIG}")
    if alpha is None and kind != "full" and "scale" not in settings.fields:
        raise FormatError(
            f"{path}: is an adapter of MLX without its {_CONFIG}, which states its scale: keep both in one folder, or "
            f"give an alpha with {option('lora_alpha')} (alpha / rank is the scale)"
        )
    modules: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    others: dict[str, Stored] = {}
    for name, stored in tensors.items():
        leaf = _LEAF.search(name)
        if leaf:
            modules[name[: leaf.start()]][leaf[1]] = stored
        else:
            others[name] = stored
    if others and kind != "full":
        raise FormatError(f"{path}: {next(iter(others))} is not a tensor that an adapter of MLX is known to hold")
    changes: list[Change] = [_replacement(name, stored) for name, stored in others.items()]
    for name, parts in modules.items():
        changes += _changes(Module(name, parts, Config({}, str(path))), settings, alpha)
    return Adapter(
        path=path,
        changes={change.target: change for change in changes},
        files=(path,),
        dialect="MLX",
        base=Config(config, str(path)).text("model"),
        about={"dora": "low-rank factors, DoRA", "full": "layers trained in full"}.get(kind, "low-rank factors"),
    )


def _config_of(path: Path) -> dict[str, Any]:
    sidecar = path.parent / _CONFIG
    return read_json(sidecar) if path.name.endswith(WEIGHTS) and is_there(sidecar) else {}


def _replacement(name: str, stored: Stored) -> Replacement:
    reason = "it is saved in full, and what it changes is the difference from the base"
    return Replacement(name, "full", value=stored, needs_base=reason)


def _changes(module: Module, settings: Config, alpha: float | None) -> Iterator[Change]:
    """Yield the changes of a module: one, or one for each expert of a layer."""
    experts = _EXPERTS.match(module.path)
    if experts:
        yield from _expert_changes(module, experts, settings, alpha)
        return
    size = module.sizes(lora_a="i r", lora_b="r o", **({"m": "n"} if "m" in module.parts else {}))
    embedding = is_table(module.target) and not is_head(module.target)
    magnitude = module.parts.get("m")
    if magnitude is not None and (embedding or magnitude.numel != size["o"]):
        raise module.error(f"its {magnitude.numel} magnitudes are not read: a linear layer has {size['o']}")
    yield LoraChange(
        module.target,
        "embedding" if embedding else "linear",
        view(module.part("lora_a")).permute(1, 0),
        view(module.part("lora_b")).permute(1, 0),
        _scale(settings, size["r"], alpha),
        transposed=embedding,
        magnitude=magnitude,
        needs_base="DoRA gives every output of the base's weight a new length" if magnitude is not None else None,
    )


def _expert_changes(
    module: Module, found: re.Match[str], settings: Config, alpha: float | None
) -> Iterator[LoraChange]:
    """Yield the changes of all experts; ``lora_a`` is ``[E, r, in]`` or ``[E * r, in]``, ``lora_b`` ``[E, out, r]``."""
    down, up = module.part("lora_a"), module.part("lora_b")
    if len(up.shape) == 3 and len(down.shape) == 2 and down.shape[0] == up.shape[0] * up.shape[2]:
        down = view(down, up.shape[0], up.shape[2], down.shape[1])
    module = replace(module, parts={**module.parts, "lora_a": down})
    size = module.sizes(lora_a="E r i", lora_b="E o r")
    mixtral = found["block"].endswith("block_sparse_moe.")
    part = _MIXTRAL[found["part"]] if mixtral else f"{found['part']}_proj"
    for number in range(size["E"]):
        yield LoraChange(
            f"{found['block']}experts.{number}.{part}.weight",
            "linear",
            view(down).select(number),
            view(up).select(number),
            _scale(settings, size["r"], alpha),
        )


def _scale(settings: Config, rank: int, alpha: float | None) -> float:
    return settings.number("scale", 1) if alpha is None else alpha / rank
