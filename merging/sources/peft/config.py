"""An adapter's config: fields are looked up as PEFT does, and refused by name if they make no sense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.errors import FormatError
from merging.sources.checkpoint import HEADS
from merging.sources.peft.patterns import PatternError, Patterns
from merging.sources.tied_weights import is_table

__all__ = ["Config", "without_wrapped_layers"]

_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save|token_adapter)(?=\.)")
"""Parts of names that PEFT's wrappers insert."""


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of an adapter_config.json, and ``where`` they were found, for messages.

    Empty if an adapter has no config; ``stated`` is then false.
    """

    fields: Mapping[str, Any]
    where: str
    _patterns: Patterns = field(default_factory=Patterns, init=False, repr=False, compare=False)

    @property
    def stated(self) -> bool:
        """Whether there is a config."""
        return "peft_type" in self.fields

    @property
    def kind(self) -> str:
        """The type of the adapter, LORA without a config."""
        value = self.get("peft_type") or "LORA"
        return str(getattr(value, "value", value))  # PEFT's own configs hold an enum, whose text has the class in it

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field unchanged."""
        return self.fields.get(key, default)

    def error(self, reason: str) -> FormatError:
        """Return the error for this adapter, with the reason."""
        return FormatError(f"{self.where}: {reason}")

    def text(self, key: str) -> str | None:
        """Return a field that should be a name."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} in its config is {value!r}, and should be a name")
        return value or None

    def number(self, key: str, default: float, module: str = "", pattern: str = "") -> float:
        """Return a field that should be a finite number; the field ``pattern`` may state others for some modules."""
        value = self.pattern(pattern, module, self.get(key, default)) if pattern else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            raise self.error(f"{_of(key, module)} is {value!r}, and should be a number")
        return value

    def count(self, key: str, default: int, module: str = "", pattern: str = "") -> int:
        """Return a field that should be a whole number above 0; ``pattern`` is as in :meth:`number`."""
        value = self.number(key, default, module, pattern)
        if value != int(value) or not 0 < value < 2**31:
            raise self.error(f"{_of(key, module)} is {value!r}, and should be a whole number above 0")
        return int(value)

    def pattern(self, field: str, module: str, default: Any) -> Any:
        """Return the first value whose key matches the end of a module's path as a regular expression, as in PEFT."""
        patterns = self.get(field) or {}
        if not isinstance(patterns, Mapping):
            raise self.error(f"{field} in its config is not a mapping")
        try:
            key = self._patterns.first(field, patterns, module)
        except PatternError as error:
            raise self.error(f"the {field} {error}") from None
        return default if key is None else patterns[key]

    def match(self, expression: str, field: str, path: str, whole: bool = False) -> Any:
        """Match a regular expression of the config at the start of a module's path, or with the ``whole`` of it.

        Return None without a match. Refuse an invalid expression, and an expression that takes too long.
        """
        try:
            return self._patterns.match(expression, path, whole)
        except PatternError as error:
            raise self.error(f"the {field} {error}") from None

    def names(self, key: str) -> list[str]:
        """Return a field that should be a list of names."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(f"{key} in its config is {str(value)[:80]}, and should be a list of names")
        return value

    def check_common(self) -> None:
        """Refuse wrong values in fields that every type has, and that a merge passes on."""
        self.names("modules_to_save")
        for key in ("revision", "task_type"):
            self.text(key)

    def full_target(self, name: str) -> str:
        """Return the base's tensor that a saved tensor replaces. Refuse an unknown name."""
        target = without_wrapped_layers(name)
        trained = str(self.get("bias", "none"))
        biases = (trained == "all" or trained.endswith("_only")) and target.endswith(".bias")
        # PEFT saves embeddings and heads along that were resized, and names them nowhere
        if biases or target != name or self.saves(target) or is_table(target):
            return target
        saved = self.names("modules_to_save")
        part = "a LoRA factor" if self.kind == "LORA" else f"a part of {self.kind}"
        raise self.error(
            f"{name} is neither {part} nor part of a module saved in full "
            f"(modules_to_save: {', '.join(map(str, saved)) or 'none'})"
        )

    def saves(self, target: str) -> bool:
        """Whether a tensor belongs to a module that, as the config says, is saved in full."""
        if self.get("ensure_weight_tying") and target.endswith(HEADS):
            return True  # the head is saved along with the embedding that it is tied to
        module = f".{target.rpartition('.')[0]}."
        return any(f".{saved}." in module for saved in self.names("modules_to_save"))


def without_wrapped_layers(name: str) -> str:
    """Return the name of a tensor of a wrapped layer in the model without PEFT."""
    return _WRAPPED.sub("", name)


def _of(key: str, module: str) -> str:
    """Return the name of a field in messages, with the module that it is for, if any."""
    return f"{key} of {module}" if module else key
