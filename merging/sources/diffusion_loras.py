"""LoRA files of diffusion models with dotted names: from diffusers, old and new, ComfyUI and similar programs, XLabs.

A name is an optional component (``transformer.``, ``diffusion_model.``) and the path of a module. The names of the
factors after it (A and B, down and up, with or without alphas) differ between trainers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.adapter import Adapter
from merging.sources.changes import Change, LoraChange
from merging.sources.denoisers import is_denoiser
from merging.sources.lora_headers import (
    METADATA_KEY,
    alphas_differ,
    base_facts,
    component_configs,
    config_of,
    unstated_alpha,
)
from merging.sources.lycoris import is_factor, leaf_of, module_changes, zero_alphas
from merging.sources.lycoris.products import number, scale_of
from merging.sources.opening import open_tensors
from merging.sources.peft import peft_changes
from merging.sources.peft.config import Config
from merging.sources.peft.module import Module
from merging.sources.stored import FileContents, Stored
from merging.sources.tensor_views import view

__all__ = ["WEIGHTS", "modern_name", "open_diffusion", "recognizes"]

WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""The names of a LoRA's file in a folder of diffusers."""

_COMPONENT = re.compile(
    r"((unet|transformer(?:_2)?|connectors|text_encoder(?:_[234])?|(?:model\.)?diffusion_model|text_encoders\.\w+\.transformer)\."
    r"(?:base_model\.model\.)?)(.+)"
)
"""The prefix of a name, the component in it, and the rest."""

_LANGUAGE = re.compile(r"transformer\.(?:h|layers?|encoder|wte|wpe|embd|word_embeddings|ln_f|blocks)\.")
"""Language models whose adapters seem to name a component once PEFT's prefix is removed."""

_DOWN_UP = re.compile(r"\.lora_(?:down|up)\.weight$")
"""Names of factors that PEFT never uses."""

_OLD = (
    (re.compile(r"\.self_attn\.to_([qkv]|out)_lora\.(down|up|alpha)\b"), r".self_attn.\1_proj.lora.\2"),
    (re.compile(r"\.processor\.to_([qkv])_lora\.(down|up|alpha)\b"), r".to_\1.lora.\2"),
    (re.compile(r"\.processor\.to_out_lora\.(down|up|alpha)\b"), r".to_out.0.lora.\1"),
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight$"), r".lora_\1.weight"),
    (re.compile(r"\.lora\.alpha$"), ".alpha"),
    (re.compile(r"^(text_encoder(?:_2)?)\.(?=encoder\.layers\.)"), r"\1.text_model."),
)
"""Names that other versions of diffusers and transformers wrote, and today's names."""

_OLD_FACTORS = tuple(pattern for pattern, _ in (*_OLD[:3], _OLD[4]))

_XLABS = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight"
)
_XLABS_QKV = {"1": "attn.to_{}", "2": "attn.add_{}_proj", "": "attn.to_{}"}
_XLABS_PROJ = {"1": "attn.to_out.0", "2": "attn.to_add_out", "": "proj_out"}

_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl"})


def recognizes(opened: FileContents) -> bool:
    """Whether this is a LoRA for parts of a diffusion model, by its tensor names and its header.

    Names that a language model may have too count if the file has other names that only a denoiser has, or if its
    header holds configs as diffusers writes them.
    """
    names, metadata = opened
    if names and _EMBEDDINGS.issuperset(names):
        return True
    if any(_XLABS.fullmatch(name) or any(old.search(name) for old in _OLD_FACTORS) for name in names):
        return True
    modules = {found[0] for name in names if is_factor(name) and (found := leaf_of(name))}
    if not modules:
        parts = [leaf_of(name) for name in names]
        return bool(parts) and all(parts) and any(_is_diffusion(part[0]) for part in parts if part)
    if any(_DOWN_UP.search(name) for name in names):
        return True
    if any(name.startswith("base_model.") for name in names):
        return False
    if any(_COMPONENT.match(module) and not _LANGUAGE.match(module) for module in modules):
        return True
    # Without A and B, alphas distinguish LyCORIS, which keeps them here, from PEFT.
    paired = any(".lora_A." in name for name in names) or any(f"{module}.alpha" in names for module in modules)
    return METADATA_KEY in metadata or (paired and any(map(is_denoiser, modules)))


def _is_diffusion(module: str) -> bool:
    return bool(_COMPONENT.match(module)) or is_denoiser(module)


def open_diffusion(path: Path, alpha: float | None = None, opened: FileContents | None = None) -> Adapter:
    """Open such a file as an adapter; of the values only alphas are read.

    An alpha is stated next to the factors, or in a config in the header, or it is the rank; ``alpha`` replaces it.
    Raises :class:`~merging.errors.FormatError` for a file that states two different alphas, and for any unknown name.
    """
    tensors, metadata = opened or open_tensors(path)
    notices: tuple[str, ...] = ()
    _refuse_others(path, tensors)
    if any(_XLABS.fullmatch(name) for name in tensors):
        dialect, changes = "XLabs", _xlabs(path, tensors, alpha)
    else:
        named = _modern(path, tensors)
        comfy = any(name.startswith(("diffusion_model.", "text_encoders.")) for name in named)
        dialect = "ComfyUI" if comfy else "diffusers"
        configs = component_configs(path, metadata)
        stated = any(name.endswith(".alpha") for name in named)
        notices = unstated_alpha(path, metadata) if not configs and not stated and alpha is None else ()
        changes = _by_config(path, named, configs, alpha) if configs else _by_module(path, named, alpha)
        if not configs and alpha is None:
            notices += zero_alphas(named, str(path))
    return Adapter(
        path=path,
        changes={change.target: change for change in changes},
        files=(path,),
        dialect=dialect,
        config=base_facts(metadata),
        notices=notices,
    )


