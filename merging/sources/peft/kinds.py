"""The types of PEFT adapters that are read: how each is told, and what its modules change.

A new type is a function from a :class:`~merging.sources.peft.module.Module` to changes, and an entry in ``KINDS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merging.sources.adapter import Change
from merging.sources.peft.config import Config
from merging.sources.peft.lora import LORA_LEAVES, check_lora, lora_changes
from merging.sources.peft.module import Module

__all__ = ["KINDS", "Kind"]


def _nothing(config: Config) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of adapter.

    ``leaves`` are the names of its tensors behind the path of their module, without ``.weight``. ``changes`` makes of
    a module what it changes, ``check`` refuses configs that cannot be followed.
    """

    summary: str
    leaves: tuple[str, ...]
    changes: Callable[[Module], Sequence[Change]]
    check: Callable[[Config], None] = _nothing

    @property
    def leaf(self) -> re.Pattern[str]:
        """What a tensor's name ends in: a leaf, and behind it ``.weight``, ``.bias`` or nothing."""
        return re.compile(rf"\.({'|'.join(map(re.escape, self.leaves))})(\.weight|\.bias)?$")


KINDS = {
    "LORA": Kind("low-rank factors, with rsLoRA, DoRA, PiSSA and OLoRA", LORA_LEAVES, lora_changes, check_lora),
}
"""By PEFT's name of the type."""
