"""What a merged LoRA's tensors are called in the files of other programs, and which factors go where in them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merging.errors import InputError
from merging.plan.items import Constant, Form, Item, Placing
from merging.recipe import AdapterFormat, Recipe
from merging.site import Site
from merging.sources import Adapter
from merging.sources.adapter import Change
from merging.sources.computed import Computed
from merging.sources.diffusion_names import Known, known_names
from merging.sources.fused_names import Rows
from merging.sources.stored import Out, Stored

__all__ = ["Exporter", "output_format", "peft_labels"]

Shapes = Mapping[str, tuple[int, ...]]

_OWN: dict[str, AdapterFormat] = {
    "Kohya": "kohya",
    "ComfyUI": "kohya",
    "diffusers": "diffusers",
    "XLabs": "diffusers",
}
"""The format in which a merge of files of one dialect comes out."""

_LEAVES: dict[AdapterFormat, tuple[str, str]] = {
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}

_CONVOLUTION = re.compile(r"(?:conv\w*|proj_in|proj_out|_op|in_layers_2|out_layers_3|skip_connection)$")


def output_format(recipe: Recipe, adapters: Sequence[Adapter]) -> AdapterFormat:
    """The format of a merged adapter: as asked for, or that of the inputs."""
    own = {_OWN.get(adapter.dialect, "peft") for adapter in adapters}
    if recipe.format or len(own) == 1:
        return recipe.format or own.pop()
    return "peft" if "peft" in own else "diffusers"


def peft_labels(adapters: Sequence[Adapter], shapes: Shapes, targets: Sequence[str], based: bool) -> dict[str, str]:
    """The names of a diffusion model's tensors in an adapter of PEFT's, which is of one component alone."""
    found: dict[str, Known] = {}
    for known in known_names(shapes, strict=True) if based or not _flat(adapters) else ():
        if "diffusers" in known.styles and len(known.rows) == 1:
            (rows,) = known.rows
            if rows.start == 0 and rows.length == shapes[rows.name][0]:
                found[rows.name] = known
    left = next((target for target in targets if target not in found), None)
    if left is not None:
        raise _unnamed(left, "peft", based)
    components = sorted({found[target].component for target in targets})
    if len(components) > 1:
        raise InputError(
            f"the LoRA is of {' and '.join(components)}, and an adapter of PEFT's is of one model: use --format "
            f"diffusers or kohya"
        )
    return {target: _as_stored(found[target], target) for target in targets}


def _as_stored(known: Known, stored: str) -> str:
    """The name with or without the level that text encoders have lost, as the base has it."""
    shorter = known.name.removeprefix("text_model.")
    return known.name if stored.endswith(known.name) or not stored.endswith(shorter) else shorter


def _flat(adapters: Sequence[Adapter]) -> bool:
    return any(adapter.dialect == "Kohya" for adapter in adapters)


def _unnamed(target: str, format: AdapterFormat, based: bool) -> InputError:
    program = {"peft": "PEFT", "diffusers": "diffusers", "kohya": "Kohya's files"}[format]
    hint = "choose another --format" if based else "give the model with --base, whose names tell, or another --format"
    return InputError(f"{target}: what {program} would call it is not known: {hint}, or use --as model")


@dataclass(frozen=True, slots=True)
class _Share:
    """Rows of a target, from ``start`` on, that are the rows of a tensor of the output from ``first`` on."""

    label: str
    first: int
    start: int
    length: int


class Exporter:
    """Lays out the items of a merged LoRA as files of diffusers or Kohya have them.

    ``shapes`` are those of the base's tensors, or without a base of the targets; ``factored`` those of the targets that
    become factors, of ``rank`` and of the type ``kind``. Where the output fuses what the targets keep apart, their
    factors stand side by side; where it keeps apart what they fuse, each part has a copy of the lower factor.
    """

    def __init__(
        self,
        format: AdapterFormat,
        adapters: Sequence[Adapter],
        shapes: Shapes,
        factored: Shapes,
        rank: int,
        kind: str,
        based: bool,
    ) -> None:
        self._format, self._based, self._rank, self._kind = format, based, rank, kind
        self._labels = self._named(adapters, shapes)
        self._shares: defaultdict[str, list[_Share]] = defaultdict(list)
        for label, rows in self._labels.items():
            first = 0
            for part in rows:
                self._shares[part.name].append(_Share(label, first, part.start, part.length))
                first += part.length
        self._terms: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for name in factored:
            for share in self._shares[name]:
                terms = self._terms[share.label]
                terms.setdefault(name, rank * len(terms))
        self._factored = factored

    def _named(self, adapters: Sequence[Adapter], shapes: Shapes) -> dict[str, tuple[Rows, ...]]:
        """The names of the output's tensors, and the rows of the targets that they consist of."""
        if not self._based and _flat(adapters):
            if self._format != "kohya" or not all(adapter.dialect == "Kohya" for adapter in adapters):
                raise InputError(
                    "the names in Kohya's files do not tell those of the model's modules: give it with --base"
                )
            return {name: (Rows(name, 0, shape[0] if shape else 1),) for name, shape in shapes.items()}
        known = known_names(shapes, strict=True)
        family = _family(known)
        return {label: each.rows for each in known if (label := _label(each, self._format, family))}

    def item(self, site: Site, changes: tuple[Change | None, ...], stored: Stored | None, form: Form) -> Item:
        """The item of a target. Raises :class:`~merging.errors.InputError` for what the format cannot hold."""
        brought = [change for change in changes if change]
        shares = self._shares[site.name]
        if sum(share.length for share in shares) != (site.shape[0] if site.shape else 1):
            raise _unnamed(site.name, self._format, self._based)
        if form != "factors":
            return Item(site, changes, stored, (self._delta(site, shares, form),), form)
        self._check(site, brought)
        placings = tuple(self._placings(site, shares))
        outs = tuple(out for each in placings for out in (each.down, each.up) if out)
        return Item(site, changes, stored, tuple(dict.fromkeys(outs)), form, placings=placings)

    def _delta(self, site: Site, shares: Sequence[_Share], form: Form) -> Out:
        """A change that is kept in full, as that of a bias or a norm."""
        if form == "dense" or self._format != "kohya" or len(shares) != 1:
            raise InputError(
                f"{site.name} is changed in full, which a LoRA in the format of {self._format} does not hold: make a "
                f"model with --as model"
            )
        module, _, leaf = shares[0].label.rpartition(".")
        return Out(f"{module}.{'diff_b' if leaf == 'bias' else 'diff'}", self._kind, site.shape)

    def _check(self, site: Site, changes: Sequence[Change]) -> None:
        if any(change.kind in ("embedding", "experts") or change.is_transposed(site.shape) for change in changes):
            raise InputError(
                f"{site.name} is an embedding, or lies the other way round, which a LoRA in the format of "
                f"{self._format} does not hold: use --format peft, or --as model"
            )
        flattened = all(isinstance(change, Computed) and not change.kernel for change in changes)
        if not self._based and flattened and _CONVOLUTION.search(site.name.rpartition(".")[0]):
            raise InputError(
                f"{site.name} may be a convolution, whose kernel the file does not tell: give the model with --base"
            )

    def _placings(self, site: Site, shares: Sequence[_Share]) -> Iterator[Placing]:
        _, inputs, *kernel = site.shape
        down, up = _LEAVES[self._format]
        begun: set[str] = set()
        for share in shares:
            module, terms = share.label.rpartition(".")[0], self._terms[share.label]
            width = self._rank * len(terms)
            lower = Out(f"{module}.{down}", self._kind, (width, inputs, *kernel))
            upper = Out(f"{module}.{up}", self._kind, (self._rows(share.label), width, *(1 for _ in kernel)))
            rows = slice(share.start, share.start + share.length)
            again = share.label in begun  # both runs of its rows have one lower factor
            begun.add(share.label)
            yield Placing(None if again else lower, upper, rows, share.first, terms[site.name])

    def _rows(self, label: str) -> int:
        return sum(part.length for part in self._labels[label])

    def constants(self) -> tuple[Constant, ...]:
        """What is known beforehand: alphas, and zeros where nothing was trained of what the output fuses."""
        found: list[Constant] = []
        for label, terms in self._terms.items():
            module, width = label.rpartition(".")[0], self._rank * len(terms)
            if self._format == "kohya":
                found.append(Constant(Out(f"{module}.alpha", "F32", ()), float(width)))
            first = 0
            for part in self._labels[label]:
                if part.name not in terms:
                    kernel = next(self._factored[name][2:] for name in terms)
                    shape = (self._rows(label), width, *(1 for _ in kernel))
                    upper = Out(f"{module}.{_LEAVES[self._format][1]}", self._kind, shape)
                    found.append(Constant(upper, 0.0, first * width, part.length * width))
                first += part.length
        return tuple(found)


def _family(known: Sequence[Known]) -> str:
    """The kind of model, as far as it decides how Kohya's files call its parts."""
    components = {each.component for each in known}
    if "transformer" in components:
        return "transformer"
    unet = [each.name for each in known if each.component == "unet" and "diffusers" in each.styles]
    deep = any(".transformer_blocks.1." in name or name.startswith("add_embedding.") for name in unet)
    return "sdxl" if deep or "text_encoder_2" in components else "sd"


def _label(known: Known, format: AdapterFormat, family: str) -> str | None:
    """What a format calls a tensor of the output, None if it calls it by another of its names."""
    if format == "diffusers":
        return f"{known.component}.{known.name}" if "diffusers" in known.styles else None
    wanted = "diffusers" if known.component == "unet" and family == "sd" else "published"
    if wanted not in known.styles:
        return None
    prefix = {
        "unet": "lora_unet",
        "transformer": "lora_unet",
        "text_encoder": "lora_te" if family == "sd" else "lora_te1",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }[known.component]
    if known.component == "text_encoder_2" and known.name.startswith("encoder.block."):
        prefix = "lora_te3"  # a T5 is the third, even where there is no second
    return f"{prefix}_{known.flat}"
