"""A recycling run, from a pool and examples to an adapter and its report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from merging.cluster import RayCluster, connect
from merging.display.notices import report_notices
from merging.display.tables import Table, Tabular
from merging.engine.evaluation import make_evaluation_cluster
from merging.engine.resources import pick_device
from merging.errors import OptionError, option
from merging.maths.lazy_torch import torch
from merging.recycling.bootstrap import Metric
from merging.recycling.data import Example, Split, kind_of, overlaps, read_examples, split
from merging.recycling.facts import collect_facts
from merging.recycling.fold import FoldedLora, fold, write_adapter
from merging.recycling.input_states import input_states
from merging.recycling.load_base import load_problem
from merging.recycling.mixing import check_mixing
from merging.recycling.page import page
from merging.recycling.pool_adapters import AdapterRef, UsableAdapters, find_usable, list_adapters
from merging.recycling.problem import Problem, WeightedAdapters, single_adapter
from merging.recycling.report import Report, make_report
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.recycling.selection import Workers
from merging.recycling.settings import Settings, make_settings
from merging.recycling.stages import OnEvent, Outcome, best_of, measure, run_stages
from merging.storage.staging import StagedOutput, check_destination
from merging.type_checks import check_types
from merging.version import __version__, former_parameters

__all__ = ["REPORT", "Recycled", "checkpoint_folder", "recycle"]

_log = logging.getLogger(__name__)

REPORT = "recycling"
"""The name of the report's files next to the adapter: ``recycling.json`` and ``recycling.html``."""

_NOTICEABLE = 1e-6
"""Share of the energy that folding may lose before the folded adapter is measured by itself."""

Examples = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, repr=False)
class Recycled(Tabular):
    """The result of a run.

    Attributes:
        path: The adapter's folder, with the report in it.
        rank: The adapter's rank.
        kept: The share of the mixture's energy (squared Frobenius norm) that the adapter keeps.
        report: The report.

    Example:
        >>> import merging
        >>> texts = [{"text": f"text {number}", "label": "even" if number % 2 == 0 else "odd"} for number in range(8)]
        >>> few = {"steps": 2, "lora_steps": 2, "lora_rates": [1e-3], "resamples": 100}  # far more are the default
        >>> recycled = merging.recycle(["a", "b"], base="base", train=texts, output="recycled", **few)
        >>> sorted(recycled.to_dict())[:3]
        ['base', 'came_back_instead', 'candidates']
    """

    path: Path
    rank: int
    kept: float
    report: Report

    def _display_table(self) -> Table:
        table = self.report._display_table()
        title = f"Recycled: {self.path}, adapter of rank {self.rank} with {self.kept:.1%} of the mixture's energy"
        return replace(table, title=title)

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        return {"path": str(self.path), "rank": self.rank, "energy_kept": self.kept, **self.report.to_dict()}


