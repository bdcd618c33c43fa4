"""The names of a merged LoRA's tensors in the files of PEFT, diffusers and Kohya."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from merging.errors import InputError, option
from merging.maths.shapes import Shapes
from merging.plan.names.peft_names import PREFIX
from merging.plan.recipe import AdapterFormat, Recipe
from merging.sources import Adapter
from merging.sources.denoisers import respell
from merging.sources.diffusion_names import Known, known_names
from merging.sources.flat_names import dotted_targets
from merging.sources.fused_names import RowRange

__all__ = [
    "choose_format",
    "find_unnamed",
    "formats_with_names",
    "label_rows",
    "make_denoiser_labels",
    "make_peft_labels",
    "unnamed_error",
]

_OWN: dict[str, AdapterFormat] = {
    "Kohya": "kohya",
    "ComfyUI": "kohya",
    "diffusers": "diffusers",
    "XLabs": "diffusers",
}
"""The format in which a merge of files of one dialect comes out."""

_ONE_FILE: tuple[AdapterFormat, ...] = ("diffusers", "kohya")

_NOT_KOHYA = re.compile(
    r"(?:lora_unet|lora_transformer|lycoris)_+(?:(?:layers|noise_refiner|context_refiner)_\d+_(?:attention_to|attn_to)_"
    r"|(?:layers|noise_refiner|context_refiner)_\d+_(?:feed_forward_linear_\d|norm1_linear)\."
    r"|blocks_\d+_(?:attn[12]_(?:to|add)_|ffn_net_)|single_transformer_blocks_)|Hunyuan_video_I2V_lora_"
)
"""Flat names that ComfyUI does not take: of diffusers' modules, where the published ones differ, and Tencent's."""

_DENOISERS = frozenset({"unet", "transformer", "transformer_2"})

_SDXL = re.compile(r"\.transformer_blocks\.1\.|add_embedding\.")
"""Names of diffusers' that a U-Net of SDXL has, and none of Stable Diffusion 1 and 2."""
_SD = re.compile(r"(?:down|up)_blocks\.3\.|down_blocks\.0\.attentions\.|up_blocks\.2\.attentions\.")
"""The other way round."""


def choose_format(recipe: Recipe, adapters: Sequence[Adapter]) -> AdapterFormat:
    """Return the format of a merged adapter: as asked for, or the inputs' format.

    Where the inputs differ it is PEFT's if any of them is, else diffusers'.
    """
    own = {_OWN.get(adapter.dialect, "peft") for adapter in adapters}
    if recipe.format or len(own) == 1:
        return recipe.format or own.pop()
    return "peft" if "peft" in own else "diffusers"


def unnamed_error(target: str, format: str, based: bool, others: Sequence[str], kept: bool = False) -> InputError:
    """Return the error for a target without a known name in a format.

    ``others`` are formats with names for all targets; ``kept`` says that the inputs' own names could be kept.
    """
    instead = f"use {option('format', *others)}, or" if others else "use"
    keep = f"leave {option('format')} out, so that the output keeps the inputs' names, or " if kept else ""
    without = (
        "" if based else f" without the model itself, so give that with {option('base')} if it is one of diffusion"
    )
    return InputError(
        f"{target}: what it is called in LoRA files in the format of {format} is not known{without}: {keep}{instead} "
        f"{option('kind', 'model')}"
    )


def formats_with_names(adapters: Sequence[Adapter], shapes: Shapes, targets: Shapes, based: bool) -> list[str]:
    """Return the formats of one file, diffusers' and Kohya's, that have names for all targets."""
    found: list[str] = []
    for format in _ONE_FILE:
        try:
            rows = label_rows(format, adapters, shapes, based)
        except InputError:
            continue
        if find_unnamed(rows, targets) is None:
            found.append(format)
    return found


def find_unnamed(labelled: Mapping[str, tuple[RowRange, ...]], targets: Shapes) -> str | None:
    """Return the first target with rows that no label stands for, None if there is none."""
    rows: Counter[str] = Counter()
    for parts in labelled.values():
        for part in parts:
            rows[part.name] += part.length
    return next((target for target, shape in targets.items() if rows[target] != (shape or (1,))[0]), None)


def make_peft_labels(
    adapters: Sequence[Adapter], shapes: Shapes, targets: Sequence[str], based: bool
) -> dict[str, str]:
    """Return the names of a diffusion model's tensors in an adapter of PEFT's, which holds one component only.

    ``shapes`` are of the base's tensors if the merge is ``based`` on one, else of the targets. Raises
    :class:`~merging.errors.InputError` for targets of several components, or of unknown names.
    """
    found = _whole_in_diffusers(known_names(shapes, strict=True), shapes)
    components = sorted({found[target].component for target in targets if target in found})
    wanted = {target: shapes[target] for target in targets}
    if len(components) > 1:
        several = f"the LoRA is of {' and '.join(components)}"
        others = formats_with_names(adapters, shapes, wanted, based)
        if not others:
            raise InputError(f"{several}, and an adapter of PEFT's is of one model: leave {option('format')} out")
        raise InputError(f"{several}, and an adapter of PEFT's is of one model: use {option('format', *others)}")
    for target in targets:
        # The names of text encoders depend on the version of transformers.
        if target not in found or (not based and found[target].component.startswith("text_encoder")):
            raise unnamed_error(target, "peft", based, formats_with_names(adapters, shapes, wanted, based))
    return {target: _as_stored(found[target], target) for target in targets}


