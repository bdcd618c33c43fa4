"""The names of a merged LoRA's tensors in its file: the inputs' own names, or the names that one program reads."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from merging.errors import InputError
from merging.maths.shapes import Shapes
from merging.plan.names.labels import (
    choose_format,
    find_unnamed,
    formats_with_names,
    label_rows,
    make_denoiser_labels,
    unnamed_error,
)
from merging.plan.names.peft_names import PREFIX
from merging.plan.recipe import AdapterFormat, Recipe
from merging.sources import Adapter
from merging.sources.adapter import TensorNames
from merging.sources.changes import Change
from merging.sources.fused_names import RowRange

__all__ = ["FormatNames", "InputNames", "Names", "TargetRows", "are_whole", "choose_names"]

TargetRows = Mapping[str, tuple[RowRange, ...]]
"""The rows of the merged tensors that each target of an adapter consists of."""

_FORMATS = {"Kohya": "kohya", "ComfyUI": "comfyui", "diffusers": "diffusers"}
"""The name of the form of a dialect's files; any other form is ``as given``."""

_COMPONENT = re.compile(r"(?:unet|transformer(?:_2)?|connectors|text_encoder(?:_\d)?)\.")
"""The names of the parts of diffusers' pipelines."""

_IN_FULL = frozenset({"diff", "diff_b", "diff_m", "w_norm", "b_norm", "lora_B.bias", "lora_up.bias"})
"""The last parts of the names of full changes."""

_FLAT, _DOTTED = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
"""The lower and the upper factor of a module, in Kohya's files and in diffusers'."""


class Names(ABC):
    """The names of a file's tensors. Each label stands for a weight or a bias, and for the ``rows`` in it.

    ``format`` is the name of the form of the file, and ``header`` the program whose entries its header has, if any.
    """

    format: str
    header: AdapterFormat | None
    rows: Mapping[str, tuple[RowRange, ...]]

    @abstractmethod
    def factors(self, label: str) -> tuple[str, str]:
        """Return the names of the lower and the upper factor."""

    @abstractmethod
    def alpha(self, label: str) -> str | None:
        """Return the name of the alpha, None for files that state none."""

    @abstractmethod
    def in_full(self, label: str, weight: tuple[int, ...]) -> str | None:
        """Return the name of a full change, in a module whose weight has a shape; None where files hold none."""

    def kept_in_full(self, shapes: Shapes) -> set[str]:
        """Return the weights that are merged in full, as they are stored, and not as factors."""
        return {
            rows[0].name
            for label, rows in self.rows.items()
            if len(rows) == 1 and self.in_full(label, shapes.get(rows[0].name, ())) and label.endswith(".weight")
        }


class FormatNames(Names):
    """The names in files of diffusers, Kohya or PEFT, as far as the tables of these programs go.

    ``shapes`` are of the base's tensors if the merge is ``based`` on one, else of the targets.
    """

    def __init__(self, format: AdapterFormat, adapters: Sequence[Adapter], shapes: Shapes, based: bool) -> None:
        self.format, self.header = format, format
        self.rows = label_rows(format, adapters, shapes, based)

    def factors(self, label: str) -> tuple[str, str]:
        module = label.rpartition(".")[0]
        down, up = _FLAT if self.header == "kohya" else _DOTTED
        return f"{module}.{down}", f"{module}.{up}"

    def alpha(self, label: str) -> str | None:
        return f"{label.rpartition('.')[0]}.alpha" if self.header == "kohya" else None

    def in_full(self, label: str, weight: tuple[int, ...]) -> str | None:
        # Of what is changed in full, Kohya's files hold biases, and the weights and biases of norms.
        module, _, leaf = label.rpartition(".")
        if self.header != "kohya" or (leaf == "weight" and len(weight) > 1):
            return None
        return f"{module}.{'w_norm' if leaf == 'weight' else 'b_norm' if len(weight) == 1 else 'diff_b'}"


