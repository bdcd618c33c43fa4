"""One way to replace a file: written beside it, made durable, and moved into its place."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from merging import os_calls

__all__ = ["leftovers", "remove_unplaced", "replace_file"]

_NEW = ".new"
"""How the names of files end that are not yet in their place."""


def replace_file(path: Path, content: bytes) -> None:
    """Put a file with this content in the place of what is there, so that a reader finds one or the other.

    It is written beside it as a new file of a name that nobody can foresee, so never through a link. The content is
    durable then; that the name is needs :func:`merging.os_calls.sync_folder`. Raises OSError, with nothing left.
    """
    with os_calls.uninterrupted():
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


def leftovers(path: Path, suffix: str) -> Iterator[Path]:
    """What has a temporary name for ``path``, as :mod:`tempfile` makes them: no other output's, no person's own.

    ``.out.v2.abcdefgh.new`` is one for ``out.v2``, and none for ``out``.
    """
    return path.parent.glob(f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}{suffix}")


def remove_unplaced(path: Path) -> None:
    """Remove what killed processes left beside a file that they were to replace; for who is its only writer."""
    for left in leftovers(path, _NEW):
        with suppress(OSError):
            left.unlink()
