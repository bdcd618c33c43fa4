"""Shapes of tensors."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Shape", "Shapes"]

Shape = tuple[int, ...]
"""The sizes of a tensor's axes."""

Shapes = Mapping[str, Shape]
"""The shapes of tensors by name."""