@dataclass
class _Given:
    """The names that one or more inputs have for the tensors of the merge: by label, the rows and the names."""

    rows: dict[str, tuple[RowRange, ...]] = field(default_factory=dict)
    written: dict[str, list[TensorNames]] = field(default_factory=lambda: defaultdict(list))

    def add(self, adapter: Adapter, placed: TargetRows, merged: Shapes) -> bool:
        """Add the names of an adapter's targets that are merged; return False if one cannot be kept."""
        for target, change in adapter.changes.items():
            rows = placed.get(target, ())
            if (rows and merged.keys().isdisjoint(part.name for part in rows)) or (not rows and change.optional):
                continue
            written = adapter.tensor_names.get(target)
            shape = (rows[0].length, *merged[rows[0].name][1:]) if len(rows) == 1 and rows[0].name in merged else None
            if not rows or written is None or not _can_be_kept(adapter, change, written, shape):
                return False
            label = f"{written.stem}.{target.rpartition('.')[2]}"
            if self.rows.setdefault(label, rows) != rows:
                return False
            self.written[label].append(written)
        return True

    def is_clear(self) -> bool:
        """Return whether no row has two names."""
        spans = sorted((part.name, part.start, part.length) for rows in self.rows.values() for part in rows)
        return all(one[0] != other[0] or one[1] + one[2] <= other[1] for one, other in pairwise(spans))

    def covers(self, others: Sequence[TargetRows], merged: Shapes) -> bool:
        """Return whether there are names for all rows that the adapters change."""
        own: defaultdict[str, list[RowRange]] = defaultdict(list)
        for rows in self.rows.values():
            for part in rows:
                own[part.name].append(part)
        wanted = (part for placed in others for rows in placed.values() for part in rows if part.name in merged)
        return all(sum(_count_shared(part, held) for held in own[part.name]) == part.length for part in wanted)


def _count_shared(one: RowRange, other: RowRange) -> int:
    """Return how many rows two ranges of one tensor have in common."""
    return max(0, min(one.start + one.length, other.start + other.length) - max(one.start, other.start))


def _can_be_kept(adapter: Adapter, change: Change, written: TensorNames, shape: tuple[int, ...] | None) -> bool:
    """Return whether an adapter's name for a change of a tensor of a shape may stay.

    PEFT's adapters are written as PEFT does, and so are the kinds of change that only they hold.
    """
    if adapter.names_modules and written.stem.startswith(PREFIX):
        return False
    return change.kind in ("linear", "conv", "bias") and not (shape and change.is_transposed(shape))


class InputNames(Names):
    """The names in the inputs' own files: a merge of files that name and store a module alike does so too."""

    def __init__(self, adapters: Sequence[Adapter], given: _Given) -> None:
        self.format = _FORMATS.get(adapters[0].dialect, "as given")
        self.rows, self._written = given.rows, given.written
        every = [each for many in given.written.values() for each in many]
        pairs = [each.leaves for each in every if len(each.names) == 2]
        flat = not any("." in each.stem for each in every)
        default = _FLAT if flat else _DOTTED
        self._leaves = next((leaves for leaves in pairs if leaves[0].startswith("lora_")), default)
        self._alphas = flat or any(each.alpha for each in every)
        self.header = "kohya" if flat else "diffusers" if self._is_configured(adapters, every) else None

    def _is_configured(self, adapters: Sequence[Adapter], every: Sequence[TensorNames]) -> bool:
        """Return whether the header has diffusers' configs, as an input's has. Without alphas, scales are 1."""
        stated = any(adapter.configured for adapter in adapters) and not self._alphas
        return stated and self._leaves == _DOTTED and all(_COMPONENT.match(each.stem) for each in every)

    @classmethod
    def from_all(cls, adapters: Sequence[Adapter], placed: Sequence[TargetRows], merged: Shapes) -> InputNames | None:
        """Return the names on which all inputs agree, None if there are none."""
        given = _Given()
        one_form = len({adapter.dialect for adapter in adapters}) == 1
        known = one_form and all(given.add(each, rows, merged) for each, rows in zip(adapters, placed, strict=True))
        return cls(adapters, given) if known and given.is_clear() else None

    @classmethod
    def from_first(
        cls, adapters: Sequence[Adapter], placed: Sequence[TargetRows], merged: Shapes
    ) -> tuple[InputNames, Adapter] | None:
        """Return the names of the first input with names for all that any input changes, and that input."""
        for adapter, rows in zip(adapters, placed, strict=True):
            given = _Given()
            if given.add(adapter, rows, merged) and given.is_clear() and given.covers(placed, merged):
                return cls([adapter], given), adapter
        return None

    def factors(self, label: str) -> tuple[str, str]:
        pair = next((each for each in self._written[label] if len(each.names) == 2), None)
        if pair and not pair.leaves[0].startswith("lora_"):
            return pair.names[0], pair.names[1]
        stem = self._written[label][0].stem
        return f"{stem}.{self._leaves[0]}", f"{stem}.{self._leaves[1]}"

    def alpha(self, label: str) -> str | None:
        return f"{self._written[label][0].stem}.alpha" if self._alphas else None

    def in_full(self, label: str, weight: tuple[int, ...]) -> str | None:
        written = self._written[label]
        return written[0].names[0] if all(each.leaves and each.leaves[0] in _IN_FULL for each in written) else None


