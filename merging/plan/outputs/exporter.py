"""The interface of exporters, which lay out a merged LoRA in the files of one program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from merging.maths.site import Site
from merging.plan.items import Constant, Item
from merging.plan.recipe import AdapterFormat
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = ["Changes", "Exporter", "is_bias", "is_experts", "is_lora"]

Changes = tuple[Change | None, ...]
"""The changes of one tensor, one entry an adapter; None where an adapter does not touch it."""


class Exporter(ABC):
    """Lays out the items of a merged LoRA in its file.

    ``ranks`` are the ranks of the factors by tensor, ``format`` the name of the form of the file, and ``header`` the
    program whose entries its header has, if it has any.
    """

    ranks: Mapping[str, int]
    format: str
    header: AdapterFormat | None

    @property
    def rank(self) -> int:
        """The largest rank of any factors, 0 if there are none."""
        return max(self.ranks.values(), default=0)

    @abstractmethod
    def item(self, site: Site, changes: Changes, stored: Stored | None) -> Item:
        """Return the item of a target; ``stored`` is the base's tensor.

        Raises :class:`~merging.errors.InputError` for changes that the format cannot hold.
        """

    def constants(self) -> tuple[Constant, ...]:
        """Return the numbers that the file holds in addition to merged tensors."""
        return ()

    @abstractmethod
    def check(self, items: Sequence[Item]) -> None:
        """Raise :class:`~merging.errors.InputError` where the format cannot hold these items together."""


def is_lora(changes: Changes) -> bool:
    """Return whether the merged change may go into factors: no adapter holds it in full."""
    return all(change.kind in ("linear", "embedding", "conv", "experts") for change in changes if change)


def is_experts(changes: Changes) -> bool:
    """Return whether some adapter changes a stack of experts."""
    return any(change.kind == "experts" for change in changes if change)


def is_bias(changes: Changes) -> bool:
    """Return whether all adapters change a bias."""
    return all(change.kind == "bias" for change in changes if change)
