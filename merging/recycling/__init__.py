"""Recycling: choose adapters of other tasks and mix them for a new task with few examples.

The study of arXiv 2602.12323 found that a tuned mixture of public LoRAs beats their base. It seldom beats a small LoRA
trained on the same examples, and random numbers in the adapters' place do about as well. So every run measures these.
"""

from merging.recycling.report import Report, Row
from merging.recycling.settings import Settings
from merging.recycling.verdict import TransferVerdict as Verdict
from merging.recycling.workflow import Recycled, recycle

__all__ = ["Recycled", "Report", "Row", "Settings", "Verdict", "recycle"]
