"""A first choice of method and scale, from how the models' changes relate to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean
from typing import Any

from typing_extensions import Unpack

from merging.display.progress import Progress
from merging.display.tables import Displayed
from merging.errors import InputError
from merging.geometry.alignment import MEMORY, AlignOptions, ModelLike
from merging.geometry.compare_models import compare
from merging.geometry.comparison import Comparison
from merging.maths.lazy_torch import torch
from merging.methods.choosing import FULL, LORA
from merging.type_checks import check_types

__all__ = ["Suggestion", "suggest"]

SAME = 0.999
"""The cosine from which two changes count as one."""

KIN = 0.5
"""The mean cosine from which changes count as runs of one training."""

RELATED = 0.1
"""The mean cosine above which a sum counts shared directions several times."""

UNEQUAL = 3.0
"""The ratio of the largest norm to the smallest from which a sum is mostly one model."""

TSV_OF_ADAPTERS = 1.35
"""TSV's scale for adapters, times the root of their number: 0.6 is the best one for five on the benchmark."""


@dataclass(frozen=True, slots=True, repr=False)
class Suggestion(Displayed):
    """A method to begin with.

    Attributes:
        models: The models to merge, without repeats.
        chain: The method, or methods joined by ``+``.
        parameters: Its parameters.
        search: The range that is worth a search on examples, as ``merge search --candidate`` takes it.
        cheaper: A chain that takes one pass over the files, with its parameters.
        changes: The changes and their directions, in a sentence.
        reason: The reason for the chain.
        sizes: The changes' sizes, in a sentence.
        measured: The figures that speak for it, or that there are none.
        leave_out: The models that repeat another.
        notices: Remarks on the comparison.
    """

    models: tuple[str, ...]
    chain: str
    parameters: dict[str, Any]
    search: str
    cheaper: tuple[str, dict[str, Any]]
    changes: str
    reason: str
    sizes: str
    measured: str
    leave_out: tuple[str, ...]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Relations:
    """The sizes and directions that the rules ask for."""

    count: int
    adapters: bool
    cosine: float
    ratio: float

    @property
    def norm_keeping(self) -> float:
        """The factor of a sum of changes of one size that gives the sum this size, by their mean cosine."""
        spread = 1 + (self.count - 1) * max(self.cosine, 0.0)
        return round(1 / sqrt(self.count * spread), 2)

    @property
    def tsv_scale(self) -> float:
        """The scale of TSV: the more adapters, the more their parts add up to."""
        return round(TSV_OF_ADAPTERS / sqrt(self.count), 2) if self.adapters else 1.0


@dataclass(frozen=True, slots=True)
class _Rule:
    """A chain, and the condition for which it is suggested."""

    holds: Callable[[_Relations], bool]
    chain: str
    parameters: Callable[[_Relations], dict[str, Any]]
    search: str
    reason: str
    measured: str


_NO_FIGURES = "none here for such models"

_RULES = (
    _Rule(
        lambda found: found.count == 1,
        "task_arithmetic",
        lambda _: {"scale": 1.0},
        "task_arithmetic:scale=0.2..1.2",
        "one change is added as it is; a smaller scale keeps more of the base",
        _NO_FIGURES,
    ),
    _Rule(
        lambda found: found.cosine >= KIN,
        "linear",
        lambda _: {},
        "task_arithmetic:scale=?",
        "they point in one direction, as runs of one training do: an average keeps their size, a sum overshoots",
        _NO_FIGURES,
    ),
    _Rule(
        lambda found: found.cosine >= RELATED,
        "karcher",
        lambda _: {"space": "changes"},
        "task_arithmetic:scale=?",
        "they share directions, which a sum counts several times: the mean on the sphere keeps the size of one",
        _NO_FIGURES,
    ),
    _Rule(
        lambda found: found.ratio >= UNEQUAL,
        "decouple+tsv",
        lambda found: {"scale": found.tsv_scale},
        "decouple+tsv:scale=0.4..2",
        "they are at right angles and of very different sizes: sizes are made equal, then leading directions merged",
        f"accuracy decouple+tsv {FULL['decouple+tsv (chosen on validation)']}, of full fine-tunes of one size",
    ),
    _Rule(
        lambda found: found.adapters,
        "tsv",
        lambda found: {"scale": found.tsv_scale},
        "tsv:scale=0.4..1.4",
        "they are at right angles, as tasks of their own: leading directions of each keep out of the others' way",
        f"accuracy tsv {LORA['tsv']}, task_arithmetic {LORA['task arithmetic']}, linear {LORA['average']}, each alone "
        f"{LORA['individual']}",
    ),
    _Rule(
        lambda _: True,
        "tsv",
        lambda found: {"scale": found.tsv_scale},
        "tsv:scale=0.6..2",
        "they are at right angles, as tasks of their own: leading directions of each keep out of the others' way",
        f"accuracy tsv {FULL['tsv']}, ties {FULL['ties']}, task_arithmetic {FULL['task arithmetic']}, linear "
        f"{FULL['average']}, each alone {FULL['individual']}",
    ),
)
"""The first that holds is the suggestion. Figures are accuracies of the benchmark on text tasks."""


