"""One adapted module of a PEFT file: its tensors by their leaf names, checked before they are used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.errors import FormatError, option
from merging.sources.changes import ChangeKind
from merging.sources.computed import ComputedChange, Formula
from merging.sources.peft.config import Config
from merging.sources.stored import Stored

__all__ = ["Module"]

_INTEGERS = ("U8", "I8", "I16", "I32", "I64")


@dataclass(frozen=True, slots=True)
class Module:
    """An adapter's tensors for the module at ``path``: ``parts`` by leaf (``lora_A``), without ``.weight``.

    ``shared`` are tensors that occur once for all modules; ``siblings`` are the paths of all modules.
    """

    path: str
    parts: Mapping[str, Stored]
    config: Config
    shared: Mapping[str, Stored] = field(default_factory=dict)
    siblings: Collection[str] = ()

    @property
    def target(self) -> str:
        """The base's tensor that is changed."""
        return f"{self.path}.weight"

    @property
    def bias(self) -> str:
        """The base's bias of the same module."""
        return f"{self.path}.bias"

    def error(self, reason: str) -> FormatError:
        """Return the error for this module, with the reason."""
        return self.config.error(f"{self.path}: {reason}")

    def part(self, name: str) -> Stored:
        """Return a required part, of this module or shared by all."""
        found = self.parts.get(name) or self.shared.get(name)
        if found is None:
            raise self.config.error(f"{self.path} has no {name}: the file is incomplete, save or download it again")
        return found

    def sizes(self, **layout: str) -> dict[str, int]:
        """Return the sizes of the module's parts by the letters of their ``layout`` (``lora_A="r i"``), as in einsum.

        A letter has the same size everywhere, a number is this size, and a capital letter may be 0. ``int`` in front
        allows integers. Raises :class:`~merging.errors.FormatError` for a part that is missing, has another number of
        axes or no elements, does not fit the others, holds integers, or is not in the layout.
        """
        sizes: dict[str, int] = {}
        for name, axes in layout.items():
            stored, letters = self.part(name), axes.removeprefix("int ").split()
            for letter, size in zip(letters, stored.shape, strict=False):
                sizes.setdefault(letter, int(letter) if letter.isdecimal() else size)
            if stored.shape != tuple(sizes.get(letter, -1) for letter in letters):
                known = ", ".join(f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes)
                raise self.error(
                    f"{name} has the shape {stored.shape}, and should be [{', '.join(letters)}]"
                    f"{f' with {known}' if known else ''}: its parts do not belong together"
                )
            if any(size == 0 and not letter.isupper() for letter, size in zip(letters, stored.shape, strict=True)):
                raise self.error(f"{name} has the shape {stored.shape}, and holds nothing: save or download it again")
        self.check(*layout, partner=" and ".join(layout))
        for name, axes in layout.items():
            self._check_type(name, self.part(name), integers=axes.startswith("int "))
        return sizes

    def check(self, *names: str, partner: str) -> None:
        """Refuse parts that are not among the given names."""
        unknown = next((name for name in self.parts if name not in names), None)
        if unknown:
            raise self.config.error(f"{self.path}.{unknown} has no place next to {partner}")

    def check_types(self, *names: str) -> None:
        """Refuse parts that hold no floating-point numbers."""
        for name in names:
            self._check_type(name, self.part(name), integers=False)

    def _check_type(self, name: str, stored: Stored, integers: bool) -> None:
        if not stored.floating and not (integers and stored.dtype_name in _INTEGERS):
            way_out = ""
            if stored.dtype_name.startswith("F8"):
                way_out = (
                    f", also with {option('dequantize', True)}: convert them first (load_file, .to(torch.bfloat16), "
                    f"save_file)"
                )
            raise self.config.error(
                f"{self.path}.{name} holds {stored.dtype_name} factors: only F16, BF16, F32 and F64 are read{way_out}"
            )

    def computed_change(
        self, formula: Formula, *names: str, kind: ChangeKind = "linear", **facts: Any
    ) -> ComputedChange:
        """Return the change that a formula makes of some parts; ``facts`` are fields of :class:`ComputedChange`."""
        parts = {name: self.part(name) for name in names}
        turned = kind == "embedding" or (kind == "linear" and bool(self.config.get("fan_in_fan_out")))
        return ComputedChange(self.target, kind, **{"parts": parts, "formula": formula, "transposed": turned, **facts})
