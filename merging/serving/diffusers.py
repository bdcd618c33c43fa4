"""Rules of diffusers, which loads LoRA files for its pipelines, pipelines, and their single models."""

from __future__ import annotations

import re
from collections.abc import Iterator

from merging.serving.denoiser_names import NameLayout, families_of, modules_of, names_not_taken
from merging.serving.rules import BAKE, Program, Rule, absent, no_config
from merging.serving.subject import Subject
from merging.sources.lora_headers import METADATA_KEY

__all__ = ["DIFFUSERS"]

_OTHERS = (".hada_", ".oft_", ".boft", ".a1.weight", ".on_input", ".w_norm", ".b_norm", "bundle_emb", "emb_params")

_LORA = (".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")
"""The endings of tensors that it understands in a U-Net's LoRA with Kohya's names."""

_SOME = (".lokr_", ".diff")
"""Parts of names of tensors that some of its loaders convert to LoRA, for transformers as in Flux."""

_UNET = re.compile(r"lora_unet_(?:down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)_")


_PIPELINES = "loaders/lora_pipeline.py"
_CONVERSION = "loaders/lora_conversion_utils.py"


def _other_methods(subject: Subject) -> Iterator[str]:
    for name in subject.tensors:
        if not name.endswith(_LORA) if _of_unet(name) else any(part in name for part in _OTHERS):
            yield name


def _some_methods(subject: Subject) -> Iterator[str]:
    yield from (name for name in subject.tensors if any(part in name for part in _SOME) and not _of_unet(name))


def _of_unet(name: str) -> bool:
    return name.startswith("lora_te") or bool(_UNET.match(name))


def _dora_magnitudes(subject: Subject) -> Iterator[str]:
    yield from (name for name in subject.tensors if name.endswith(".dora_scale"))


def _two_alphas(subject: Subject) -> Iterator[str]:
    alphas = [name for name in subject.tensors if name.endswith(".alpha")]
    if METADATA_KEY in subject.metadata and alphas:
        yield f"{METADATA_KEY} in the header, and {alphas[0]}"


def _mixed_ranks(subject: Subject) -> Iterator[str]:
    stated = METADATA_KEY in subject.metadata or any(name.endswith(".alpha") for name in subject.tensors)
    downs = {t.shape[0] for n, t in subject.tensors.items() if n.endswith(".lora_A.weight") and t.shape}
    if not stated and len(downs) > 1:
        yield f"ranks {', '.join(map(str, sorted(downs)))}, and no alpha"


_TAKEN: dict[str, tuple[NameLayout, ...]] = {
    "": (("transformer.", "diffusers", "A"), ("transformer.", "own", "A")),
    "Stable Diffusion": (
        *((prefix, style, "A down") for prefix in ("unet.", "lora_unet_") for style in ("diffusers", "own")),
        ("lora_unet_", "published", "down"),
    ),
    "Flux": (("lora_unet_", "published", "down"), ("lora_transformer_", "diffusers", "down"),
             ("base_model.model.", "published", "A")),
    "Flux.2": (
        *((prefix, style, "A") for prefix in ("diffusion_model.", "base_model.model.")
          for style in ("published", "modulation")),
        ("lora_unet_", "published", "down"),
    ),
    "HunyuanVideo": (("transformer.", "first", "A"), ("diffusion_model.", "first", "A")),
    "Wan": (("diffusion_model.", "published", "A down"), ("lora_unet_", "published", "down")),
    "Qwen-Image": (("", "diffusers", "default down"), ("diffusion_model.", "diffusers", "A down"),
                   ("lora_unet_", "diffusers", "down")),
    "Z-Image": (("", "diffusers", "default down"), ("diffusion_model.", "diffusers", "A down"),
                ("lora_unet_", "diffusers", "down"), ("lora_unet_", "published", "down")),
    "Lumina 2": (("diffusion_model.", "published", "A"),),
    "LTX-Video": (("diffusion_model.", "diffusers", "A"),),
    "LTX-2": (("diffusion_model.", "published", "A"), ("diffusion_model.", "diffusers", "A")),
    "HiDream": (("diffusion_model.", "diffusers", "A"),),
    "Anima": (("diffusion_model.", "published", "A"),),
    "Ernie-Image": (("diffusion_model.", "diffusers", "A"), ("base_model.model.", "diffusers", "A")),
}  # fmt: skip
"""The names that its pipelines load, by family. The key "" is for names that all pipelines load."""

_CONVERT = "convert it: merge it with {method=passthrough, format=diffusers, base=PIPELINE}"


def _unknown_modules(subject: Subject) -> Iterator[str]:
    """Yield modules under names that no family of the table knows."""
    modules = modules_of(subject.tensors)
    if not families_of(modules):
        yield from (module.name for module in modules)


def _peft_names(subject: Subject) -> Iterator[str]:
    yield from (name for name in _unknown_modules(subject) if name.startswith("base_model.model."))


def _bare_names(subject: Subject) -> Iterator[str]:
    if not any(_peft_names(subject)) and not families_of(modules_of(subject.tensors)):
        yield f"{subject.name} names no component of a pipeline"


def _comfyui_names(subject: Subject) -> Iterator[str]:
    yield from (name for name in _unknown_modules(subject) if name.startswith("diffusion_model."))


_LAYOUTS = (
    Rule("ignores", "modules under names that it does not load, or at which it stops",
         names_not_taken(_TAKEN, by="all"), _CONVERT, f"{_PIPELINES}, run"),
    Rule("warns", "modules under names that it loads for some of the models that have such modules",
         names_not_taken(_TAKEN, by="some"), _CONVERT, f"{_PIPELINES}, run"),
)  # fmt: skip

DIFFUSERS = Program(
    "diffusers",
    {
        "diffusion adapter": (
            Rule("refuses", "only LoRA is loaded", _other_methods, BAKE, f"{_CONVERSION}, run"),
            Rule("refuses", "there are alphas in the header and next to the factors", _two_alphas, "remove one of them",
                 "utils/peft_utils.py, run"),
            Rule("ignores", "DoRA's magnitudes are left out", _dora_magnitudes, BAKE, f"{_PIPELINES}, run"),
            Rule("warns", "LoKr and full differences are loaded for some models only", _some_methods, BAKE,
                 _CONVERSION),
            Rule("warns", "before August 2026 modules of other ranks than the first had a wrong scale",
                 _mixed_ranks, "merge it with {method=passthrough}, which writes one rank",
                 "utils/peft_utils.py"),
            Rule("warns", "names of ComfyUI are understood for some models only", _comfyui_names, _CONVERT,
                 f"{_PIPELINES}, run"),
            *_LAYOUTS,
        ),
        "adapter": (
            Rule("ignores", "pipelines read no names that begin with base_model.model.", _peft_names,
                 "convert them: merge it with {method=passthrough, format=diffusers}, or load them with PEFT",
                 f"{_PIPELINES}, run"),
            Rule("refuses", "there are no adapters of language models in pipelines", _bare_names, "load it with PEFT",
                 f"{_PIPELINES}, run"),
            *_LAYOUTS,
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config",
                 "models/modeling_utils.py, run"),
            Rule("refuses", "the config does not name a class of diffusers", absent("_class_name"),
                 "it is not a model of diffusers: load it with transformers", "models/auto_model.py, run"),
        ),
        "pipeline": (
            Rule("refuses", "model_index.json does not name the pipeline", absent("_class_name"), "add _class_name",
                 "pipelines/pipeline_utils.py, run"),
        ),
    },
    {},
    "diffusers 0.42.1",
)  # fmt: skip
