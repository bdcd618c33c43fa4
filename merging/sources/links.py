"""Links in folders of strangers: nothing is read or written through a link that leads out of its folder.

A path that a user names may itself be a link, to a file or a folder. In the Hub's cache a snapshot links to the blobs
of its repository, and these links are followed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merging import os_calls
from merging.errors import FormatError

__all__ = ["check_inside", "check_open_file", "link_or_copy", "refuse_link", "trust_links"]

_is_junction = getattr(os.path, "isjunction", None)
"""The test for Windows' links to folders that are not symbolic links; Python has it since 3.12."""

_TRUSTED: set[str] = set()
"""Folders in which this process made the links itself."""


def check_inside(path: Path, folder: Path) -> Path:
    """Return the path if it does not lead out of ``folder``.

    Raises :class:`~merging.errors.FormatError` for a link out of the folder.
    """
    _check_place(_real(path), path, folder)
    return path


def check_open_file(fd: int, path: Path, folder: Path) -> None:
    """Check an open file as :func:`check_inside` checks a path: a link may have come since the path was checked.

    Nothing is checked where the system does not say where an open file is (all but Linux).
    """
    real = os_calls.path_of(fd)
    if real is not None and not _is_below(real, folder):
        _check_place(real, path, folder)


def _check_place(real: str, path: Path, folder: Path) -> None:
    root = _real(folder)
    if not any(_is_within(real, each) for each in (root, *_trusted_roots(root))):
        raise FormatError(
            f"{path}: is a link out of its folder, to {real}, and nothing is read through one: put the file itself in "
            f"its place"
        )


def refuse_link(path: Path) -> Path:
    """Return the path, which is part of a folder that this program made, if it is not a link.

    Raises :class:`~merging.errors.FormatError` for a link: this program makes none there, and its target would be
    changed or deleted.
    """
    with _one_message(path):
        is_link = path.is_symlink() or (_is_junction is not None and _is_junction(path))
    if is_link:
        raise FormatError(f"{path}: is a link, to {_real(path)}: nothing is read, written or deleted there")
    return path


def trust_links(folder: Path) -> None:
    """Follow the links in a folder wherever they lead: this process makes them itself."""
    _TRUSTED.add(os.path.realpath(folder))


def link_or_copy(place: Path, target: Path) -> None:
    """Make a link to a file, or a copy where the file system has no links. Raises OSError."""
    try:
        place.symlink_to(target.resolve())
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(target, place)


def _real(path: Path) -> str:
    """Return the path without links."""
    with _one_message(path):
        return os.path.realpath(path)


@contextmanager
def _one_message(path: Path) -> Iterator[None]:
    """Raise :class:`~merging.errors.FormatError` if a path cannot be followed, or is exchanged in the meantime."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be followed to where it leads: {reason}: try again") from None


def _trusted_roots(root: str) -> Iterator[str]:
    """Yield the folders that links may lead to: the blobs of the folder's repository in the Hub's cache."""
    if any(_is_within(root, each) for each in _TRUSTED):
        yield os.path.sep
    parts = Path(root)
    for parent in (parts, *parts.parents):
        if parent.name == "snapshots":
            yield str(parent.parent / "blobs")


def _is_below(real: str, folder: Path) -> bool:
    """Whether a folder is above a path, however a file system spells upper and lower case."""
    try:
        return any(parent.samefile(folder) for parent in Path(real).parents)
    except OSError:
        return False


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.path.sep) + os.path.sep)
