"""What an adapter's config says: looked up as PEFT does, and refused by name where it makes no sense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging.errors import FormatError
from merging.sources.checkpoint import HEADS

__all__ = ["Config"]

_CATASTROPHIC = re.compile(r"\([^)]*[*+}][^)]*\)[*+{]")


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of an adapter_config.json, and ``where`` they were found, for messages.

    Empty where an adapter carries no config: ``stated`` is then false.
    """

    fields: Mapping[str, Any]
    where: str

    @property
    def stated(self) -> bool:
        """Whether there is a config at all."""
        return "peft_type" in self.fields

    def get(self, key: str, default: Any = None) -> Any:
        """A field as it is."""
        return self.fields.get(key, default)

    def error(self, reason: str) -> FormatError:
        """The refusal of this adapter, with the reason."""
        return FormatError(f"{self.where}: {reason}")

    def text(self, key: str) -> str | None:
        """A field that should be a name."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} in its config is {value!r}, and should be a name")
        return value or None

    def pattern(self, field: str, module: str, default: Any) -> Any:
        """The first value whose key matches the end of a module's path as a regular expression, as in PEFT."""
        patterns = self.get(field) or {}
        if not isinstance(patterns, Mapping):
            raise self.error(f"{field} in its config is no mapping")
        for key, value in patterns.items():
            if len(key) > 1000 or _CATASTROPHIC.search(key):
                raise self.error(f"the {field} {key[:80]!r} could take for ever to match: write it out")
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            except re.error as error:
                raise self.error(f"the {field} {key!r} is no regular expression: {error}") from None
        return default

    def full_target(self, name: str) -> str:
        """The base's tensor that one saved in full replaces, or a refusal of a name that has no place."""
        target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        biases = self.get("bias", "none") in ("all", "lora_only") and target.endswith(".bias")
        if biases or target != name or self.saves(target):
            return target
        saved = self.get("modules_to_save") or []
        raise self.error(
            f"{name} is neither a LoRA factor nor part of a module saved in full "
            f"(modules_to_save: {', '.join(map(str, saved)) or 'none'})"
        )

    def saves(self, target: str) -> bool:
        """Whether a tensor belongs to a module that the config says is saved in full."""
        if self.get("ensure_weight_tying") and target.endswith(HEADS):
            return True  # the head is saved along with the embedding that it is tied to
        saved = self.get("modules_to_save") or []
        parts = target.split(".")[:-1]
        paths = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
        return any(isinstance(module, str) and module in paths for module in saved)
