"""The files in the folder of a pool."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.pool.index import UNFINISHED

__all__ = ["FOLDER", "copy", "holds_something", "remove"]

FOLDER = "adapters"
"""Where the files of all adapters lie."""

_BLOCK = 1 << 22


def copy(source: Path, target: Path, digest: Any) -> None:
    """Copy a file to a new one, durably, and add it to a digest if there is one. Raises OSError."""
    with os.fdopen(os_calls.open_regular(source), "rb") as reader, os_calls.create(target) as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)
            if digest is not None:
                digest.update(block)
        writer.flush()
        with suppress(OSError):  # some file systems have nothing to make durable
            os.fsync(writer.fileno())


def remove(path: Path) -> None:
    """Remove a folder, as far as that is possible, a file, or a link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def holds_something(path: Path) -> bool:
    """Whether a folder has more in it than what a kill leaves of a new pool."""
    names = {each.name for each in path.iterdir()}
    return bool(names - {FOLDER, *UNFINISHED}) or (FOLDER in names and any((path / FOLDER).iterdir()))
