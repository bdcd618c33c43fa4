"""One adapted module of a PEFT file: its tensors by their leaf names, checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merging.errors import FormatError
from merging.sources.peft.config import Config
from merging.sources.stored import Stored

__all__ = ["Module"]


@dataclass(frozen=True, slots=True)
class Module:
    """What an adapter holds for the module at ``path``: ``parts`` by leaf (``lora_A``), without ``.weight``.

    ``shared`` are tensors that all modules share, which stand once in the file.
    """

    path: str
    parts: Mapping[str, Stored]
    config: Config
    shared: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The base's tensor that is changed."""
        return f"{self.path}.weight"

    def part(self, name: str) -> Stored:
        """A part that must be there."""
        if name not in self.parts:
            raise self.config.error(f"{self.path} has no {name}: the file is incomplete, save or download it again")
        return self.parts[name]

    def error(self, reason: str) -> FormatError:
        """The refusal of this module, with the reason."""
        return self.config.error(f"{self.path}: {reason}")

    def check(self, *names: str, beside: str) -> None:
        """Refuse parts of no use, and parts that hold no floating-point numbers."""
        unknown = next((name for name in self.parts if name not in names), None)
        if unknown:
            raise self.config.error(f"{self.path}.{unknown} has no place beside {beside}")
        for stored in self.parts.values():
            if not stored.floating:
                raise self.config.error(
                    f"{self.path} holds {stored.kind} factors: only F16, BF16, F32 and F64 are read"
                )
