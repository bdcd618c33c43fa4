"""Diffusion models in different layouts: as published in one file, and as diffusers saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merging.maths.shapes import Shapes
from merging.sources import Checkpoint, Model
from merging.sources.diffusion_names import Known, known_names
from merging.sources.fused_names import RowRange
from merging.sources.joined_rows import JoinedRows
from merging.sources.lora_names import within
from merging.sources.stored import Stored
from merging.sources.tensor_views import view

__all__ = ["match_layouts"]

_DENOISERS = frozenset({"unet", "transformer", "transformer_2"})


def match_layouts(models: Sequence[Model], base: Checkpoint | None) -> tuple[tuple[Model, ...], list[str]]:
    """Return the models with the tensors of diffusion models under the base's names, or the first full model's.

    Where one layout fuses tensors that another keeps apart, their rows are joined or divided. Tensors without a known
    name in the other layout keep their own. The list has a notice for each model whose names differ.
    """
    reference = base or next((model for model in models if isinstance(model, Checkpoint)), None)
    others = [model for model in models if isinstance(model, Checkpoint) and reference is not None]
    if reference is None or all(model.tensors.keys() == reference.tensors.keys() for model in others):
        return tuple(models), []
    wanted = _whole_names(known_names(_shapes(reference), strict=True), _shapes(reference))
    found: list[Model] = []
    notices: list[str] = []
    for model in models:
        matched = _match(model, reference, wanted) if isinstance(model, Checkpoint) else model
        found.append(matched)
        if matched is not model:
            notices.append(f"{model.path}: its tensors are matched with the names of {reference.path}")
    return tuple(found), notices


def _shapes(model: Checkpoint) -> Shapes:
    return {name: stored.shape for name, stored in model.tensors.items()}


def _key(known: Known) -> tuple[str, str]:
    return known.component, within(known.component, known.name)


def _whole_names(known: Sequence[Known], shapes: Shapes) -> dict[tuple[str, str], str]:
    """Return the stored tensors by every name that stands for all of one; empty for models without a denoiser."""
    if _DENOISERS.isdisjoint(each.component for each in known):
        return {}
    return {
        _key(each): each.rows[0].name
        for each in known
        if each.rows == (RowRange(each.rows[0].name, 0, shapes[each.rows[0].name][0]),)
    }


def _match(model: Checkpoint, reference: Checkpoint, wanted: Mapping[tuple[str, str], str]) -> Checkpoint:
    """Return a model with its tensors under the names of the reference, as far as they are known."""
    if not wanted or model.tensors.keys() == reference.tensors.keys():
        return model
    tensors = {name: stored for name, stored in model.tensors.items() if name in reference.tensors}
    used = set(tensors)
    for known in known_names(_shapes(model), strict=True):
        name = wanted.get(_key(known))
        if name is None or name in tensors:
            continue
        parts = [_rows(model.tensors[part.name], part) for part in known.rows]
        if len({part.dtype_name for part in parts}) == 1:
            tensors[name] = parts[0] if len(parts) == 1 else JoinedRows(parts)
            used |= {part.name for part in known.rows}
    if used <= model.tensors.keys() & reference.tensors.keys():
        return model
    return replace(model, tensors={**tensors, **{n: each for n, each in model.tensors.items() if n not in used}})


def _rows(stored: Stored, part: RowRange) -> Stored:
    whole = part.start == 0 and part.length == stored.shape[0]
    return stored if whole else view(stored).narrow(0, part.start, part.length)
