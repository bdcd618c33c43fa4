"""LoRA files of diffusion models with dotted names: of diffusers, old and new, of ComfyUI and its kin, of XLabs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.adapter import Adapter, Change, LoraChange
from merging.sources.lycoris import leaf_of, module_changes
from merging.sources.peft import peft_changes
from merging.sources.stored import Opened, Stored, open_tensors
from merging.sources.views import reshaped

__all__ = ["METADATA_KEY", "WEIGHTS", "open_diffusion", "recognises"]

METADATA_KEY = "lora_adapter_metadata"
"""The metadata entry in which diffusers keeps the configs of its components, each field behind the component's name."""

WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""What diffusers calls a LoRA's file in its folder."""

_COMPONENT = re.compile(
    r"(unet|transformer|text_encoder(?:_[23])?|diffusion_model|text_encoders\.\w+\.transformer)\.(.+)"
)
_LANGUAGE = re.compile(
    r"transformer\.(?:h|layers?|encoder|wte|wpe|embd|word_embeddings|ln_f)\."
    r"|transformer\.blocks\.\d+\.(?!attn[12]\.|self_attn\.|cross_attn\.|ffn\.net\.)"
)
"""Language models whose adapters, once PEFT's prefix is off, seem to name a component."""

_OLD = (
    (re.compile(r"\.self_attn\.to_([qkv]|out)_lora\.(down|up|alpha)\b"), r".self_attn.\1_proj.lora.\2"),
    (re.compile(r"\.processor\.to_([qkv])_lora\.(down|up|alpha)\b"), r".to_\1.lora.\2"),
    (re.compile(r"\.processor\.to_out_lora\.(down|up|alpha)\b"), r".to_out.0.lora.\1"),
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight$"), r".lora_\1.weight"),
    (re.compile(r"\.lora\.alpha$"), ".alpha"),
    (re.compile(r"^(text_encoder(?:_2)?)\.(?=encoder\.layers\.)"), r"\1.text_model."),
)
"""What other versions of diffusers and transformers wrote, and what is meant."""

_XLABS = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight"
)
_XLABS_QKV = {"1": "attn.to_{}", "2": "attn.add_{}_proj", "": "attn.to_{}"}
_XLABS_PROJ = {"1": "attn.to_out.0", "2": "attn.to_add_out", "": "proj_out"}

_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl"})


def recognises(names: Mapping[str, Stored]) -> bool:
    """Whether these are the tensor names of a LoRA for parts of a diffusion model."""
    return _EMBEDDINGS.issuperset(names) or any(_is_ours(name) for name in names)


def _is_ours(name: str) -> bool:
    if name.startswith("base_model."):
        return False
    if _XLABS.fullmatch(name) or any(pattern.search(name) for pattern, _ in (*_OLD[:3], *_OLD[4:5])):
        return True
    return bool(_COMPONENT.match(name)) and leaf_of(name) is not None and not _LANGUAGE.match(name)


def open_diffusion(path: Path, alpha: float | None = None, opened: Opened | None = None) -> Adapter:
    """The adapter of such a file; values are not read, but for the alphas.

    An alpha is stated beside the factors, or in a config in the header, or it is the rank; ``alpha`` replaces it.
    Raises :class:`~merging.errors.FormatError` for a file that states it in both places, and for any name that has no
    place.
    """
    tensors, metadata = opened or open_tensors(path)
    _refuse_others(path, tensors)
    if any(_XLABS.fullmatch(name) for name in tensors):
        dialect, changes = "XLabs", _xlabs(path, tensors, alpha)
    else:
        named = _modern(path, tensors)
        comfy = any(name.startswith(("diffusion_model.", "text_encoders.")) for name in named)
        dialect = "ComfyUI" if comfy else "diffusers"
        configs = _configs(path, metadata)
        if configs and any(name.endswith(".alpha") for name in named):
            raise FormatError(
                f"{path}: states its alphas twice, beside the factors and in the {METADATA_KEY} of its header: remove "
                f"one of the two"
            )
        changes = _by_config(path, named, configs, alpha) if configs else _by_module(path, named, alpha)
    return Adapter(
        path=path,
        changes={change.target: change for change in changes},
        files=(path,),
        dialect=dialect,
        config={},
    )