@former_parameters({"told": "on_event"})
@check_types()
def recycle(
    pool: str | Path | Iterable[str | Path],
    *,
    base: str | Path,
    train: Examples,
    valid: Examples | None = None,
    test: Examples | None = None,
    output: str | Path = "recycled",
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    engine: str | RayCluster = "local",
    address: str | None = None,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> Recycled:
    """Choose adapters of a pool, tune how they are mixed for a task, and write one LoRA with a report.

    The report compares the LoRA with the base, a LoRA trained on the same examples, the best single adapter, and
    adapters without any knowledge.

    Args:
        pool: A folder of adapters, or several adapters and folders.
        base: The folder or name of the adapters' base model.
        train: Training examples: a file of JSON lines, or a list of mappings
            (:func:`~merging.recycling.data.read_examples`).
        valid: Validation examples in the same form. Without them a fifth of the training examples is set apart.
        test: Test examples in the same form. Without them the report draws no conclusion.
        output: The folder to write.
        device: The device that the base runs on, such as ``"cpu"`` or ``"cuda"``.
        resume: Continue a run that was killed. The result is the same as without the interruption.
        overwrite: Replace an existing output, and start again after a killed run.
        engine: ``local`` to score the adapters here, ``ray``, or a :class:`~merging.cluster.RayCluster` with settings.
        address: The address of the Ray cluster, ``HOST:PORT`` or ``auto``.
        on_event: Receives a line when a stage begins.
        **settings: The fields of :class:`~merging.recycling.settings.Settings`.

    Returns:
        The adapter's folder, its rank, and the report.

    Raises:
        merging.errors.MergingError: For wrong options, examples, adapters or bases. No output is written then.

    Example:
        >>> import merging
        >>> texts = [{"text": f"text {number}", "label": "even" if number % 2 == 0 else "odd"} for number in range(8)]
        >>> few = {"steps": 2, "lora_steps": 2, "lora_rates": [1e-3], "resamples": 100}  # far more are the default
        >>> recycled = merging.recycle(["a", "b"], base="base", train=texts, output="recycled", **few)
        >>> recycled.path.name
        'recycled'
    """
    chosen, destination, base = make_settings(settings), Path(output), str(base)
    parts = split(
        read_examples(train, "train"),
        None if valid is None else read_examples(valid, "valid"),
        None if test is None else read_examples(test, "test"),
        chosen.seed,
    )
    check_mixing(chosen, kind_of(parts) == "label")
    cluster = make_evaluation_cluster(engine, address, device)
    where, found = pick_device(device), list_adapters(pool, base)
    _check_output(destination, found, overwrite)
    if cluster is not None:
        with connect(cluster):
            pass  # a cluster that does not answer is an error now, and not after the training
    on_event = _log_lines(on_event)
    on_event(f"loading {base}")
    load = partial(load_problem, base, parts, chosen, where)
    problem = load()
    test_items = tuple(map(problem.model.encode, parts.test))
    usable = find_usable(found, problem.model.hook_points)
    # Only now: a run that is refused before this line leaves nothing behind.
    plan = _plan(chosen, base, parts, found)
    with closing(RunCheckpoint(checkpoint_folder(destination), plan, resume, overwrite)) as checkpoint:
        workers = Workers(cluster, load, base) if cluster else None
        outcome = run_stages(problem, usable, checkpoint, on_event, workers)
        outcome, folded, lossy = _fold_best(outcome, problem, usable.modules)
        on_event("measuring")
        report = make_report(
            measure(problem, outcome, lossy, test_items or problem.valid, checkpoint),
            metric=_metric(chosen, parts),
            tested=bool(test_items),
            fallback=outcome.fallback,
            examples={"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)},
            resamples=chosen.resamples,
            seed=chosen.seed,
            facts=collect_facts(problem, base, usable, outcome, folded),
            notices=_notices(problem, usable, parts),
        )
        with StagedOutput(destination, overwrite, False) as staged:
            write_adapter(
                folded,
                problem,
                folder=staged.folder,
                base=base,
                experts=[expert for expert in outcome.merge.experts if expert.path],
                remark=f"{report.verdict.sentence}.",
            )
            _write_report(staged.folder, report)
            staged.commit()
        checkpoint.remove()
    report = replace(report, notices=(*report.notices, *staged.notices))
    report_notices(report.notices)
    return Recycled(destination, folded.rank, folded.kept, report)


def _log_lines(on_event: OnEvent | None) -> OnEvent:
    """Return a receiver of lines that logs each, and hands it on."""

    def receive(line: str) -> None:
        _log.info("%s", line)
        if on_event:
            on_event(line)

    return receive


def checkpoint_folder(output: str | Path) -> Path:
    """Return the folder in which an unfinished run towards an output keeps its results."""
    destination = Path(output)
    return destination.parent / f".{destination.name}.recycling"


def _fold_best(
    outcome: Outcome, problem: Problem, modules: Sequence[str]
) -> tuple[Outcome, FoldedLora, WeightedAdapters | None]:
    """Fold the result into one LoRA. If folding loses energy, validate again and fall back to the best baseline.

    Returns the outcome, the folded LoRA, and the folded LoRA to be measured if it lost energy.
    """

    def fold_one(mixed: WeightedAdapters) -> tuple[FoldedLora, WeightedAdapters]:
        folded = fold(mixed, problem, modules, problem.settings.rank)
        return folded, single_adapter(folded.expert)

    folded, to_measure = fold_one(outcome.merge)
    if folded.kept >= 1 - _NOTICEABLE:
        return outcome, folded, None
    baselines = [(name, fold_one(mixed)[1].validate(problem)) for name, mixed in outcome.trivial]
    _, better = best_of(to_measure.validate(problem), baselines)
    if better is not None and better != outcome.fallback:
        outcome = replace(outcome, merge=dict(outcome.trivial)[better], fallback=better)
        folded, to_measure = fold_one(outcome.merge)
    return outcome, folded, to_measure if folded.kept < 1 - _NOTICEABLE else None


def _check_output(destination: Path, found: Sequence[AdapterRef], overwrite: bool) -> None:
    if destination.suffix == ".safetensors":
        raise OptionError(f"{destination}: an adapter comes with its report: name a folder with {option('output')}")
    check_destination(destination, [Path(each.path) for each in found], 0, overwrite)


def _plan(settings: Settings, base: str, parts: Split, pool: Sequence[AdapterRef]) -> dict[str, Any]:
    """Return everything that decides the outcome, to recognize the run that a kill interrupted."""

    def digest(examples: Sequence[Example]) -> str:
        contents = json.dumps([each.content for each in examples])
        return hashlib.sha256(contents.encode()).hexdigest()[:16]

    def size(path: Path) -> int:
        files = path.glob("*") if path.is_dir() else [path] if path.is_file() else []
        return sum(file.stat().st_size for file in files if file.is_file())

    sizes = {each.path: size(Path(each.path)) for each in pool}
    examples = {name: digest(getattr(parts, name)) for name in ("train", "valid", "test")}
    plain = json.loads(settings.model_dump_json())
    states = {"base": base, "pool": sizes, "state of the models": input_states([base, *sizes])}
    return {"version": __version__, **states, **examples, **plain}


def _metric(settings: Settings, parts: Split) -> Metric:
    if settings.metric != "auto":
        return settings.metric
    texts_alone = all(each.completion is not None and not each.text for each in parts.train)
    return "loss" if texts_alone else "accuracy"


def _notices(problem: Problem, pool: UsableAdapters, parts: Split) -> list[str]:
    notices = [*overlaps(parts), *pool.notices]
    if problem.model.cut:
        notices.append(f"{problem.model.cut} texts were longer than {problem.model.limit} tokens and were cut")
    if pool.left_out:
        name, reason = next(iter(pool.left_out.items()))
        notices.append(f"left out of the pool: {len(pool.left_out)}, {name} among them: {reason}")
    return notices


def _write_report(folder: Path, report: Report) -> None:
    """Write the report into the adapter's folder, as JSON and as a page."""
    text = json.dumps(report.to_dict(), indent=1) + "\n"
    (folder / f"{REPORT}.json").write_text(text, encoding="utf-8")
    (folder / f"{REPORT}.html").write_text(page(report), encoding="utf-8")
