"""Adapters of other tasks, picked and mixed for a new one with few examples, and held against what needs none of them.

The study of arXiv 2602.12323 found that tuning how public LoRAs are mixed beats their base, seldom beats a small LoRA
trained on the same examples, and works about as well with random numbers in their place. So every run measures these.
"""

from merging.recycling.report import Report, Row
from merging.recycling.run import Recycled, recycle
from merging.recycling.settings import Settings
from merging.recycling.verdict import Verdict

__all__ = ["Recycled", "Report", "Row", "Settings", "Verdict", "recycle"]
