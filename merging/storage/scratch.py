"""Files for values that are read back by the same program."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

__all__ = ["open_scratch"]


def open_scratch(folder: Path | None, path: Path | None = None) -> IO[bytes]:
    """Open a file for values that are read back: without a name in a folder, or at a path. Raises OSError."""
    if path is None:
        try:
            return tempfile.TemporaryFile(dir=folder)
        except OSError:  # a file system that removes no name of an open file
            return tempfile.NamedTemporaryFile(dir=folder)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600), "r+b")
