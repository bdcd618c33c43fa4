"""The report of a merge as an HTML page. Without matplotlib (the extra ``report``) it has only tables."""

from __future__ import annotations

import json
from importlib.util import find_spec

from merging.api.merge_report import Group, MergeReport
from merging.api.report_pictures import panels, size_of
from merging.display.tables import Cell, plural
from merging.engine.measures import Measure
from merging.report import Page
from merging.report.drawing import draw_svg

__all__ = ["page"]

_MODELS, _ROWS, _NAMED = 24, 40, 500
"""The most models with columns of their own, tensors and kinds that are listed, and blocks."""

_NO_BASE = (
    "Without a base nothing says what each model changed. Shown are the norm of the merged weights and each model's "
    "difference from them; contributions and interference are known only with a base."
)

_MEANINGS = (
    "All numbers are of the values as they were computed, before they were rounded to the type of the output or cut to "
    "its rank. The relative change is the norm of the merged change, divided by the norm of the base's weights."
)


def page(report: MergeReport) -> Page:
    """Return the page of a merge."""
    subject = "the changes from the base" if report.changes else "the distances of the models"
    lead = f"{plural(len(report.models), 'model')} merged by {report.method}: {subject}, by block and kind of tensor."
    out = Page(f"Merge: {report.path}", lead)
    out.facts(
        {
            "output": report.kind,
            "method": report.method,
            **{name: _plain(value) for name, value in report.parameters.items()},
            "base": report.base,
            "tensors": f"{len(report.tensors):,} measured, {report.copied:,} copied",
        }
    )
    for notice in [*_remarks(report), *report.notices]:
        out.note(notice)
    if report.total is not None:
        _add_models(out, report, report.total)
        _add_pictures(out, report)
        _add_groups(out, report)
        _add_losses(out, report)
    _add_time(out, report)
    _add_sources(out, report)
    return out


def _plain(value: object) -> Cell:
    return value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False, default=str)


def _remarks(report: MergeReport) -> list[str]:
    """Return remarks on numbers that the page does not have."""
    remarks = []
    if report.total is None and not report.missing:
        remarks.append("No tensor was merged: all are copies, and nothing was measured.")
    elif not report.changes:
        remarks.append(_NO_BASE)
    if report.missing:
        remarks.append(
            f"{plural(len(report.missing), 'tensor')} without measures ({report.missing[0]} first): of pieces that a "
            f"former run merged without a report, or with values that are not finite. No sum has them."
        )
    if report.others:
        remarks.append(
            f"{plural(len(report.others), 'tensor')} not in the base ({report.others[0]} first), so that their change "
            f"is not known. No sum has them."
        )
    return remarks


def _add_models(out: Page, report: MergeReport, total: Group) -> None:
    measure = total.measure
    if not report.changes:
        out.section("Models", "The norm of each model's difference from the merged weights, over all merged tensors.")
        rows: list[list[Cell]] = [
            [name, norm, norm / measure.norm if measure.norm else None]
            for name, norm in zip(report.models, measure.norms, strict=True)
        ]
        out.table(["model", "difference", "relative to the merged weights"], rows)
        return
    out.section(
        "Models",
        "The part of each model in the merge. Cosine: between its change and the merged one. Kept: how much of its "
        "change is in the merged one, 1 where it is there in full. Share: its part of the merged change, along that "
        "change and times the model's weight; all shares add up to 1. A share below 0 is a model that the others "
        "outweigh.",
    )
    columns = zip(report.models, measure.norms, measure.cosines, measure.kept, measure.shares, strict=True)
    out.table(["model", "norm of its change", "cosine", "kept", "share"], [list(row) for row in columns])
    facts: dict[str, Cell] = {"norm of the merged change": measure.norm, "relative to the base": measure.relative}
    if measure.magnitude:
        facts["magnitude in conflict"] = measure.conflict
        facts["magnitude cancelled"] = measure.cancelled
    if total.discarded is not None:
        facts["energy discarded by the rank"] = total.discarded
    out.facts(facts)
    out.text(_MEANINGS)
    if measure.magnitude:
        out.text(
            "Conflict is the share of the magnitudes in elements that models change in opposite directions; cancelled "
            "is the share that their sum loses, 1 - |sum| / sum of magnitudes. Each change counts times its model's "
            "weight. Both are of a sample of elements, evenly spread over each large tensor, and of all elements of "
            "small ones."
        )


def _add_pictures(out: Page, report: MergeReport) -> None:
    found = panels(report)
    if not found:
        return
    out.section("By block")
    if find_spec("matplotlib") is None:
        out.note("Pictures need matplotlib: pip install 'merging[report]', and run it again.")
        return
    for panel in found:
        out.figure(draw_svg(panel), panel.caption)


