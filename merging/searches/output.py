"""The output of a search: the winner's files with a recipe, a report, and its score on the card."""

from __future__ import annotations

import json
from pathlib import Path

from merging.output.markdown import prose
from merging.plan.recipe import Recipe
from merging.searches.page import search_page
from merging.searches.report import SearchReport

__all__ = ["REPORT", "write_report_files"]

REPORT = "search"
"""The name of the report's files next to the winner: ``search.json`` and ``search.html``."""


def write_report_files(folder: Path, recipe: Recipe, report: SearchReport) -> None:
    """Write the recipe and the report into the winner's folder, and the result on its card."""
    text = json.dumps(report.to_dict(), indent=1) + "\n"
    (folder / f"{REPORT}.json").write_text(text, encoding="utf-8")
    (folder / f"{REPORT}.html").write_text(search_page(report), encoding="utf-8")
    lines = _describe(report)
    head = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    (folder / "recipe.yml").write_text(head + recipe.to_yaml(), encoding="utf-8")
    card = folder / "README.md"
    known = card.read_text(encoding="utf-8") if card.is_file() else ""
    added = "\n\n".join(prose(line) for line in lines)
    card.write_text(f"{known.rstrip()}\n\n## Search\n\n{added}\n", encoding="utf-8")


def _describe(report: SearchReport) -> list[str]:
    """Return the result in sentences."""
    lines = [f"{report.verdict}."]
    lead = next((row for row in report.rows if row.title == "base"), None)
    if lead is not None and report.metric is not None:
        lines.append(f"Ahead of the base by {report.lead(lead)}.")
    tried = f"Chosen of {report.facts['candidates']} candidates"
    if report.metric is not None:
        tried += f" on {sum(report.facts['examples']['valid'])} validation examples"
    lines.append(f"{tried}.")
    return lines
