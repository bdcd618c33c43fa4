"""Atomic replacement of a file: the new file is written in the same folder, made durable, and renamed."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from merging import os_calls
from merging.object_stores.store_path import refuse_store_path

__all__ = [
    "existing_parent",
    "make_parents",
    "place_new_file",
    "remove_empty",
    "remove_temporary_files",
    "replace_file",
    "temporary_paths",
]

_NEW = ".new"
"""The ending of the names of files that are not in place yet."""


def replace_file(path: Path, content: bytes, overwrite: bool = True) -> None:
    """Replace a file by one with this content, so that a reader finds either the old or the new file.

    Without ``overwrite`` it is a FileExistsError if there is a file, also one that appears at the last moment.

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
            os_calls.set_mode(Path(new), 0o666 & ~os_calls.umask())
            if overwrite:
                Path(new).replace(path)
            else:
                place_new_file(Path(new), path)
        except BaseException:
            with suppress(OSError):
                Path(new).unlink()
            raise


def place_new_file(built: Path, path: Path) -> None:
    """Move a file to a path where nothing is. Raises FileExistsError if something is, also if it appeared just now.

    A file system with neither links nor such a rename may replace a file that appeared within the last moment.
    """
    try:
        os.link(built, path)  # unlike a rename, it never replaces a file that appeared meanwhile
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os_calls.rename_new(built, path):
            return
        if os.path.lexists(path):
            raise FileExistsError from None
        built.rename(path)
    else:
        with suppress(OSError):  # the file is in place; its temporary name is removed later
            built.unlink()


def existing_parent(path: Path) -> Path:
    """Return the innermost path above one that exists; unless it is a folder, nothing can be written there."""
    return next(folder for folder in path.absolute().parents if os.path.lexists(folder))


def make_parents(path: Path) -> list[Path]:
    """Make the missing folders above a path, durably, and return them from the outermost. Raises OSError."""
    refuse_store_path(path)
    missing = [folder for folder in path.absolute().parents if not os.path.lexists(folder)][::-1]
    made: list[Path] = []
    try:
        for folder in missing:
            folder.mkdir(exist_ok=True)
            made.append(folder)
            os_calls.sync_folder(folder.parent)
    except BaseException:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that :func:`make_parents` made, as far as they are empty."""
    with suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


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