def _add_groups(out: Page, report: MergeReport) -> None:
    blocks, kinds = report.blocks, report.kinds
    title = f"Blocks of the model{_first(len(blocks), _NAMED)}"
    numbered = [_row(report, group.measure, f"{place}. {group.name}") for place, group in enumerate(blocks, 1)]
    out.table(["block", *_header(report)], numbered[:_NAMED], title)
    out.section("By kind", "Tensors of one kind in all blocks; * stands for the number of the block.")
    rows = [[*_row(report, group.measure, group.name), len(group.tensors)] for group in kinds[:_ROWS]]
    out.table(["kind", *_header(report), "tensors"], rows, f"The largest first{_first(len(kinds), _ROWS)}")
    label, size = size_of(report)
    ordered = sorted(report.tensors, key=lambda each: -_order(size(_largest(report, each.measure), each.measure)))
    rows = [_row(report, each.measure, each.name) for each in ordered[:_ROWS]]
    out.section("By tensor", "The numbers of all tensors are in the report as JSON.")
    out.table(["tensor", *_header(report)], rows, f"By the {label}, the largest first{_first(len(ordered), _ROWS)}")


def _first(count: int, most: int) -> str:
    return f", {most} of {count:,}" if count > most else ""


def _order(value: float) -> float:
    return value if value == value else -1.0


def _largest(report: MergeReport, measure: Measure) -> float:
    return measure.norm if report.changes else max(measure.norms)


def _header(report: MergeReport) -> list[str]:
    models = report.models if len(report.models) <= _MODELS else ()
    if not report.changes:
        return ["norm", *(f"difference of {name}" for name in models)]
    shares = [f"share of {name}" for name in models] if len(models) > 1 else []
    interference = ["in conflict", "cancelled"] if len(report.models) > 1 else []
    return ["norm of the change", "relative to the base", *shares, *interference]


def _row(report: MergeReport, measure: Measure, name: str) -> list[Cell]:
    several = len(report.models) > 1
    shown = len(report.models) <= _MODELS
    if not report.changes:
        return [name, measure.norm, *(measure.norms if shown else ())]
    shares = measure.shares if several and shown else ()
    return [name, measure.norm, measure.relative, *shares, *([measure.conflict, measure.cancelled] if several else [])]


def _add_losses(out: Page, report: MergeReport) -> None:
    """Add the energy that ranks discarded, and the errors of quantised tensors."""
    cut = sorted(
        (each for each in report.tensors if each.discarded is not None), key=lambda each: -(each.discarded or 0)
    )
    if cut:
        out.section(
            "Energy discarded",
            "The share of the squared norm of each merged change that factors of the output's rank do not hold.",
        )
        rows: list[list[Cell]] = [[each.name, each.discarded, each.measure.norm] for each in cut[:_ROWS]]
        out.table(["tensor", "discarded", "norm of the change"], rows, f"The most first{_first(len(cut), _ROWS)}")
    coded = [each for each in report.tensors if each.quantization_error is not None]
    if coded:
        coded.sort(key=lambda each: -(each.quantization_error or 0))
        out.section("Quantization", "The norm of the error of each quantised tensor, relative to its merged weights.")
        rows = [[each.name, each.quantization_error] for each in coded[:_ROWS]]
        out.table(["tensor", "relative error"], rows, f"The largest first{_first(len(coded), _ROWS)}")


def _add_time(out: Page, report: MergeReport) -> None:
    whole = sum(report.phases.values())
    out.section("Time")
    rows: list[list[Cell]] = [
        [name, seconds, seconds / whole if whole else None] for name, seconds in report.phases.items()
    ]
    out.table(["phase", "seconds", "share"], rows, "From the plan to the output in place")
    if report.work:
        rows = [[name, seconds] for name, seconds in report.work.items()]
        out.table(["part of the work", "seconds"], rows, "Of all threads together while they merged; the rest computes")


def _add_sources(out: Page, report: MergeReport) -> None:
    out.section("Sources")
    rows: list[list[Cell]] = [[name, path] for name, path in zip(report.models, report.paths, strict=True)]
    rows += [["base", report.base]] if report.base is not None else []
    out.table(["model", "path"], rows)
    records: list[list[Cell]] = [
        [
            each["model"],
            each.get("commit"),
            each.get("weights"),
            each.get("files"),
            each.get("tensors"),
            each.get("bytes"),
        ]
        for each in report.sources
    ]
    if records:
        header = ["in the recipe", "commit", "key of the weights", "key of the configs", "tensors", "bytes"]
        out.table(header, records, "Records of the files that were read: commits of the Hub, or keys of their content")
    if report.stages:
        stages: list[list[Cell]] = [[name, method] for name, method in report.stages.items()]
        out.table(["stage", "method"], stages, "Merges whose outputs are models of this one; they are not measured")