def choose_names(
    recipe: Recipe, adapters: Sequence[Adapter], placed: Sequence[TargetRows], targets: Shapes, base: Shapes | None
) -> tuple[Names | None, list[str]]:
    """Choose the names of a merged LoRA's tensors.

    A format that is asked for decides. Else the inputs' own names are kept where they agree, or the names of the first
    input that covers all that is merged, or the names of PEFT's or diffusers' files.

    Args:
        recipe: the recipe.
        adapters: the adapters.
        placed: the rows that each adapter's targets consist of.
        targets: the shapes of the targets.
        base: the shapes of a base's tensors, None without a base.

    Returns:
        The names, None for PEFT's; and remarks on the choice.

    Raises:
        InputError: for targets that a format has no name for.
    """
    own = InputNames.from_all(adapters, placed, targets)
    if own and recipe.format is None:
        return own, []
    format = choose_format(recipe, adapters)
    free = recipe.format is None and not all(adapter.names_modules for adapter in adapters)
    if free and (found := InputNames.from_first(adapters, placed, targets)):
        return found[0], _differing(adapters, str(found[1].path))
    note = _differing(adapters, f"files of {format}") if recipe.format is None else []
    if format == "gguf":
        return None, note
    if format == "peft":
        return _name_rows_for_peft(adapters, placed, targets, base), note
    names = FormatNames(format, adapters, targets if base is None else base, base is not None)
    lost = find_unnamed(names.rows, targets)
    if lost is not None:
        based = base is not None
        others = formats_with_names(adapters, base or targets, targets, based)
        raise unnamed_error(lost, names.format, based, others, bool(own))
    return names, note


def are_whole(placed: Sequence[TargetRows], shapes: Shapes) -> bool:
    """Return whether each target of each adapter is one whole tensor of these."""
    every = (rows for each in placed for rows in each.values())
    return all(len(rows) == 1 and rows[0].length == (shapes.get(rows[0].name) or (1,))[0] for rows in every)


def _name_rows_for_peft(
    adapters: Sequence[Adapter], placed: Sequence[TargetRows], targets: Shapes, base: Shapes | None
) -> Names | None:
    """Return diffusers' names in PEFT's files where they stand for other rows than the targets; None elsewhere."""
    shapes = targets if base is None else base
    kept = all(adapter.names_modules for adapter in adapters) and (base is None or are_whole(placed, base))
    if kept or make_denoiser_labels(shapes, targets) is not None:
        return None
    try:
        names = FormatNames("peft", adapters, shapes, base is not None)
    except InputError:
        return None
    return names if find_unnamed(names.rows, targets) is None else None


def _differing(adapters: Sequence[Adapter], chosen: str) -> list[str]:
    """Return a remark on the names chosen where the adapters' names differ; PEFT's and XLabs' have one naming each."""
    dialects = {adapter.dialect.partition(" ")[0] for adapter in adapters}
    if len(adapters) == 1 or dialects in ({"PEFT"}, {"XLabs"}):
        return []
    return [f"the inputs' names differ: the output has the names of {chosen}"]
