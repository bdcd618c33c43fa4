"""A soup: the checkpoints of a run, a schedule and perhaps a score, made into a recipe that a merge carries out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from merging.api.arguments import check_path, check_report
from merging.api.merge_files import Merged, merge_plan, plan_for
from merging.api.options import RecipeOptions
from merging.cluster import RayCluster, make_cluster
from merging.display.progress import Progress, resolve_progress
from merging.engine.cluster_crew import pick_cluster_devices
from merging.engine.resources import pick_devices
from merging.errors import OptionError
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import output_path
from merging.plan.recipe import FIELDS, Recipe
from merging.soups.schedules import Schedule
from merging.soups.scored import OnLine, choose_by_score
from merging.soups.scoring import ScoreFunction
from merging.soups.settings import SoupSettings, make_soup_recipe, weigh_soup
from merging.soups.snapshots import Snapshot, find_snapshots, select_snapshots
from merging.sources import Adapter
from merging.type_checks import check_types

__all__ = ["OnLine", "SoupSettings", "plan_soup", "soup"]


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
    engine: str | RayCluster = "local",
    address: str | None = None,
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
        engine: ``local``, ``ray``, or a :class:`~merging.cluster.RayCluster` with settings, as for
            :func:`merging.merge`. Its workers also score soups.
        address: the address of the Ray cluster, ``HOST:PORT`` or ``auto``.
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
    cluster = make_cluster(engine, address)
    devices = pick_devices(device) if cluster is None else pick_cluster_devices(device)
    destination, bar = output_path(output), resolve_progress(progress)
    planned = plan_soup(names, destination, settings, options, on_event=on_event, cluster=cluster)
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
        cluster=cluster,
    )
    return replace(merged, notices=(*planned.notices, *merged.notices), facts={**merged.facts, **planned.facts})


def plan_soup(
    names: Sequence[str],
    destination: Path,
    settings: SoupSettings,
    options: Mapping[str, Any],
    *,
    on_event: OnLine | None = None,
    cluster: RayCluster | None = None,
) -> PlannedSoup:
    """Return the recipe of a soup. Where soups are scored, they are made, scored and removed again.

    Args:
        names: the folder of a run, or its checkpoints.
        destination: the output, next to which soups are made to be scored.
        settings: the checkpoints and their weights.
        options: the options of the recipe.
        on_event: receives a line about each soup that is scored.
        cluster: the cluster whose workers make and score the soups that do not depend on each other's scores.

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
        choice = choose_by_score(snapshots, destination, settings, options, on_event=on_event, cluster=cluster)
        chosen, facts = choice.snapshots, {"score": choice.score}
    weights = weigh_soup(chosen, settings)
    shares = ", ".join(f"{each.name} {weight:.3g}" for each, weight in zip(chosen, weights, strict=True))
    notice = f"soup of {len(chosen)} checkpoint{'s' if len(chosen) > 1 else ''}: {shares}"
    return PlannedSoup(recipe=make_soup_recipe(chosen, settings, options), notices=(notice,), facts=facts)


def _rank_of(snapshot: Snapshot, dequantize: bool) -> dict[str, int]:
    """Return the rank of a checkpoint that is a LoRA: checkpoints of one run change nearly the same directions."""
    model = open_model(snapshot.path, dequantize=dequantize)
    rank = max((change.rank for change in model.changes.values()), default=0) if isinstance(model, Adapter) else 0
    return {"rank": rank} if rank else {}
