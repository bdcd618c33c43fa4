"""Where things are in a checkout of the project."""

from __future__ import annotations

from pathlib import Path

__all__ = ["EXAMPLES", "ROOT", "SHIPPED", "TESTS"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
EXAMPLES = ROOT / "examples" / "adapters"
SHIPPED = sorted(file.parent for file in EXAMPLES.glob("*/adapter_config.json"))
"""The adapters under examples/, by name."""
