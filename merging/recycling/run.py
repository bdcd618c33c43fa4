"""A recycling run, from a pool and examples to an adapter and its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merging.engine.resources import pick_device
from merging.errors import OptionError
from merging.recycling.bootstrap import Metric
from merging.recycling.data import Example, Split, kind_of, overlaps, read_examples, split
from merging.recycling.experts import Candidate, Opened, candidates, opened
from merging.recycling.fold import Folded, fold, write_adapter
from merging.recycling.journal import Journal
from merging.recycling.loading import load_model
from merging.recycling.methods import check_method
from merging.recycling.page import page
from merging.recycling.problem import Mixed, Problem, alone
from merging.recycling.report import Report, make_report
from merging.recycling.settings import Settings, make_settings
from merging.recycling.stages import Outcome, Told, carried_out, guarded, measured
from merging.storage.staging import StagedOutput, check_destination
from merging.version import __version__

__all__ = ["REPORT", "Recycled", "recycle", "unfinished"]

REPORT = "recycling"
"""What the report is called beside the adapter: ``recycling.json`` and ``recycling.html``."""

_NOTICEABLE = 1e-6
"""Share of the energy that folding may lose before the folded adapter is measured by itself."""

Examples = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Recycled:
    """What a run left: the adapter's folder, its rank, the share of the mixture's energy it keeps, and the report."""

    path: Path
    rank: int
    kept: float
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return {"path": str(self.path), "rank": self.rank, "energy_kept": self.kept, **self.report.to_dict()}


def recycle(
    pool: str | Path | Iterable[str | Path],
    *,
    base: str | Path,
    train: Examples,
    valid: Examples | None = None,
    test: Examples | None = None,
    output: str | Path = "recycled",
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    told: Told | None = None,
    **settings: Any,
) -> Recycled:
    """Pick adapters of a pool, tune how they are mixed for a task, and write one LoRA with a report that holds it
    against the base, a LoRA trained on the same examples, the best single adapter, and adapters that know nothing.

    ``pool`` is a folder of adapters, or several adapters and folders; ``base`` the folder or name of their model.
    ``train``, ``valid`` and ``test`` are files of JSON lines or lists of mappings
    (:func:`~merging.recycling.data.read_examples`); without ``valid`` a fifth of the training examples serves, without
    ``test`` nothing is concluded. ``settings`` are the fields of :class:`~merging.recycling.settings.Settings`.

    A run that was killed goes on with ``resume``, and comes to the same. Raises
    :class:`~merging.errors.MergingError`, and leaves no output then.
    """
    chosen, destination, base = make_settings(settings), Path(output), str(base)
    parts = split(
        read_examples(train, "train"),
        None if valid is None else read_examples(valid, "valid"),
        None if test is None else read_examples(test, "test"),
        chosen.seed,
    )
    check_method(chosen, kind_of(parts) == "label")
    where, found = pick_device(device), candidates(pool, base)
    _check_output(destination, found, overwrite)
    told = told or (lambda line: None)
    told(f"loading {base}")
    model = load_model(base, parts, chosen, where)
    problem = Problem(model, tuple(map(model.encode, parts.train)), tuple(map(model.encode, parts.valid)), chosen)
    test_items = tuple(map(model.encode, parts.test))
    usable = opened(found, model.places)
    # only now: what is refused until here leaves nothing behind
    journal = Journal(unfinished(destination), _plan(chosen, base, parts, found), resume, overwrite)
    outcome = carried_out(problem, usable, journal, told)
    outcome, folded, lossy = _folded(outcome, problem, usable.modules)
    rows = measured(problem, outcome, lossy, test_items or problem.valid, journal, told)
    report = make_report(
        rows,
        _metric(chosen, parts),
        bool(test_items),
        outcome.fallback,
        {"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)},
        chosen.resamples,
        chosen.seed,
        _facts(problem, base, usable, outcome, folded),
        _notices(problem, usable, parts),
    )
    notices = _write(destination, overwrite, problem, base, outcome, folded, report)
    journal.remove()
    report = replace(report, notices=(*report.notices, *notices))
    return Recycled(destination, folded.rank, folded.kept, report)


def unfinished(output: str | Path) -> Path:
    """Where a run towards an output keeps what it has done so far."""
    destination = Path(output)
    return destination.parent / f".{destination.name}.recycling"


def _folded(outcome: Outcome, problem: Problem, modules: Sequence[str]) -> tuple[Outcome, Folded, Mixed | None]:
    """What came back, folded; where that loses something, the best on validation of it and the trivial points folded.

    The last is the folded adapter, to be measured, if it lost something.
    """
    rank = problem.settings.rank

    def cut(mixed: Mixed) -> tuple[Folded, Mixed]:
        folded = fold(mixed, problem, modules, rank)
        return folded, alone(folded.expert)

    folded, alike = cut(outcome.merge)
    if folded.kept >= 1 - _NOTICEABLE:
        return outcome, folded, None
    others = [(name, cut(mixed)[1].validated(problem)) for name, mixed in outcome.trivial]
    _, better = guarded(alike.validated(problem), others)
    if better is not None and better != outcome.fallback:
        outcome = replace(outcome, merge=dict(outcome.trivial)[better], fallback=better)
        folded, alike = cut(outcome.merge)
    return outcome, folded, alike if folded.kept < 1 - _NOTICEABLE else None


def _check_output(destination: Path, found: Sequence[Candidate], overwrite: bool) -> None:
    if destination.suffix == ".safetensors":
        raise OptionError(f"{destination}: an adapter comes with its report: name a folder with -o")
    check_destination(destination, [Path(each.path) for each in found], 0, overwrite)


def _plan(settings: Settings, base: str, parts: Split, pool: Sequence[Candidate]) -> dict[str, Any]:
    """What decides the outcome, to tell whether a run that was killed is this one."""

    def digest(examples: Sequence[Example]) -> str:
        contents = json.dumps([each.content for each in examples])
        return hashlib.sha256(contents.encode()).hexdigest()[:16]

    def size(path: Path) -> int:
        files = path.glob("*") if path.is_dir() else [path] if path.is_file() else []
        return sum(file.stat().st_size for file in files if file.is_file())

    sizes = {each.path: size(Path(each.path)) for each in pool}
    examples = {name: digest(getattr(parts, name)) for name in ("train", "valid", "test")}
    plain = json.loads(settings.model_dump_json())
    return {"version": __version__, "base": base, "pool": sizes, **examples, **plain}


def _metric(settings: Settings, parts: Split) -> Metric:
    if settings.metric != "auto":
        return settings.metric
    continued = all(each.completion is not None and not each.text for each in parts.train)
    return "loss" if continued else "accuracy"


def _facts(problem: Problem, base: str, pool: Opened, outcome: Outcome, folded: Folded) -> dict[str, Any]:
    chosen = [
        {"name": expert.name, "owner": expert.owner, "loss": outcome.losses[expert.name], "rank": expert.rank}
        for expert in outcome.chosen.experts
    ]
    validated = {
        "base": outcome.base.loss,
        "few-shot LoRA": outcome.few_shot.mixed.loss,
        "best single adapter": outcome.single.loss,
        "simple average": outcome.average.loss,
        "tuned": outcome.tuned.loss,
        "returned": outcome.merge.loss,
    }
    return {
        "base": base,
        "settings": json.loads(problem.settings.model_dump_json()),
        "candidates": len(pool.usable) + len(pool.left_out),
        "left_out": pool.left_out,
        "passed_over": outcome.chosen.passed_over,
        "scores": outcome.chosen.scores,
        "chosen": chosen,
        "selection_correlation": outcome.correlation,
        "came_back_instead": outcome.fallback,
        "few_shot": {"rate": outcome.few_shot.rate, "validation": dict(outcome.few_shot.tried)},
        "validation_loss": validated,
        "weights": _weights(problem, outcome),
        "curves": {"merge": outcome.tuned.curve, "few-shot LoRA": outcome.few_shot.mixed.curve},
        "fold": {"rank": folded.rank, "energy_kept": folded.kept, "lost": dict(folded.lost)},
    }


def _weights(problem: Problem, outcome: Outcome) -> dict[str, Any]:
    """What became of the coefficients: their groups, and by adapter the value in each, None where it has no part."""
    tuned = outcome.tuned
    mixture = tuned.mixture(problem)
    layout = mixture.layout
    values = layout.activated(tuned.coefficients, tuned.activation).tolist()
    groups = {group: number for number, group in enumerate(dict.fromkeys(layout.names))}
    table: dict[str, list[float | None]] = {expert.name: [None] * len(groups) for expert in tuned.experts}
    for value, expert, group in zip(values, layout.experts.tolist(), layout.names, strict=True):
        table[tuned.experts[expert].name][groups[group]] = value
    return {"granularity": tuned.granularity, "groups": list(groups), "by_adapter": table}


def _notices(problem: Problem, pool: Opened, parts: Split) -> list[str]:
    notices = [*overlaps(parts), *pool.notices]
    if problem.model.cut:
        notices.append(f"{problem.model.cut} texts were longer than {problem.model.limit} tokens and were cut")
    if pool.left_out:
        name, reason = next(iter(pool.left_out.items()))
        notices.append(f"left out of the pool: {len(pool.left_out)}, {name} among them: {reason}")
    return notices


def _write(
    destination: Path,
    overwrite: bool,
    problem: Problem,
    base: str,
    outcome: Outcome,
    folded: Folded,
    report: Report,
) -> list[str]:
    with StagedOutput(destination, overwrite, False) as staged:
        used = [expert for expert in outcome.merge.experts if expert.path]
        write_adapter(folded, problem, base, used, staged.folder, f"{report.verdict.sentence}.")
        text = json.dumps(report.to_dict(), indent=1) + "\n"
        (staged.folder / f"{REPORT}.json").write_text(text, encoding="utf-8")
        (staged.folder / f"{REPORT}.html").write_text(page(report), encoding="utf-8")
        staged.commit()
    return staged.notices
