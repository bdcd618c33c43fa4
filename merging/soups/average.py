"""A soup: the checkpoints of a run, a schedule and perhaps a score, made into a recipe that a merge carries out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from merging.api.arguments import check_path, check_report
from merging.api.merge_files import Merged, merge_plan, plan_for
from merging.api.options import RecipeOptions
from merging.display.progress import Progress, resolve_progress
from merging.engine.resources import pick_devices
from merging.errors import OptionError, option
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import output_path
from merging.plan.recipe import FIELDS, Recipe
from merging.plan.recipe_values import make_recipe
from merging.soups.schedules import Schedule, schedule_weights
from merging.soups.scoring import ScoreFunction, make_scorer
from merging.soups.search import ChosenSoup, find_best_window, stir_greedily
from merging.soups.snapshots import Snapshot, find_snapshots, select_snapshots
from merging.sources import Adapter
from merging.sources.distributed import METADATA
from merging.type_checks import check_types

__all__ = ["OnLine", "SoupSettings", "plan_soup", "soup"]

_log = logging.getLogger(__name__)

OnLine = Callable[[str], None]
"""Receives a line about each soup that is scored."""


@dataclass(frozen=True, kw_only=True)
class SoupSettings:
    """The checkpoints of a soup, and their weights: the parameters of :func:`soup` of the same names."""

    last: int | None = None
    until: int | None = None
    schedule: Schedule = "mean"
    ema_decay: float | None = None
    score: str | ScoreFunction | None = None
    window: int | None = None
    minimize: bool = False
    score_timeout: float = 3600.0

    def __post_init__(self) -> None:
        if self.score is None and (self.window is not None or self.minimize):
            name = option("window", self.window) if self.window is not None else option("minimize", True)
            raise OptionError(
                f"{name}: is for soups that are scored: add {option('score', 'COMMAND')}, or choose a window by "
                f"{option('last', 'COUNT')} and {option('until', 'STEP')}"
            )
        if self.score is not None and self.window is None and self.schedule != "mean":
            raise OptionError(
                f"{option('schedule', self.schedule)}: a greedy soup is a mean: add {option('window', 'COUNT')} to "
                f"score windows with this schedule"
            )


@dataclass(frozen=True, kw_only=True)
class PlannedSoup:
    """The recipe of a soup, the lines that describe it, and its score if soups are scored."""

    recipe: Recipe
    notices: tuple[str, ...]
    facts: Mapping[str, float]


@check_types("progress", "max_memory")
def soup(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    output: str | Path = "soup",
    last: int | None = None,
    until: int | None = None,
    schedule: Schedule = "mean",
    ema_decay: float | None = None,
    score: str | ScoreFunction | None = None,
    window: int | None = None,
    minimize: bool = False,
    score_timeout: float = 3600.0,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    resume: bool | None = None,
    report: str | Path | None = None,
    on_event: OnLine | None = None,
    **options: Unpack[RecipeOptions],
) -> Merged:
    """Average the checkpoints of a run: full models, or adapters.

    Args:
        checkpoints: the folder of a run, whose checkpoints are found by their names (``checkpoint-500``,
            ``step-500``, ``epoch=1-step=500.ckpt``, ``name-000004.safetensors``), or at least two checkpoints.
        output: the file or folder to write.
        last: the number of checkpoints, counted from the end; by default all.
        until: the step of the last checkpoint that is used, so that ``last`` and ``until`` choose a window.
        schedule: the weights: ``"mean"``; ``"ema"``, an exponential moving average; or a decay of the learning rate
            that the weights stand for: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` (WSM, arXiv 2507.17634).
        ema_decay: of ``"ema"``, the share of the average that each checkpoint keeps; 0.8 by default.
        score: a command that prints a number for the path of a model, which is put in place of ``{}`` or behind the
            command; or a function of the path. The soup is greedy then: checkpoints join as long as they help.
        window: score every window of this number of consecutive checkpoints instead, and use the best.
        minimize: whether lower scores are better.
        score_timeout: the most seconds that the command may take for one model.
        device: ``cpu``, ``cuda`` for all such GPUs, ``cuda:0,1`` for some, ``mps``, ``xpu``, or ``auto``.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        overwrite: whether an output that exists is replaced.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        resume: whether a merge that stopped is gone on with, as for :func:`merging.merge`.
        report: a page to write of the merge, as for :func:`merging.merge`.
        on_event: receives a line about each soup that is scored.
        **options: the options of a recipe, as for :func:`~merging.merge`. Without ``rank``, an averaged adapter has
            the rank of the checkpoints.

    Returns:
        The path and the kind of the output, its size and remarks; ``score`` is among its facts if soups are scored.

    Raises:
        MergingError: for folders without checkpoints, for options that do not fit together, for a command that fails,
            takes too long or prints no number, and for everything that :func:`~merging.merge` refuses.

    Example:
        >>> import merging
        >>> made = merging.soup(["one", "two", "three"], output="mean-of-three", schedule="1-sqrt")
        >>> made.kind, made.method, made.notices[0]
        ('model', 'linear', 'soup of 3 checkpoints: one 0.577, two 0.239, three 0.184')
    """
    unknown = next((name for name in options if name not in FIELDS), None)
    if unknown is not None:
        raise OptionError(f"{unknown!r} is no option of a soup")
    settings = SoupSettings(
        last=last,
        until=until,
        schedule=schedule,
        ema_decay=ema_decay,
        score=score,
        window=window,
        minimize=minimize,
        score_timeout=score_timeout,
    )
    paths = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    names = [str(check_path(path, "checkpoints")) for path in paths]
    destination, devices, bar = output_path(output), pick_devices(device), resolve_progress(progress)
    planned = plan_soup(names, destination, settings, options, on_event)
    merged = merge_plan(
        plan_for(planned.recipe, destination),
        destination,
        devices=devices,
        threads=threads,
        max_memory=max_memory,
        overwrite=overwrite,
        progress=bar,
        resume=resume,
        report=check_report(report),
    )
    return replace(merged, notices=(*planned.notices, *merged.notices), facts={**merged.facts, **planned.facts})


def plan_soup(
    names: Sequence[str],
    destination: Path,
    settings: SoupSettings,
    options: Mapping[str, Any],
    on_event: OnLine | None = None,
) -> PlannedSoup:
    """Return the recipe of a soup. Where soups are scored, they are made, scored and removed again.

    Args:
        names: the folder of a run, or its checkpoints.
        destination: the output, next to which soups are made to be scored.
        settings: the checkpoints and their weights.
        options: the options of the recipe.
        on_event: receives a line about each soup that is scored.

    Raises:
        MergingError: as :func:`soup` does.
    """
    if not names:
        raise OptionError("there is nothing to average: name the folder of a run, or checkpoints")
    snapshots = select_snapshots(find_snapshots(names), settings.last, settings.until)
    options = {name: value for name, value in options.items() if value is not None}
    if "rank" not in options and options.get("kind", options.get("as")) != "model":
        options |= _rank_of(snapshots[-1], bool(options.get("dequantise", options.get("dequantize"))))
    chosen, facts = tuple(snapshots), dict[str, float]()
    if settings.score is not None:
        choice = _choose(snapshots, destination, settings, options, on_event)
        chosen, facts = choice.snapshots, {"score": choice.score}
    weights = _weights(chosen, settings)
    shares = ", ".join(f"{each.name} {weight:.3g}" for each, weight in zip(chosen, weights, strict=True))
    notice = f"soup of {len(chosen)} checkpoint{'s' if len(chosen) > 1 else ''}: {shares}"
    return PlannedSoup(recipe=_make_recipe(chosen, settings, options), notices=(notice,), facts=facts)


def _choose(
    snapshots: Sequence[Snapshot],
    destination: Path,
    settings: SoupSettings,
    options: Mapping[str, Any],
    on_event: OnLine | None,
) -> ChosenSoup:
    assert settings.score is not None
    scorer = make_scorer(settings.score, settings.score_timeout)

    def evaluate(soup_of: Sequence[Snapshot]) -> float:
        with _merge_to_score(soup_of, destination, settings, options) as model:
            score = scorer(model)
        line = f"{score:.6g}: {', '.join(each.name for each in soup_of)}"
        _log.info("score %s", line)
        if on_event is not None:
            on_event(line)
        return score

    if settings.window is not None:
        return find_best_window(snapshots, settings.window, evaluate, settings.minimize)
    return stir_greedily(snapshots, evaluate, settings.minimize)


@contextmanager
def _merge_to_score(
    snapshots: Sequence[Snapshot], destination: Path, settings: SoupSettings, options: Mapping[str, Any]
) -> Iterator[Path]:
    """Make a soup to be scored next to the destination, and remove it again. A checkpoint that is a model is as is."""
    path = Path(snapshots[0].path)
    if len(snapshots) == 1 and path.is_dir() and not (path / METADATA).exists():
        yield path
        return
    above = next(
        folder for folder in (destination.absolute().parent, *destination.absolute().parents) if folder.is_dir()
    )
    with tempfile.TemporaryDirectory(prefix=".merging-soup-", dir=above) as folder:
        model = Path(folder) / destination.name
        merge_plan(plan_for(_make_recipe(snapshots, settings, options), model), model)
        yield model


def _make_recipe(snapshots: Sequence[Snapshot], settings: SoupSettings, options: Mapping[str, Any]) -> Recipe:
    weights = _weights(snapshots, settings)
    parameters = {} if len(set(weights)) == 1 else {"weights": weights}
    models = [each.path for each in snapshots]
    return make_recipe({"models": models, "method": "linear", "parameters": parameters, **options}, "soup")


def _weights(snapshots: Sequence[Snapshot], settings: SoupSettings) -> list[float]:
    return schedule_weights([each.step for each in snapshots], settings.schedule, settings.ema_decay)


def _rank_of(snapshot: Snapshot, dequantize: bool) -> dict[str, int]:
    """Return the rank of a checkpoint that is a LoRA: checkpoints of one run change nearly the same directions."""
    model = open_model(snapshot.path, dequantize=dequantize)
    rank = max((change.rank for change in model.changes.values()), default=0) if isinstance(model, Adapter) else 0
    return {"rank": rank} if rank else {}
