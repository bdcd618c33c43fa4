"""Opening the weights in one file, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merging.sources.distributed import METADATA, open_distributed
from merging.sources.gguf.files import open_gguf
from merging.sources.pickled import open_pickle
from merging.sources.stored import FileContents, open_safetensors

__all__ = ["FileOpener", "open_tensors"]

FileOpener = Callable[[Path], FileContents]
"""A function that opens a weights file by its path. The Hub's opener also opens files that are not downloaded yet."""


def open_tensors(path: Path) -> FileContents:
    """Open a weights file on this disk, in the format of its ending: safetensors, GGUF, or PyTorch's.

    The list of a distributed checkpoint stands for all of its files.
    """
    if path.name == METADATA:
        return open_distributed(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    return open_pickle(path)
