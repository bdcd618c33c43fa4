"""Names of the parts of diffusion models: in diffusers, as published, and in the LoRA files that change them.

A base is a pipeline (``unet.down_blocks...``, ``text_encoder...``), one of its components, or a single file as it was
published (``model.diffusion_model.input_blocks...``). Its tensors are known under the names of diffusers and under the
published names. Where one of the two fuses projections, a name means a range of rows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from merging.maths.shapes import Shapes
from merging.sources import unet_names
from merging.sources.denoisers import family_of, is_denoiser
from merging.sources.fused_names import NameSet, RowRange, paired_names
from merging.sources.lora_names import flat_parts, within

__all__ = ["Known", "known_names", "spellings"]

_PREFIXES = {
    "unet.": "unet",
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
    "connectors.": "connectors",
    "text_embedding_projection.": "connectors",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "model.diffusion_model.": "",
    "diffusion_model.": "",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
"""The prefixes of a component's names, in pipelines and in single files; "" is a denoiser of either kind."""

_DENOISERS = {"unet": "denoiser", "transformer": "denoiser", "transformer_2": "denoiser_2"}
"""The names of a pipeline's denoisers in LoRA files."""

_UNET = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks", "conv_in",
         "conv_norm_out", "conv_out", "time_embedding", "add_embedding", "time_embed", "label_emb", "out")  # fmt: skip
_SHARED = frozenset({"time_embed", "time_embedding"})
"""Embedders that transformers have too."""
_UNET_BLOCK = re.compile(r"(?:^|\.)(?:down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)\.")
_WRAPPERS = ("net.", "model.model.", "pipe.dit.")
"""The prefixes of NVIDIA's files of Cosmos, of ComfyUI's files of HunyuanVideo, and of DiffSynth's pipelines."""
_PUBLISHED_DENOISERS = ("double_blocks", "single_blocks", "joint_blocks")
_TEXT = ("text_model.", "encoder.layers.", "encoder.block.", "transformer.resblocks.")
_FOREIGN = ("vae", "first_stage_model", "cond_stage_model", "conditioner", "text_encoders", "model_ema", "base_model")

_OPEN_CLIP = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}


@dataclass(frozen=True, slots=True)
class Known:
    """A tensor of a component under one of its names, and the rows of the base's tensors that it consists of.

    ``styles`` says whose name it is; text encoders have the same names everywhere.
    """

    component: str
    name: str
    styles: tuple[NameSet, ...]
    rows: tuple[RowRange, ...]

    @property
    def flat(self) -> str:
        """The name with underscores for all dots except the dot before ``weight`` or ``bias``."""
        module, _, leaf = self.name.rpartition(".")
        return f"{module.replace('.', '_')}.{leaf}"


def known_names(shapes: Shapes, strict: bool = False) -> list[Known]:
    """Return all names of the tensors of a base, from their names on disk and shapes; none if it is another model.

    Names without a component are taken as names of a transformer. With ``strict`` they need the prefix of a denoiser,
    or must be next to blocks that only denoisers have. Flat names have other names where the rules of a family say so.
    """
    flat = {name: parts for name in shapes if (parts := flat_parts(name))}
    dotted = {name: shape for name, shape in shapes.items() if name not in flat}
    return [*_dotted_names(dotted, strict), *_flat_names(shapes, flat)]


def _dotted_names(shapes: Shapes, strict: bool) -> list[Known]:
    """Return all names of tensors under dotted names."""
    guess = not strict or any(is_denoiser(name.rpartition(".")[0]) for name in shapes)
    wrapper = _wrapper(shapes)
    unet = any(_UNET_BLOCK.search(name) for name in shapes)
    components: defaultdict[str, dict[str, str]] = defaultdict(dict)
    published: set[str] = set()
    for name in shapes:
        prefix = wrapper or next((each for each in _PREFIXES if name.startswith(each)), "")
        short = name.removeprefix(prefix)
        component = _PREFIXES.get(prefix) or _by_content(short, unet, guess or bool(prefix))
        if component and shapes[name]:
            components[component][short] = name
        if component and (prefix.endswith("diffusion_model.") or short.startswith(_PUBLISHED_DENOISERS)):
            published.add(component)
    found: list[Known] = []
    for component, names in components.items():
        style: NameSet = "published" if component in published else "diffusers"
        for known in _component(component, {short: shapes[name] for short, name in names.items()}, style):
            rows = tuple(replace(part, name=names[part.name]) for part in known.rows)
            found.append(replace(known, rows=rows))
    return found


def _flat_names(shapes: Shapes, flat: Mapping[str, tuple[str, str]]) -> Iterator[Known]:
    """Yield the names that flat names of a transformer stand for; ``flat`` are their components and normal forms."""
    names = {short: name for name, (component, short) in flat.items() if component == "denoiser"}
    for whose, known, rows in paired_names({short: shapes[name] for short, name in names.items()}):
        yield Known("transformer", known, (whose,), tuple(replace(part, name=names[part.name]) for part in rows))


