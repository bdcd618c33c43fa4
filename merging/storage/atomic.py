"""Atomic replacement of a file: the new file is written in the same folder, made durable, and renamed."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from merging import os_calls

__all__ = ["remove_temporary_files", "replace_file", "temporary_paths"]

_NEW = ".new"
"""The ending of the names of files that are not in place yet."""


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file by one with this content, so that a reader finds either the old or the new file.

    The new file is first written in the same folder under a name that nobody can foresee, so never through a link. Its
    content is durable afterwards; its name is after :func:`merging.os_calls.sync_folder`. Raises OSError, and leaves
    nothing behind then.
    """
    with os_calls.delay_signals():
        fd, new = tempfile.mkstemp(_NEW, f".{path.name}.", path.parent)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(content)
                stream.flush()
                os_calls.sync(stream.fileno())
            Path(new).chmod(0o666 & ~os_calls.umask())
            Path(new).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(new).unlink()
            raise


def temporary_paths(path: Path, suffix: str) -> Iterator[Path]:
    """Yield the paths with temporary names for ``path``, as :mod:`tempfile` makes them; no other output's, no user's.

    ``.out.v2.abcdefgh.new`` is a temporary name for ``out.v2``, and not for ``out``.
    """
    return path.parent.glob(f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}{suffix}")


def remove_temporary_files(path: Path) -> None:
    """Remove the temporary files that killed processes left. The caller must be the only writer of ``path``."""
    for left in temporary_paths(path, _NEW):
        with suppress(OSError):
            left.unlink()
