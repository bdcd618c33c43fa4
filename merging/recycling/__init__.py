"""Recycling: choose adapters of other tasks and mix them for a new task with few examples.

The study of arXiv 2602.12323 found that a tuned mixture of public LoRAs beats their base. It seldom beats a small LoRA
trained on the same examples, and random numbers in the adapters' place do about as well. So every run measures these.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merging.recycling.report import Report, Row
    from merging.recycling.settings import Settings
    from merging.recycling.verdict import TransferVerdict as Verdict
    from merging.recycling.workflow import Recycled, recycle

__all__ = ["Recycled", "Report", "Row", "Settings", "Verdict", "recycle"]

_WHERE = {
    "Recycled": "workflow.Recycled",
    "Report": "report.Report",
    "Row": "report.Row",
    "Settings": "settings.Settings",
    "Verdict": "verdict.TransferVerdict",
    "recycle": "workflow.recycle",
}
"""Public names that are imported at their first use, since most of them import torch."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own_name = _WHERE[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), own_name)
