"""Checks of the files and folders that an output would replace."""

from __future__ import annotations

import os
from pathlib import Path

from merging.errors import OutputError, option
from merging.sources.model_files import foreign_names

__all__ = ["FILE_ENDINGS", "check_replaced", "destination_error"]

FILE_ENDINGS = (".safetensors", ".gguf")
"""The endings of outputs that are single files."""


def destination_error(destination: Path, reason: str, remedy: str = "") -> OutputError:
    """Return the error for an output that cannot or must not take its destination."""
    return OutputError(f"{destination}: {reason}: choose another {option('output')}{remedy}")


def check_replaced(destination: Path, existing: Path) -> None:
    """Refuse to replace anything but a file by a file, and the folder of one model, or an empty one, by a folder.

    Raises :class:`~merging.errors.OutputError`.
    """
    if not os.path.lexists(existing):
        return
    single = destination.suffix in FILE_ENDINGS
    if single and existing.is_dir():
        raise destination_error(destination, "is a folder, and the output is a file")
    if single and not existing.is_file() and not existing.is_symlink():
        raise destination_error(destination, "is not an ordinary file")
    if not single and not existing.is_dir():
        raise destination_error(destination, "is not a folder, and the output is one")
    foreign = [] if single else foreign_names(existing)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{destination}: is a folder of something else than one model, which is not overwritten: it holds "
            f"{', '.join(foreign[:3])}{more}: choose another {option('output')}"
        )