def make_denoiser_labels(shapes: Shapes, targets: Iterable[str]) -> dict[str, str] | None:
    """Return diffusers' names of tensors of a base's denoiser; None if it fuses them, or they are of another model."""
    found = _whole_in_diffusers(known_names(shapes, strict=True), shapes)
    labels = {target: found[target].name for target in targets if target in found}
    parts = {found[target].component for target in labels}
    return labels if len(labels) == len(list(targets)) and len(parts) == 1 and parts <= _DENOISERS else None


def _whole_in_diffusers(names: Iterable[Known], shapes: Shapes) -> dict[str, Known]:
    """Return diffusers' names of the tensors that diffusers has as they are stored."""
    found: dict[str, Known] = {}
    for known in names:
        rows = known.rows[0]
        if "diffusers" in known.styles and known.rows == (RowRange(rows.name, 0, shapes[rows.name][0]),):
            found[rows.name] = known
    return found


def _as_stored(known: Known, stored: str) -> str:
    """Return the name with or without the level that text encoders have lost, as the base has it."""
    shorter = known.name.removeprefix("text_model.")
    return known.name if stored.endswith(known.name) or not stored.endswith(shorter) else shorter


def label_rows(
    format: AdapterFormat, adapters: Sequence[Adapter], shapes: Shapes, based: bool
) -> dict[str, tuple[RowRange, ...]]:
    """Return the names of tensors in files of diffusers or Kohya, and the target rows that each consists of.

    ``shapes`` are of the base's tensors if the merge is ``based`` on one, else of the targets.
    """
    known = known_names(shapes, strict=True)
    if _flat(adapters) and not based:
        dotted = dotted_targets(shapes)
        if len(dotted) == len(shapes):
            known = _known_by(dotted, shapes)
        elif format == "kohya" and all(adapter.dialect == "Kohya" for adapter in adapters):
            return _flat_labels(known, shapes)
        elif not known:
            raise InputError(
                f"the names in Kohya's files do not give the names of the model's modules: give it with "
                f"{option('base')}, or leave {option('format')} out, so that the output keeps the inputs' names"
            )
    if format in ("diffusers", "peft"):
        named = [each for each in known if "diffusers" in each.styles]
        if format == "diffusers":
            return {f"{each.component}.{each.name}": each.rows for each in named}
        parts = {each.component for each in named} & _DENOISERS
        return {f"{PREFIX}{each.name}": each.rows for each in named if parts == {each.component}}
    family = _family(known, based)
    return {label: each.rows for each in known if (label := _kohya_label(each, family))}


def _flat_labels(known: Sequence[Known], shapes: Shapes) -> dict[str, tuple[RowRange, ...]]:
    """Return the names for the tensors of Kohya's files: their own, or the published ones where ComfyUI reads these."""
    labels = {label: each.rows for each in known if (label := _kohya_label(each, "transformer"))}
    renamed = {part.name for label, rows in labels.items() for part in rows if part.name != label}
    kept = {
        name: (RowRange(name, 0, (shape or (1,))[0]),)
        for name, shape in shapes.items()
        if not _NOT_KOHYA.match(name) and not (name in renamed and name.startswith("lora_unet_"))
    }
    others = {label: rows for label, rows in labels.items() if kept.keys().isdisjoint(part.name for part in rows)}
    return {**kept, **others}


def _known_by(dotted: Mapping[str, str], shapes: Shapes) -> list[Known]:
    """Return all names of the targets that have these names with dots, which no file has, in rows of the targets."""
    targets = {name: target for target, name in dotted.items()}
    known = known_names({name: shapes[target] for name, target in targets.items()}, strict=True)
    return [replace(each, rows=tuple(replace(part, name=targets[part.name]) for part in each.rows)) for each in known]


def _flat(adapters: Sequence[Adapter]) -> bool:
    """Return whether there are names that only a base can resolve."""
    return any(adapter.dialect == "Kohya" for adapter in adapters)


def _family(known: Sequence[Known], based: bool) -> str | None:
    """Return the kind of model, which decides Kohya's names of its parts; None where nothing shows it."""
    components = {each.component for each in known}
    if {"transformer", "transformer_2"} <= components:
        return None  # flat names do not tell the two apart: each has a file of its own
    if not components.isdisjoint(("transformer", "transformer_2")):
        return "transformer"
    unet = [each.name for each in known if each.component == "unet" and "diffusers" in each.styles]
    if "text_encoder_2" in components or any(map(_SDXL.search, unet)):
        return "sdxl"
    return "sd" if (based and unet) or any(map(_SD.search, unet)) else None


def _kohya_label(known: Known, family: str | None) -> str | None:
    """Return the name of a tensor in Kohya's files; None if they use another of its names, or it is unknown."""
    if known.component in _DENOISERS:
        style = "diffusers" if family == "sd" else "published"
        return f"lora_unet_{respell(known.flat)}" if family and style in known.styles else None
    if known.name.startswith("encoder.block."):
        return f"lora_te3_{known.flat}"  # a T5 is the third, also where there are two
    if family is None or not known.name.startswith("text_model."):
        return None
    number = {"text_encoder": "1", "text_encoder_2": "2", "text_encoder_3": "3"}[known.component]
    return f"lora_te{'' if family == 'sd' else number}_{known.flat}"
