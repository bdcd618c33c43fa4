"""The results of an unfinished run on disk: finished stages, and the state of the current one."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from merging import os_calls
from merging.errors import FormatError, OptionError, OutputError, option
from merging.maths.lazy_torch import torch
from merging.sources.links import refuse_link
from merging.sources.small_files import LIST_LIMIT, read_json
from merging.storage.atomic import replace_file
from merging.storage.locks import FolderLock, lock_folder

__all__ = ["RunCheckpoint"]

_PLAN = "plan.json"


class RunCheckpoint:
    """A folder with one file a stage, each written atomically and made durable.

    A run that is killed at any moment leaves only whole files, and a resumed run reads them instead of computing them
    again. ``plan`` is everything that decides the outcome. The folder is locked until the checkpoint is removed or
    closed.

    Raises :class:`~merging.errors.OptionError` if the folder holds an unfinished run, and it is not to be resumed or
    has another plan, and if another run uses the folder now.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        self.folder = refuse_link(folder)
        self._lock: FolderLock | None = None
        try:
            self._open(plan, resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, plan: dict[str, Any], resume: bool, overwrite: bool) -> None:
        folder = self.folder
        if folder.is_dir():
            self._take_lock(new=False)
        written = folder / _PLAN
        if written.is_file() and not resume and not overwrite:
            raise OptionError(
                f"{folder}: holds an unfinished run: {option('resume', True)} continues it, "
                f"{option('overwrite', True)} starts over"
            )
        if written.is_file() and resume:
            earlier = read_json(written, LIST_LIMIT)
            # an earlier version may not have kept every fact
            changed = sorted(key for key, value in earlier.items() if plan.get(key) != value)
            if changed:
                raise OptionError(
                    f"{folder}: the run to resume had another {', '.join(changed)}: give the same again, or start over "
                    f"with {option('overwrite', True)}"
                )
            self._remove_scratch()
            return
        self.remove()
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror}") from None
        self._take_lock(new=True)
        self._write(written, (json.dumps(plan, indent=1) + "\n").encode())

    def _remove_scratch(self) -> None:
        """Remove the folders in which a killed run had something in hand."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)

    def _take_lock(self, *, new: bool) -> None:
        """Lock the folder. Raises :class:`~merging.errors.OptionError` if another run holds it."""
        try:
            self._lock = lock_folder(self.folder, new)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be opened: {error.strerror}") from None
        if self._lock is None:
            raise OptionError(
                f"{self.folder}: another run makes this output now: wait until it ends, or choose another "
                f"{option('output')}"
            )

    def __contains__(self, stage: str) -> bool:
        return self._file(stage).is_file()

    def get(self, stage: str) -> Any:
        """Return the kept values of a stage, or None: tensors on the CPU and plain values."""
        if stage not in self:
            return None
        file = refuse_link(self._file(stage))
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError):
            raise FormatError(
                f"{file}: is damaged: remove this file, and {option('resume', True)} computes it again"
            ) from None

    def keep(self, stage: str, values: Any) -> None:
        """Keep tensors and plain values of a stage. They replace its earlier values."""
        buffer = io.BytesIO()
        torch.save(values, buffer)
        self._write(self._file(stage), buffer.getvalue())

    def drop(self, stage: str) -> None:
        """Forget a stage."""
        self._file(stage).unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything, and give up the lock."""
        if self._lock is not None:
            with suppress(OSError):
                self._lock.remove_folder()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Give up the lock, and leave everything for a run that resumes."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _file(self, stage: str) -> Path:
        return self.folder / f"{stage.replace(' ', '-')}.pt"

    def _write(self, path: Path, data: bytes) -> None:
        try:
            replace_file(path, data)
            os_calls.sync_folder(path.parent)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