def _refuse_others(path: Path, tensors: Mapping[str, Stored]) -> None:
    for name in tensors:
        if name in _EMBEDDINGS or name.startswith("bundle_emb."):
            raise FormatError(
                f"{path}: holds a textual-inversion embedding ({name}), which is not a LoRA: take it out first"
            )
        if name.endswith(("query_norm.scale", "key_norm.scale")):
            raise FormatError(
                f"{path}: is a control LoRA of Flux ({name}), made for a base whose input is wider: it is not read"
            )


def _modern(path: Path, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors under today's names of diffusers, whatever version wrote them."""
    named: dict[str, Stored] = {}
    for name, stored in tensors.items():
        modern = modern_name(name)
        if modern in named:
            raise FormatError(f"{path}: {name} is there twice, under two names")
        named[modern] = stored
    return named


def modern_name(name: str) -> str:
    """Return the name that diffusers gives a tensor today, whatever version named it."""
    for pattern, meant in _OLD:
        name = pattern.sub(meant, name)
    return name


def _by_module(path: Path, named: Mapping[str, Stored], alpha: float | None) -> list[Change]:
    modules: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    scaled = {name.rpartition(".")[0] for name in named if name.endswith(".on_input")}
    for name, stored in named.items():
        found = leaf_of(name)
        if found is None and name.rpartition(".")[0] in scaled:
            found = name.rpartition(".")[0], "weight"
        if found is None:
            raise FormatError(f"{path}: {name} is not a tensor that a LoRA of a diffusion model is known to hold")
        if found[1] in modules[found[0]]:
            raise FormatError(f"{path}: {name} is there twice, under two names")
        modules[found[0]][found[1]] = stored
    where = str(path)
    return [change for module, parts in modules.items() for change in module_changes(module, parts, where, alpha)]


def _by_config(
    path: Path, named: Mapping[str, Stored], configs: Mapping[str, dict[str, Any]], alpha: float | None
) -> list[Change]:
    prefixes: defaultdict[tuple[str, str], dict[str, Stored]] = defaultdict(dict)
    for name, stored in named.items():
        found = _COMPONENT.match(name)
        prefix, component, rest = found.groups() if found else ("", "", name)
        renamed = rest.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
        prefixes[prefix, component][renamed] = stored
    changes: list[Change] = []
    for (prefix, component), tensors in prefixes.items():
        stated = config_of(configs, prefix + next(iter(tensors)))
        if stated is None:
            raise FormatError(
                f"{path}: has {component or 'other'} tensors, but no config for them in the {METADATA_KEY} of its "
                f"header"
            )
        config = {"peft_type": "LORA", **stated}
        if alpha is not None:
            config |= {"lora_alpha": alpha, "alpha_pattern": {}}
        factors = {name: part for name, part in tensors.items() if not name.endswith(".alpha")}
        found_changes = peft_changes(factors, config, f"{path}: {component}")
        if alpha is None:
            _check_alphas(path, tensors, found_changes)
        changes += [replace(change, target=prefix + target) for target, change in found_changes.items()]
    return changes


def _check_alphas(path: Path, tensors: Mapping[str, Stored], changes: Mapping[str, Change]) -> None:
    """Refuse alphas next to the factors that contradict the config in the header."""
    settings = Config({}, str(path))
    for name, part in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "alpha":
            continue
        change = changes.get(f"{module}.weight")
        value = number(Module(module, {"alpha": part}, settings), "alpha")
        alike = isinstance(change, LoraChange) and isclose(change.scale, scale_of(value, change.rank), rel_tol=1e-2)
        if not alike:
            raise alphas_differ(path, name)


def _xlabs(path: Path, tensors: Mapping[str, Stored], alpha: float | None) -> list[Change]:
    """Read XLabs' files for Flux, without alphas. One pair of factors for queries, keys and values becomes three."""
    modules: defaultdict[tuple[str, str, str], dict[str, Stored]] = defaultdict(dict)
    for name, stored in tensors.items():
        found = _XLABS.fullmatch(name)
        if found is None:
            raise FormatError(f"{path}: {name} is not a tensor that a LoRA of XLabs is known to hold")
        stem = "transformer.single_transformer_blocks" if found[1] == "single" else "transformer.transformer_blocks"
        modules[f"{stem}.{found[2]}", found[3], found[4]][f"lora_{found[5]}"] = stored
    changes: list[Change] = []
    for (block, kind, stream), parts in modules.items():
        name = f"{block}.{kind}_lora{stream}"
        (whole,) = module_changes(name, parts, str(path), alpha)
        assert isinstance(whole, LoraChange)
        if kind == "proj":
            changes.append(replace(whole, target=f"{block}.{_XLABS_PROJ[stream]}.weight"))
            continue
        size, rest = divmod(whole.up.shape[0], 3)
        if rest:
            raise FormatError(f"{path}: {name} has {whole.up.shape[0]} outputs, which are not three equal parts")
        for place, part in enumerate("qkv"):
            up = view(whole.up).narrow(0, place * size, size)
            changes.append(replace(whole, target=f"{block}.{_XLABS_QKV[stream].format(part)}.weight", up=up))
    return changes
