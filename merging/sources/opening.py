"""Opening the weights in one file, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merging.sources.pickled import open_pickle
from merging.sources.stored import FileContents, open_safetensors

__all__ = ["STAND_INS", "open_tensors"]

STAND_INS: dict[Path, Callable[[], FileContents]] = {}
"""How those weights files are opened that only stand for one elsewhere, by their paths."""


def open_tensors(path: Path) -> FileContents:
    """The tensors of a weights file of either kind, told by its ending."""
    if path in STAND_INS:
        return STAND_INS[path]()
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    return open_pickle(path)
