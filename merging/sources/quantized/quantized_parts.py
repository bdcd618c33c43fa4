"""The quantised weights of a checkpoint as its files hold them, so that they can be written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging.sources.stored import Stored

__all__ = ["QUANTIZATION_KEYS", "QuantizedParts", "QuantizedWeight"]

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""The keys of a config that state its quantisation."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A quantised weight.

    Attributes:
        reading: the weight as ordinary numbers.
        parts: its codes and scales, by their names in the files; the codes first.
    """

    reading: Stored
    parts: Mapping[str, Stored]


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedParts:
    """The quantised weights of a checkpoint.

    Attributes:
        config: the checkpoint's config, with its statement of the quantisation.
        weights: the quantised weights, by their names as ordinary weights.
        others: tensors for quantised activations and caches, which ordinary weights do not need.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, QuantizedWeight]
    others: Mapping[str, Stored]

    @property
    def stated(self) -> Mapping[str, Any]:
        """The config's statement of the quantisation, empty without one."""
        inner = self.config.get("text_config")
        for part in (self.config, inner if isinstance(inner, dict) else {}):
            for key in QUANTIZATION_KEYS:
                if isinstance(part.get(key), dict):
                    return dict(part[key])
        return {}

    def restore(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return an output's config with this checkpoint's statement of the quantisation at its places."""
        restored = dict(config) | {key: self.config[key] for key in QUANTIZATION_KEYS if key in self.config}
        inner, text = self.config.get("text_config"), restored.get("text_config")
        if isinstance(inner, dict) and isinstance(text, dict):
            restored["text_config"] = text | {key: inner[key] for key in QUANTIZATION_KEYS if key in inner}
        return restored
