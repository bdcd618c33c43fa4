"""The program that trained an adapter, by statements in its header, its config and its card, else by its names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merging.sources.denoisers import is_denoiser
from merging.sources.lora_headers import METADATA_KEY

__all__ = ["Attribution", "trainer_of"]


@dataclass(frozen=True, slots=True)
class Attribution:
    """The name of a program or of a family of models, and the evidence for it."""

    name: str
    evidence: str


_MUSUBI = re.compile(
    r"(?:musubi_tuner\.)?networks\.\w*_"
    r"(?:wan|framepack|hv_1_5|flux_2|qwen_image|zimage|kandinsky5|hidream_o1|ideogram4|krea2)$"
)
"""Modules of networks that musubi-tuner has, and sd-scripts has not."""

_MUSUBI_BASES = re.compile(r"hunyuan_?video|kontext|wan|framepack|qwen|z-?image", re.IGNORECASE)
"""Bases that sd-scripts does not train."""

_TAGS = {
    "axolotl": "Axolotl",
    "llama-factory": "LLaMA-Factory",
    "ms-swift": "ms-swift",
    "unsloth": "Unsloth",
    "simpletuner": "SimpleTuner",
    "ai-toolkit": "ai-toolkit",
    "diffusion-pipe": "diffusion-pipe",
    "torchtune": "torchtune",
    "autotrain": "AutoTrain",
    "diffusers-training": "diffusers",
    "trl": "TRL",
}
"""Tags of model cards, the most telling first: cards of Axolotl and Unsloth have the tag of TRL too."""


@dataclass(frozen=True, slots=True)
class _Style:
    """Names that one program writes, and words for them; ``denoiser``: they must be of a denoiser too."""

    program: str
    names: str
    words: str
    denoiser: bool = False


_STYLES = (
    _Style("XLabs", r"(?:^|\.)(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora", "attention processors"),
    _Style("Tencent", r"^Hunyuan_video_I2V_lora_", "its prefix Hunyuan_video_I2V_lora"),
    _Style("LyCORIS", r"^lycoris_", "its prefix lycoris"),
    _Style("lightx2v", r"\.diff_m$", "changes of modulations, diff_m"),
    _Style(
        "OneTrainer", r"^transformer\..+\.lora_down\.weight$", "lora_down behind the prefix transformer", denoiser=True
    ),
    _Style("diffusers before 0.21", r"\.processor\.to_\w+_lora\.|\.lora_linear_layer\.", "attention processors"),
    _Style(
        "diffusers",
        r"^(?:unet|transformer(?:_2)?)\..+\.lora(?:_[AB]|\.up|\.down)\.weight$",
        "the prefix of a component",
        denoiser=True,
    ),
    _Style(
        "DiffSynth-Studio",
        r"^(?!base_model\.|transformer\.|unet\.).+\.lora_[AB]\.default\.weight$",
        "lora_A.default without a prefix",
        denoiser=True,
    ),
)
"""The styles of names, the rarest first. Language models may have names that begin like a component's."""

_VERSION = re.compile(r"[0-9][0-9A-Za-z.+-]{0,19}")
_COMFYUI = re.compile(r"^diffusion_model\..+\.lora_[AB]\.weight$")


def trainer_of(
    names: Collection[str],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
    *,
    tags: Collection[str] = (),
    files: Collection[str] = (),
) -> Attribution | None:
    """Return the program that trained an adapter, None where nothing shows it.

    Args:
        names: The names of the tensors in its file.
        metadata: The entries of its header.
        config: Its adapter_config.json; None without one.
        tags: The tags of its model card.
        files: The names of the files in its folder.
    """
    found = _by_header(metadata) or _by_config(config or {})
    if found:
        return found
    tag = next((tag for tag in _TAGS if tag in tags), None)
    if tag:
        return Attribution(_TAGS[tag], f"the tag {tag} of its card")
    if "additional_config.json" in files and config is not None:
        return Attribution("ms-swift", "additional_config.json in its folder")
    return next(_by_names(names, metadata, config), None)


def _by_header(metadata: Mapping[str, str]) -> Attribution | None:
    for key in ("ot_revision", "ot_branch", "ot_config"):
        if key in metadata:
            return Attribution("OneTrainer", f"{key} in its header")
    if "ai-toolkit" in metadata.get("software", ""):
        return Attribution("ai-toolkit", "software in its header")
    module, evidence = metadata.get("ss_network_module", ""), "ss_network_module in its header"
    if module.startswith("lycoris"):
        return Attribution("sd-scripts with LyCORIS", evidence)
    base = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}"
    if _MUSUBI.match(module) or ("networks." in module and _MUSUBI_BASES.search(base)):
        return Attribution("musubi-tuner", evidence)
    if module.startswith("networks."):
        return Attribution("sd-scripts", evidence)
    return None


def _by_config(config: Mapping[str, Any]) -> Attribution | None:
    mapping = config.get("auto_mapping")
    if isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        return Attribution("Unsloth", "unsloth_fixed in its config")
    key = next((key for key in ("lora_parameters", "fine_tune_type") if key in config), None)
    return Attribution("mlx-lm", f"{key} in its config") if key else None


def _by_names(
    names: Collection[str], metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> Iterator[Attribution]:
    """Yield programs that the names and the format of a file show, the likeliest first."""
    if config is not None and any(_COMFYUI.match(name) for name in names):
        yield Attribution("diffusion-pipe", "names of ComfyUI with a config of PEFT")
    for style in _STYLES:
        found = [name.partition(".lora")[0] for name in names if re.search(style.names, name)]
        if found and (not style.denoiser or any(map(is_denoiser, found))):
            yield Attribution(style.program, f"its names: {style.words}")
    if METADATA_KEY in metadata:
        yield Attribution("diffusers", f"{METADATA_KEY} in its header")
    version = (config or {}).get("peft_version")
    if isinstance(version, str) and _VERSION.fullmatch(version):
        yield Attribution(f"PEFT {version}", "peft_version in its config")
    if config is not None and "peft_type" in config:
        yield Attribution("PEFT", "peft_type in its config")
    if any(name.startswith("base_model.model.") for name in names):
        yield Attribution("PEFT", "its names: the prefix base_model.model")
