"""The change of a full model from its base as an adapter: the kind and the name of each tensor's change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from merging.errors import InputError, option
from merging.maths.layers import Stacks
from merging.maths.patterns import all_matching
from merging.maths.shapes import Shapes
from merging.maths.site import Site, inputs_by_outputs, site_of
from merging.plan.extracted_parts import ExtractedParts
from merging.plan.names.labels import label_rows
from merging.plan.names.resolve import Resolver
from merging.plan.recipe import AdapterFormat, Recipe
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change, ChangeKind, ExtractedChange
from merging.sources.diffusion_names import known_names
from merging.sources.renaming import find_renaming
from merging.sources.stored import Stored
from merging.sources.tied_weights import WITH_HEAD, is_head

__all__ = ["extract_changes"]

_FACTORED: Mapping[str, ChangeKind] = {
    "matrix": "linear",
    "embedding": "embedding",
    "conv": "conv",
    "experts": "experts",
}
_DENOISERS = ("unet", "transformer", "transformer_2")
_POSITIONS = re.compile(r"position|(?:^|\.)wpe\.")
"""Names of tables of positions, which many models look up in ways of their own that factors do not take part in."""

_HEAD = "lm_head.weight"
_NEEDS_BASE = "it is the difference of a full model from its base"

Form = Literal["factors", "full", "base"]


def extract_changes(recipe: Recipe, model: Checkpoint, base: Checkpoint) -> tuple[Adapter, list[str]]:
    """Return the change of a full model from its base as an adapter, and remarks on tensors that are left out.

    No values are read. Raises :class:`~merging.errors.InputError` for a model that does not hold the base's tensors.
    """
    tensors = _align(recipe, model, base)
    shapes = {name: base.tensors[name].shape for name in tensors}
    diffusion = _is_diffusion(base, shapes)
    format = recipe.format or ("diffusers" if diffusion else "peft")
    sorter = _Sorter(recipe.parts or ExtractedParts(), format, base, shapes, labelled=not diffusion)
    included = all_matching(sorter.parts.include, tensors) if sorter.parts.include else set(tensors)
    changes: dict[str, Change] = {}
    lost: list[str] = []
    for name, stored in tensors.items():
        if name not in included or not stored.floating:
            continue
        change = sorter.change(name, stored)
        if change is not None:
            changes[name] = change
        elif sorter.form(name) != "base":
            lost.append(name)
    changes |= _tied_head(changes, base)
    if diffusion:
        held = _find_named(format, base, {name: shapes[name] for name in changes})
        lost += [name for name in changes if name not in held]
        changes = {name: change for name, change in changes.items() if name in held}
    if not changes:
        raise InputError(f"{model.path}: no tensor is left whose change an adapter could hold")
    remarks = []
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        remarks = [f"{model.path}: adapters in the format of {format} do not hold these tensors: {shown}"]
    dialect = "diffusers" if diffusion else "PEFT"
    stated = recipe.base if isinstance(recipe.base, str) else None
    adapter = Adapter(
        path=model.path,
        changes=changes,
        files=model.files,
        dialect=dialect,
        base=base.origin.repo if base.origin else stated,
        origin=model.origin,
    )
    return adapter, remarks


def _is_diffusion(base: Checkpoint, shapes: Shapes) -> bool:
    """Return whether a base is a denoiser, alone or with the other models of a pipeline."""
    if "model_type" in base.config or "architectures" in base.config:
        return False
    return any(known.component in _DENOISERS for known in known_names(shapes, strict=True))


def _align(recipe: Recipe, model: Checkpoint, base: Checkpoint) -> dict[str, Stored]:
    """Return a model's tensors by the base's names."""

    def fits(name: str, match: str) -> bool:
        return model.tensors[name].shape == base.tensors[match].shape

    renaming, left = find_renaming(model.tensors, base.tensors, fits)
    gone = set(left)
    aligned = {str(renaming(name)): stored for name, stored in model.tensors.items() if name not in gone}
    odd = [*left, *(name for name in base.tensors if name not in aligned and model.lookup(name) is None)]
    if odd and recipe.on_mismatch == "error":
        raise InputError(
            f"{model.path}: its tensors are not the tensors of {base.path} ({odd[0]} is one, of {len(odd)}): is it the "
            f"base that it was trained from? With {option('on_mismatch', 'base')} such tensors are left out"
        )
    return aligned


@dataclass(slots=True)
class _Sorter:
    """Chooses the form of each tensor's change, and makes it."""

    parts: ExtractedParts
    format: AdapterFormat
    base: Checkpoint
    shapes: Shapes
    labelled: bool
    _turned: set[str] | None = None
    _resolver: Resolver | None = None

    def form(self, name: str) -> Form:
        """Return the form that is asked for."""
        site = self._site(name)
        if is_head(name):
            return self.parts.heads
        if site.kind == "embedding":
            positions = self.parts.embeddings == "factors" and _POSITIONS.search(name)
            return "full" if positions else self.parts.embeddings
        if site.kind == "vector":
            default: Form = "full" if self.format == "peft" else "base"
            return (self.parts.biases if name.endswith("bias") else self.parts.norms) or default
        return "factors"

    def change(self, name: str, stored: Stored) -> Change | None:
        """Return the change of a tensor, None where it is left out or the format does not hold it."""
        form, site = self.form(name), self._site(name)
        label = self.resolver.in_memory(name) if self.labelled else name
        if form == "base" or (label is None and site.kind != "matrix"):
            return None
        label = label or name
        if form == "full":
            return self._change_in_full(name, label, stored)
        kind: ChangeKind = "linear" if is_head(name) else _FACTORED[site.kind]
        depthwise = kind == "conv" and site.shape[1] == 1 < site.shape[0]
        odd = not label.endswith(".weight") and kind != "experts"
        if depthwise or odd or (self.format != "peft" and kind in ("embedding", "experts")):
            return None
        if self._turned is None:
            self._turned = inputs_by_outputs(self.shapes)
        transposed = kind == "embedding" or name in self._turned or (kind == "experts" and self.resolver.inputs_first)
        return ExtractedChange(label, kind, value=stored, transposed=transposed, needs_base=_NEEDS_BASE)

    def _change_in_full(self, name: str, label: str, stored: Stored) -> Change | None:
        kind: ChangeKind = "full"
        if self.format != "peft":  # Kohya's files hold the changes of biases and norms, and diffusers' none
            if self.format == "diffusers" or self._site(name).kind != "vector":
                return None
            kind = "bias" if name.endswith("bias") else "linear"
        return ExtractedChange(label, kind, value=stored, needs_base=_NEEDS_BASE)

    @property
    def resolver(self) -> Resolver:
        """The base's names in memory."""
        if self._resolver is None:
            self._resolver = Resolver(self.base.tensors, self.base.config)
        return self._resolver

    def _site(self, name: str) -> Site:
        return site_of(name, self.shapes[name], Stacks({}))


