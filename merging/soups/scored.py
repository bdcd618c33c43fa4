"""The choice of a soup by scores: soups are made, scored and removed, here or by the workers of a cluster."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merging.api.merge_files import merge_plan, plan_for
from merging.cluster import RayCluster, connect
from merging.engine.evaluation import evaluate_each
from merging.soups.scoring import make_scorer
from merging.soups.search import ChosenSoup, find_best_window, stir_greedily
from merging.soups.settings import SoupSettings, make_soup_recipe
from merging.soups.snapshots import Snapshot
from merging.sources.distributed import METADATA

__all__ = ["OnLine", "choose_by_score"]

_log = logging.getLogger(__name__)

OnLine = Callable[[str], None]
"""Receives a line about each soup that is scored."""


def choose_by_score(
    snapshots: Sequence[Snapshot],
    destination: Path,
    settings: SoupSettings,
    options: Mapping[str, Any],
    *,
    on_event: OnLine | None,
    cluster: RayCluster | None,
) -> ChosenSoup:
    """Return the soup with the best score. Soups are made to be scored, and removed again.

    Args:
        snapshots: the checkpoints.
        destination: the output, next to which soups are made.
        settings: the settings, with a score.
        options: the options of the recipe.
        on_event: receives a line about each soup that is scored.
        cluster: the cluster whose workers make and score the soups that do not depend on each other's scores.
    """
    with _make_scratch(destination) as folder, nullcontext() if cluster is None else connect(cluster):
        model = Path(folder) / destination.name
        return _choose(snapshots, model, settings, options, on_event=on_event, cluster=cluster)


def _choose(
    snapshots: Sequence[Snapshot],
    destination: Path,
    settings: SoupSettings,
    options: Mapping[str, Any],
    *,
    on_event: OnLine | None,
    cluster: RayCluster | None,
) -> ChosenSoup:
    assert settings.score is not None
    scorer = make_scorer(settings.score, settings.score_timeout)
    score_one = partial(
        _score,
        scorer=scorer,
        destination=destination,
        settings=settings,
        options=options,
        threads=cluster.threads if cluster else None,
    )

    def evaluate(soups: Sequence[Sequence[Snapshot]]) -> list[float]:
        scores = []
        tasks = ((_SoupName(", ".join(each.name for each in soup)), soup) for soup in soups)
        models = [each.path for each in snapshots]
        with closing(evaluate_each(tasks, lambda: score_one, cluster, models=models)) as results:
            for soup, score in results:
                scores.append(score)
                line = f"{score:.6g}: {soup.name}"
                _log.info("score %s", line)
                if on_event is not None:
                    on_event(line)
        return scores

    if settings.window is not None:
        return find_best_window(snapshots, settings.window, evaluate, settings.minimize)
    return stir_greedily(snapshots, evaluate, settings.minimize)


def _make_scratch(destination: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a context with a folder for soups next to an output, removed with all that killed workers left in it."""
    above = next(
        folder for folder in (destination.absolute().parent, *destination.absolute().parents) if folder.is_dir()
    )
    return tempfile.TemporaryDirectory(prefix=".merging-soup-", dir=above)


@dataclass(frozen=True, slots=True)
class _SoupName:
    """The names of a soup's checkpoints, for lines about it."""

    name: str


def _score(
    snapshots: Sequence[Snapshot],
    *,
    scorer: Callable[[Path], float],
    destination: Path,
    settings: SoupSettings,
    options: Mapping[str, Any],
    threads: int | None,
) -> float:
    """Return the score of a soup, which is made for it."""
    with _merge_to_score(snapshots, destination, settings, options, threads) as model:
        return scorer(model)


@contextmanager
def _merge_to_score(
    snapshots: Sequence[Snapshot],
    destination: Path,
    settings: SoupSettings,
    options: Mapping[str, Any],
    threads: int | None,
) -> Iterator[Path]:
    """Make a soup in the destination's folder, and remove it again. A checkpoint that is a model is used as it is."""
    path = Path(snapshots[0].path)
    if len(snapshots) == 1 and path.is_dir() and not (path / METADATA).exists():
        yield path
        return
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        model = Path(folder) / destination.name
        merge_plan(plan_for(make_soup_recipe(snapshots, settings, options), model), model, threads=threads)
        yield model