def _refuse_others(path: Path, tensors: Mapping[str, Stored]) -> None:
    for name in tensors:
        if name in _EMBEDDINGS or name.startswith("bundle_emb."):
            raise FormatError(
                f"{path}: holds a textual-inversion embedding ({name}), which is no LoRA: take it out first"
            )
        if name.endswith(("query_norm.scale", "key_norm.scale")):
            raise FormatError(
                f"{path}: is a control LoRA of Flux ({name}), made for a base whose input is wider: it is not read"
            )


def _modern(path: Path, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors by the names that diffusers gives them, whatever version wrote them."""
    named: dict[str, Stored] = {}
    for name, stored in tensors.items():
        modern = name
        for pattern, meant in _OLD:
            modern = pattern.sub(meant, modern)
        if modern in named:
            raise FormatError(f"{path}: {name} is there twice, under two names")
        named[modern] = stored
    return named


def _by_module(path: Path, named: Mapping[str, Stored], alpha: float | None) -> list[Change]:
    modules: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    scaled = {name.rpartition(".")[0] for name in named if name.endswith(".on_input")}
    for name, stored in named.items():
        found = leaf_of(name)
        if found is None and name.rpartition(".")[0] in scaled:
            found = name.rpartition(".")[0], "weight"
        if found is None:
            raise FormatError(f"{path}: {name} is no tensor that a LoRA of a diffusion model is known to hold")
        if found[1] in modules[found[0]]:
            raise FormatError(f"{path}: {name} is there twice, under two names")
        modules[found[0]][found[1]] = stored
    where = str(path)
    return [change for module, parts in modules.items() for change in module_changes(module, parts, where, alpha)]


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The config of each component, if the header has any."""
    if METADATA_KEY not in metadata:
        return {}
    try:
        fields = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise FormatError(f"{path}: the {METADATA_KEY} in its header is not a JSON object")
    configs: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in fields.items():
        component, _, field = name.partition(".")
        configs[component][field] = value
    return dict(configs)


def _by_config(
    path: Path, named: Mapping[str, Stored], configs: Mapping[str, dict[str, Any]], alpha: float | None
) -> list[Change]:
    components: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    for name, stored in named.items():
        component, _, rest = name.partition(".")
        components[component][rest.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")] = stored
    changes: list[Change] = []
    for component, tensors in components.items():
        if component not in configs:
            raise FormatError(
                f"{path}: has {component} tensors, but no config for them in the {METADATA_KEY} of its header"
            )
        config = {"peft_type": "LORA", **configs[component]}
        if alpha is not None:
            config |= {"lora_alpha": alpha, "alpha_pattern": {}}
        found = peft_changes(tensors, config, f"{path}: {component}")
        changes += [replace(change, target=f"{component}.{target}") for target, change in found.items()]
    return changes


def _xlabs(path: Path, tensors: Mapping[str, Stored], alpha: float | None) -> list[Change]:
    """XLabs' files for Flux, without alphas. Their one pair of factors for queries, keys and values makes three."""
    modules: defaultdict[tuple[str, str, str], dict[str, Stored]] = defaultdict(dict)
    for name, stored in tensors.items():
        found = _XLABS.fullmatch(name)
        if found is None:
            raise FormatError(f"{path}: {name} is no tensor that a LoRA of XLabs is known to hold")
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
        for number, part in enumerate("qkv"):
            up = reshaped(whole.up).narrowed(0, number * size, size)
            changes.append(replace(whole, target=f"{block}.{_XLABS_QKV[stream].format(part)}.weight", up=up))
    return changes
