"""LoRA files with flat names: of Kohya's sd-scripts and musubi-tuner, of LyCORIS, OneTrainer and Tencent.

The flat name ``lora_unet_mid_block_attentions_0_proj_in`` comes from ``mid_block.attentions.0.proj_in``. Its
underscores cannot be turned back into dots, so flat names are kept until a base provides the names of its modules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, sqrt
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.adapter import Adapter
from merging.sources.changes import Change
from merging.sources.lora_headers import (
    alphas_differ,
    base_facts,
    component_configs,
    config_of,
    unstated_alpha,
)
from merging.sources.lycoris import leaf_of, module_changes, zero_alphas
from merging.sources.lycoris.products import number, scale_of
from merging.sources.opening import open_tensors
from merging.sources.peft.config import Config
from merging.sources.peft.module import Module
from merging.sources.stored import FileContents, Stored

__all__ = ["open_kohya", "recognizes"]

_FLAT = re.compile(
    r"(?:lora_(?:unet|te\d?|transformer|prior_unet|prior|text_encoder)|lycoris|oft_(?:unet|te)|Hunyuan_video_I2V_lora)"
    r"_[^.]+\."
)
"""Flat names with a known prefix."""

_DOWN = re.compile(r"[^.]+\.lora_down\.weight")
_EMBEDDINGS = ("bundle_emb.", "emb_params", "string_to_param")


def recognizes(opened: FileContents) -> bool:
    """Whether a file has flat module names: some with a known prefix, or only pairs of LoRA's down and up."""
    names = opened[0]
    return any(_FLAT.match(name) for name in names) or (
        any(_DOWN.fullmatch(name) for name in names) and all(_is_flat(name) for name in names)
    )


def _is_flat(name: str) -> bool:
    found = leaf_of(name)
    return found is not None and "." not in found[0]


def open_kohya(path: Path, alpha: float | None = None, opened: FileContents | None = None) -> Adapter:
    """Open such a file as an adapter; of the values only alphas are read.

    ``alpha`` replaces the stated alphas. Raises :class:`~merging.errors.FormatError` for any unknown name.
    """
    tensors, metadata = opened or open_tensors(path)
    where = str(path)
    modules: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    for name, stored in tensors.items():
        if name.startswith(_EMBEDDINGS):
            raise FormatError(
                f"{path}: holds a textual-inversion embedding ({name}), which is not a LoRA: take it out first"
            )
        module, _, rest = name.partition(".")
        found = leaf_of(name)
        leaf = "weight" if rest == "weight" else found[1] if found and found[0] == module else None
        if leaf is None:
            raise FormatError(f"{path}: {name} is not a tensor that a Kohya or LyCORIS file is known to hold")
        if leaf in modules[module]:
            raise FormatError(f"{path}: {name} is there twice, under two names")
        modules[module][leaf] = stored
    configs = {name: _HeaderConfig.of(config, where) for name, config in component_configs(path, metadata).items()}
    stated = any("alpha" in parts for parts in modules.values())
    notices = () if configs or stated or alpha is not None else unstated_alpha(path, metadata)
    changes: list[Change] = []
    for module, parts in modules.items():
        config = config_of(configs, f"{module}.weight") if alpha is None and "lora_down" in parts else None
        own = alpha
        if config is not None:
            rank = max((1, *parts["lora_down"].shape[:1]))
            own = config.alpha(module, rank)
            stated_alpha = number(Module(module, parts, config.settings), "alpha") if "alpha" in parts else own
            if not isclose(scale_of(stated_alpha, rank), scale_of(own, rank), rel_tol=1e-2):
                raise alphas_differ(path, f"{module}.alpha")
        changes += module_changes(module, parts, where, own)
    if not configs and alpha is None:
        notices += zero_alphas(tensors, where)
    return Adapter(
        path=path,
        changes={change.target: change for change in changes},
        files=(path,),
        dialect="Kohya",
        base=metadata.get("ss_base_model_version"),
        config=base_facts(metadata),
        notices=notices,
    )


@dataclass(frozen=True, slots=True)
class _HeaderConfig:
    """A config of diffusers in the header, and its ``alpha_pattern`` by flat names."""

    settings: Config
    alphas: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> _HeaderConfig:
        settings = Config({"peft_type": "LORA", **config}, where)
        patterns = settings.get("alpha_pattern") or {}
        flat = (
            {str(key).replace(".", "_"): each for key, each in patterns.items()} if isinstance(patterns, dict) else {}
        )
        return cls(settings, flat)

    def alpha(self, module: str, rank: int) -> float:
        """Return the alpha of a module for which alpha / rank is its scale."""
        ends = (module[start:] for start in (0, *(place.end() for place in re.finditer("_", module))))
        end = next((end for end in ends if end in self.alphas), None)
        fields = self.settings if end is None else Config({"lora_alpha": self.alphas[end]}, self.settings.where)
        value = fields.number("lora_alpha", 8)
        return value * sqrt(rank) if self.settings.get("use_rslora") else value
