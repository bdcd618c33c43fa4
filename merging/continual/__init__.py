"""Merging models as they arrive: a durable store that grows by one at a time."""

from merging.continual.folder import Busy
from merging.continual.store import ContinualStore, Verdict

__all__ = ["Busy", "ContinualStore", "Verdict"]