@check_types("max_memory", "progress")
def suggest(
    models: Sequence[ModelLike],
    *,
    max_memory: int | str = MEMORY,
    device: torch.device | str = "cpu",
    progress: Progress | bool | None = None,
    **options: Unpack[AlignOptions],
) -> Suggestion:
    """Suggest a method and its scale, from the sizes and directions of the models' changes.

    No example is looked at: it is where a search begins, and no proof of a better model.

    Args:
        models: The models: paths, addresses, or opened models.
        max_memory: The memory for inner products, in bytes or as ``"500MB"``.
        device: The device that computes.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        **options: Options of :func:`~merging.geometry.alignment.align`, such as ``base``.

    Returns:
        The suggestion.

    Raises:
        merging.errors.MergingError: For models that cannot be read or do not fit together, that change nothing, and
            for wrong options.

    Example:
        >>> import merging
        >>> merging.suggest(["a", "b", "c"]).chain
        'tsv'
    """
    found = compare(models, max_memory=max_memory, device=device, progress=progress, directions=0, **options)
    for each in found.models:
        if not each.norm:
            raise InputError(f"{each.path}: it changes nothing: leave it out")
    repeats = _repeats(found)
    kept = [slot for slot, each in enumerate(found.models) if each.name not in repeats]
    relations = _relations(found, kept)
    rule = next(rule for rule in _RULES if rule.holds(relations))
    return Suggestion(
        models=tuple(found.models[slot].path for slot in kept),
        chain=rule.chain,
        parameters=rule.parameters(relations),
        search=rule.search,
        cheaper=("task_arithmetic", {"scale": relations.norm_keeping}),
        changes=_changes(found, kept),
        reason=rule.reason,
        sizes=_sizes(found, kept),
        measured=rule.measured,
        leave_out=tuple(repeats),
        notices=found.notices,
    )


def _repeats(found: Comparison) -> list[str]:
    """Return the models that repeat an earlier model, times a factor at most."""
    rows = zip(found.names, found.cosines, strict=True)
    return [name for row, (name, cosines) in enumerate(rows) if any((value or 0) >= SAME for value in cosines[:row])]


def _cosines(found: Comparison, kept: Sequence[int]) -> list[float]:
    return [found.cosines[row][column] or 0.0 for row in kept for column in kept if column < row]


def _norms(found: Comparison, kept: Sequence[int]) -> list[float]:
    return [found.models[slot].norm for slot in kept]


def _relations(found: Comparison, kept: Sequence[int]) -> _Relations:
    cosines, norms = _cosines(found, kept), _norms(found, kept)
    return _Relations(
        count=len(kept),
        adapters=all(found.models[slot].kind == "adapter" for slot in kept),
        cosine=fmean(cosines) if cosines else 0.0,
        ratio=max(norms) / min(norms),
    )


def _changes(found: Comparison, kept: Sequence[int]) -> str:
    cosines = _cosines(found, kept)
    kinds = sorted({found.models[slot].kind for slot in kept})
    parts = [f"{len(kept)} {' and '.join(f'{kind}s' for kind in kinds)}"]
    if cosines:
        parts.append(f"cosines {min(cosines):+.2f} to {max(cosines):+.2f}, {fmean(cosines):+.2f} in the mean")
    if cosines and found.signs:
        signs = [found.signs.matrix[row][column] for row in kept for column in kept if column < row]
        agree = [value for value in signs if value is not None]
        parts += [f"signs agree in {fmean(agree):.0%} (chance 50%)"] if agree else []
    return "; ".join(parts)


def _sizes(found: Comparison, kept: Sequence[int]) -> str:
    norms = _norms(found, kept)
    spectra = [spectrum.effective for slot in kept if (spectrum := found.models[slot].spectrum)]
    ranks = f"; effective ranks {min(spectra):.3g} to {max(spectra):.3g}" if spectra else ""
    return f"norms {min(norms):.3g} to {max(norms):.3g}, {max(norms) / min(norms):.2g} times{ranks}"