def spellings(known: Known, t5: bool = False, alone: bool = True) -> Iterator[tuple[str, str]]:
    """Return the results of :func:`~merging.sources.lora_names.normal_name` for all names of a tensor in LoRA files.

    ``t5``: the text encoder is a T5, which some files call the third even if it is the second of its model. ``alone``:
    the model has one denoiser, which is also meant by a file for the second of two.
    """
    component = _DENOISERS.get(known.component, known.component)
    name = within(component, known.name)
    yield component, name
    if t5 and component == "text_encoder_2":
        yield "text_encoder_3", name
    if alone and component in _DENOISERS.values():
        yield from ((other, name) for other in set(_DENOISERS.values()) - {component})


def _wrapper(shapes: Shapes) -> str:
    """Return the prefix with which some programs publish a denoiser, empty without one."""
    for prefix in _WRAPPERS:
        if shapes and all(name.startswith(prefix) for name in shapes):
            return prefix if family_of({name.removeprefix(prefix): shape for name, shape in shapes.items()}) else ""
    return ""


def _by_content(name: str, unet: bool, guess: bool) -> str | None:
    """Return the component of a name without a prefix, from its block. ``unet``: there are blocks of a U-Net."""
    first = name.partition(".")[0]
    if first in _UNET and (unet or first not in _SHARED):
        return "unet"
    if name.startswith(_TEXT):
        return "text_encoder"
    return "transformer" if guess and first not in _FOREIGN else None


def _component(component: str, shapes: Shapes, style: NameSet) -> Iterator[Known]:
    """Yield the names of one component, whose tensors are given without its prefix, in the style of these names."""
    if component == "unet":
        return _unet(shapes)
    if component in _DENOISERS:
        return _transformer(component, shapes, style)
    if component == "connectors":
        return _connectors(shapes)
    return _text_encoder(component, shapes)


def _unet(shapes: Shapes) -> Iterator[Known]:
    resnets = unet_names.resnets_per_level(shapes)
    up = [name for name in shapes if name.startswith("up_blocks.")]
    whole = "conv_in.weight" in shapes
    # Of a part of a U-Net only SDXL's published names are used, where every upsampler follows attentions.
    attentive = {int(name.split(".")[1]) for name in up if ".attentions." in name or not whole}
    for name, shape in shapes.items():
        theirs = unet_names.diffusers_name(name, resnets)
        ours = name if theirs else unet_names.published_name(name, resnets, attentive)
        yield Known("unet", theirs or name, ("diffusers",), _whole(name, shape))
        if ours:
            yield Known("unet", ours, ("published",), _whole(name, shape))


def _transformer(component: str, shapes: Shapes, style: NameSet) -> Iterator[Known]:
    others = dict.fromkeys(shapes)
    family = family_of(shapes)
    for whose, name, rows in paired_names(shapes):
        for part in rows:
            others.pop(part.name, None)
        yield Known(component, name, (whose,), rows)
    for name in others:
        shared = family is None or family.has_one_name(name)
        yield Known(component, name, ("diffusers", "published") if shared else (style,), _whole(name, shapes[name]))


def _connectors(shapes: Shapes) -> Iterator[Known]:
    """Yield the names of the modules between LTX-2's text encoder and its denoiser."""
    for name, shape in shapes.items():
        styles: tuple[tuple[NameSet, str], ...] = (
            ("diffusers", name.replace("aggregate_embed.", "text_proj_in.")),
            ("published", name.replace("text_proj_in.", "aggregate_embed.")),
        )
        for style, spelled in styles:
            yield Known("connectors", spelled, (style,), _whole(name, shape))


def _text_encoder(component: str, shapes: Shapes) -> Iterator[Known]:
    for name, shape in shapes.items():
        if name.startswith("transformer.resblocks."):
            for theirs, rows in _open_clip(name, shape):
                yield Known(component, theirs, ("diffusers", "published"), rows)
        else:
            clip = name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm."))
            yield Known(
                component, f"text_model.{name}" if clip else name, ("diffusers", "published"), _whole(name, shape)
            )


def _open_clip(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[RowRange, ...]]]:
    """Return transformers' names for a tensor of OpenCLIP's text encoder, which fuses projections."""
    layer, _, inner = name.removeprefix("transformer.resblocks.").partition(".")
    module, _, leaf = inner.rpartition(".")
    block = f"text_model.encoder.layers.{layer}"
    if leaf.startswith("in_proj_"):
        size = shape[0] // 3
        for number, part in enumerate("qkv"):
            rows = (RowRange(name, number * size, size),)
            yield f"{block}.self_attn.{part}_proj.{leaf.removeprefix('in_proj_')}", rows
    elif module in _OPEN_CLIP:
        yield f"{block}.{_OPEN_CLIP[module]}.{leaf}", _whole(name, shape)


def _whole(name: str, shape: tuple[int, ...]) -> tuple[RowRange, ...]:
    return (RowRange(name, 0, shape[0]),)
