"""The files in the folder of a pool."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.errors import FormatError, OutputError
from merging.pool.audit import KEPT_FILES
from merging.pool.entry import Entry, Finding
from merging.pool.index import UNFINISHED
from merging.sources import Adapter, check_in_place
from merging.sources.links import refuse_link
from merging.sources.small_files import is_there

__all__ = ["FOLDER", "holds_something", "keep_files", "sweep"]

FOLDER = "adapters"
"""The folder of all adapters' files."""

_CONFIG = "adapter_config.json"

_KEPT = re.compile(r"[0-9a-f]{16}|\.new\.\w{8}")
"""The names of folders of adapters: a hash, or the name of an unfinished copy."""

_BLOCK = 1 << 22


def _copy(source: Path, target: Path, digest: Any) -> None:
    """Copy a file to a new one, durably, and add it to a digest if there is one. Raises OSError."""
    with os.fdopen(os_calls.open_regular(source), "rb") as reader, os_calls.create(target) as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)
            if digest is not None:
                digest.update(block)
        writer.flush()
        with suppress(OSError):  # some file systems cannot make files durable
            os_calls.sync(writer.fileno())


def _remove(path: Path) -> None:
    """Remove a folder (as far as possible), a file, or a link without its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def holds_something(path: Path) -> bool:
    """Whether a folder holds more than the remains of a pool whose creation was killed."""
    names = {each.name for each in path.iterdir()}
    return bool(names - {FOLDER, *UNFINISHED}) or (FOLDER in names and any((path / FOLDER).iterdir()))


def keep_files(pool: Path, entry: Entry, adapter: Adapter) -> Entry:
    """Copy an adapter's files into the pool, into a folder named by the hash of its weights and config.

    Returns the entry with hash and folder, or rejected if the files changed since the audit. Raises
    :class:`~merging.errors.OutputError` if the disk refuses.
    """
    weights = adapter.files[0]
    # A config belongs only to weights with PEFT's name.
    config = [weights.parent / _CONFIG] if weights.stem == "adapter_model" else []
    digest, new = hashlib.sha256(), None
    try:
        with os_calls.delay_signals():
            new = Path(tempfile.mkdtemp(prefix=".new.", dir=pool / FOLDER))
        for file in (file for file in [weights, *config] if file.is_file()):
            _copy(file, new / file.name, digest)
        check_in_place(adapter)  # the copied files are the audited ones
        for file in (weights.parent / name for name in KEPT_FILES):
            if is_there(file):
                _copy(file, new / file.name, None)
        place = pool / FOLDER / digest.hexdigest()[:16]
        if not refuse_link(place).exists():
            new.rename(place)
    except FormatError as error:
        findings = (*entry.findings, Finding("values", "rejected", str(error)))
        return replace(entry, verdict="rejected", findings=findings)
    except OSError as error:
        raise OutputError(f"{pool}: cannot be written: {error.strerror}") from None
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
    inside = place if config else place / weights.name
    return replace(entry, sha256=digest.hexdigest(), folder=str(inside.relative_to(pool)))


def sweep(pool: Path, entries: Sequence[Entry]) -> None:
    """Delete files that belong to no adapter: of removed adapters, and of a killed build."""
    wanted = {Path(entry.folder).parts[1] for entry in entries if entry.folder}
    try:
        (pool / FOLDER).mkdir(exist_ok=True)
        for folder in (pool / FOLDER).iterdir():
            if folder.name not in wanted and _KEPT.fullmatch(folder.name):
                _remove(folder)
    except OSError as error:
        raise OutputError(f"{pool}: cannot be written to: {error.strerror}") from None
