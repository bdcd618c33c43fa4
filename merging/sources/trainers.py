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
    r"(?:musubi_tuner\.)?networks\.\w*_(?:wan|framepack|hv_1_5|flux_2|qwen_image|zimage|kandinsky5|hidream_o1|ideogram4|krea2)$"
)
"""Modules of networks that musubi-tuner has, and sd-scripts has not."""

_MUSUBI_BASES = re.compile(r"hunyuan_?video|kontext|wan|framepack|qwen|z-?image", re.IGNORECASE)
"""Bases that sd-scripts does not train."""

_TAGS = {
    "axolotl": "Axolotl",
    "llama-factory": "LLaMA-Factory",
    "ms-swift": "ms-swift",
    "swift": "ms-swift",
    "unsloth": "Unsloth",
    "simpletuner": "SimpleTuner",
    "ai-toolkit": "ai-toolkit",
    "diffusion-pipe": "diffusion-pipe",
    "torchtune": "torchtune",
    "autotrain": "AutoTrain",
    "diffusers-training": "diffusers",
    "mlx": "mlx-lm",
    "trl": "TRL",
}
"""Tags of model cards, the most telling first: cards of Axolotl and Unsloth have the tag of TRL too."""

_STYLES: tuple[tuple[str, str, str], ...] = (
    ("XLabs", r"(?:^|\.)(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora", "attention processors"),
    ("Tencent", r"^Hunyuan_video_I2V_lora_", "its prefix Hunyuan_video_I2V_lora"),
    ("LyCORIS", r"^lycoris_", "its prefix lycoris"),
    ("lightx2v", r"\.diff_m$", "changes of modulations, diff_m"),
    ("OneTrainer", r"^transformer\..+\.lora_down\.weight$", "lora_down behind the prefix transformer"),
    ("diffusers before 0.21", r"\.processor\.to_\w+_lora\.|\.lora_linear_layer\.", "attention processors"),
    ("diffusers", r"^(?:unet|transformer(?:_2)?)\..+\.lora(?:_[AB]|\.up|\.down)\.weight$", "the prefix of a component"),
)
"""Programs, patterns of the names in their files, and words for what is matched."""

_COMPONENTS = ("^transformer", "^(?:unet|transformer")
"""The beginnings of the patterns that match the prefix of a component."""

_VERSION = re.compile(r"[0-9][0-9A-Za-z.+-]{0,19}")
_BARE_DEFAULT = re.compile(r"^(?!base_model\.|transformer\.|unet\.)(.+)\.lora_[AB]\.default\.weight$")
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
    if isinstance(config.get("lora_parameters"), Mapping) or "fine_tune_type" in config:
        return Attribution("mlx-lm", "lora_parameters in its config")
    return None


def _by_names(
    names: Collection[str], metadata: Mapping[str, str], config: Mapping[str, Any] | None
) -> Iterator[Attribution]:
    """Yield programs that the names and the format of a file show, the likeliest first."""
    if config is not None and any(_COMFYUI.match(name) for name in names):
        yield Attribution("diffusion-pipe", "names of ComfyUI with a config of PEFT")
    for program, pattern, words in _STYLES:
        found = [name for name in names if re.search(pattern, name)]
        # Language models may have names that begin like a component's.
        if found and (not pattern.startswith(_COMPONENTS) or any(map(is_denoiser, map(_module, found)))):
            yield Attribution(program, f"its names: {words}")
    bare = [match[1] for name in names if (match := _BARE_DEFAULT.match(name))]
    if any(map(is_denoiser, bare)):
        yield Attribution("DiffSynth-Studio", "its names: lora_A.default without a prefix")
    if METADATA_KEY in metadata:
        yield Attribution("diffusers", f"{METADATA_KEY} in its header")
    version = (config or {}).get("peft_version")
    if isinstance(version, str) and _VERSION.fullmatch(version):
        yield Attribution(f"PEFT {version}", "peft_version in its config")
    if config is not None and "peft_type" in config:
        yield Attribution("PEFT", "peft_type in its config")
    if any(name.startswith("base_model.model.") for name in names):
        yield Attribution("PEFT", "its names: the prefix base_model.model")


def _module(name: str) -> str:
    """Return the path of the module of a factor."""
    return name.partition(".lora")[0]