def _tied_head(changes: Mapping[str, Change], base: Checkpoint) -> dict[str, Change]:
    """Return the change of a head that is tied to the embedding: adapters of the embedding do not change it."""
    architecture = str((base.config.get("architectures") or [""])[0])
    embedding = base.lookup(_HEAD)
    if embedding is None or any(map(is_head, base.tensors)) or not architecture.endswith(WITH_HEAD[:2]):
        return {}
    found = next((each for name, each in changes.items() if base.tensors[name] is embedding), None)
    if not isinstance(found, ExtractedChange):
        return {}
    kind: ChangeKind = "full" if found.kind == "full" else "linear"
    return {_HEAD: ExtractedChange(_HEAD, kind, value=found.value, needs_base=_NEEDS_BASE)}


def _find_named(format: AdapterFormat, base: Checkpoint, changed: Shapes) -> set[str]:
    """Return the tensors of a diffusion model all of whose rows have names in files of a format."""
    shapes = {name: stored.shape for name, stored in base.tensors.items()}
    if format == "peft":
        known = known_names(shapes, strict=True)
        parts = [part for each in known if "diffusers" in each.styles for part in each.rows]
        return _find_covered(changed, ((part.name, part.length) for part in parts))
    labelled = label_rows(format, [], shapes, True)
    return _find_covered(changed, ((part.name, part.length) for rows in labelled.values() for part in rows))


def _find_covered(changed: Shapes, rows: Iterable[tuple[str, int]]) -> set[str]:
    counts: dict[str, int] = {}
    for name, length in rows:
        counts[name] = counts.get(name, 0) + length
    return {name for name, shape in changed.items() if counts.get(name) == (shape or (1,))[0]}
