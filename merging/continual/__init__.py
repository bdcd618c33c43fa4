"""Merging models as they arrive: a durable store that grows by one at a time."""

from merging.continual.folder import Busy
from merging.continual.integrity import Damaged
from merging.continual.integrity import StoreVerdict as Verdict
from merging.continual.manifest import Unconfirmed
from merging.continual.store import ContinualStore

__all__ = ["Busy", "ContinualStore", "Damaged", "Unconfirmed", "Verdict"]
