"""Staged outputs: built next to their destination, made durable, and moved there whole or not at all.

An output is built in a hidden folder next to its destination, see :mod:`merging.storage.leftovers`. The next merge to
the same destination moves an output back that a killed merge had moved aside, if nothing took its place. It goes on
with the rest, or removes it. Missing parents of an output are made, and removed again if it is not written."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from merging import os_calls
from merging.errors import InputError, MergingError, MergingWarning, OptionError, OutputError, option
from merging.object_stores.store_path import StorePath, refuse_store_path
from merging.storage.atomic import existing_parent, make_parents, place_new_file, remove_empty
from merging.storage.leftovers import (
    JOURNAL,
    OLD,
    OUT,
    SCRATCH,
    Identity,
    create_partial,
    find_abandoned,
    find_unfinished,
    has_entries,
    mark_placing,
    put_back,
    take_over,
    write_identity,
)
from merging.storage.locks import FolderLock
from merging.storage.replacing import FILE_ENDINGS, check_replaced, destination_error

__all__ = ["StagedOutput", "check_destination"]

_SLACK = 1 << 24
"""Bytes for configs, tokenizer and index of a folder of weights, when the free space is checked."""

_LASTING = (InputError, OptionError)
"""Errors that the same command meets again."""

_OTHER_FILES = {
    ".bin", ".ckpt", ".csv", ".ggml", ".gz", ".h5", ".html", ".json", ".jsonl", ".md", ".msgpack", ".npy",
    ".npz", ".onnx", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensor", ".sft", ".svg", ".tar", ".tgz",
    ".txt", ".yaml", ".yml", ".zip",
}  # fmt: skip
"""Endings of files that are not written, and which are not meant as names of folders."""


def check_destination(
    destination: Path, inputs: Iterable[Path], nbytes: int, overwrite: bool, dry: bool = False
) -> str:
    """Refuse a destination that exists (unless it may be overwritten), overlaps an input, or has no room.

    A model that a killed merge to this destination had moved aside is moved back, and its other files are removed,
    unless a later run can go on with them. With ``dry`` nothing is changed, such a model counts as existing, and a
    destination that exists is remarked.

    Args:
        destination: The path of the output, a file if it ends in ``.safetensors``, else a folder.
        inputs: The files and folders that are read.
        nbytes: The size of the output's tensors in bytes.
        overwrite: Whether an existing file, or the folder of one model, may be replaced.
        dry: Whether nothing may be changed.

    Returns:
        A remark on a destination that exists, if ``dry``; else an empty text.

    Raises:
        OutputError: The destination is refused.
    """
    refuse_store_path(destination)
    ending = destination.suffix.lower()
    if ending in _OTHER_FILES or (ending in FILE_ENDINGS and destination.suffix != ending):
        raise OutputError(
            f"{destination}: no {destination.suffix} file is written: name a single file ending in .safetensors, or a "
            f"folder"
        )
    try:
        target = destination.resolve()  # before Python 3.13 a RuntimeError for a loop
        with suppress(FileNotFoundError, NotADirectoryError):
            target.stat()
    except (OSError, RuntimeError) as error:
        too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        reason = "the name is too long" if too_long else "is a link to itself, or cannot be reached"
        raise destination_error(destination, reason) from None
    for path in inputs:
        if isinstance(path, StorePath):  # nothing of it is on this disk
            continue
        resolved = path.resolve()
        if resolved == target or target in resolved.parents:
            raise destination_error(destination, f"the output would replace the input {path}")
    existing = destination
    for lock in find_abandoned(destination):
        abandoned = lock.folder
        aside = abandoned / OLD if dry else put_back(abandoned, destination)
        if aside is not None and os.path.lexists(aside) and not os.path.lexists(destination):
            existing = aside
        elif not dry and not os.path.lexists(abandoned / OLD) and find_unfinished(abandoned) is None:
            _try_to_remove(lock)
    remark = ""
    if os.path.lexists(existing) and not overwrite:
        where = "" if existing == destination else f" (a merge that was killed left it as {existing})"
        if not dry:
            raise destination_error(destination, f"exists already{where}", f", or use {option('overwrite', True)}")
        remark = (
            f"{destination} exists already{where}: the merge needs another {option('output')}, or "
            f"{option('overwrite', True)}"
        )
    else:
        check_replaced(destination, existing)
    parent = existing_parent(destination)
    if not parent.is_dir():
        raise OutputError(f"{destination}: {parent} is not a folder, so that nothing can be written in it")
    needed = nbytes + (0 if destination.suffix in FILE_ENDINGS else _SLACK)
    usage = shutil.disk_usage(parent)
    if usage.total and usage.free < needed:  # some network file systems state no size at all
        raise OutputError(
            f"{destination}: needs {needed / 1e6:.1f} MB, and {parent} has {usage.free / 1e6:.1f} MB free"
        )
    return remark


class StagedOutput:
    """A temporary folder that becomes the output at ``destination``, or, with ``file``, whose only file becomes it.

    Used as a context manager: :meth:`commit` moves the output into place, and leaving without it removes every trace.
    With an ``identity`` it can be resumed: a folder that a run with the same identity left is gone on with, and this
    one stays after errors that pass, such as a full disk, if its journal has an entry. Raises
    :class:`~merging.errors.OutputError` for errors of the disk, also for those in the body.

    Attributes:
        folder: The folder in which the output is built.
        scratch: A folder for temporary files.
        journal: A folder for the record of finished work; None without an identity.
        notices: Remarks on files that could not be removed.
    """

    def __init__(self, destination: Path, overwrite: bool, file: bool, identity: Identity | None = None) -> None:
        self.destination = destination
        self.overwrite = overwrite
        self.file = file
        self.identity = identity
        self.journal: Path | None = None
        self.notices: list[str] = []
        self._held: Path | None = None
        self._made: list[Path] = []
        self._lock: FolderLock | None = None

    def _error(self, what: str, error: OSError) -> OutputError:
        return OutputError(f"{self.destination}: {what}: {error.strerror or error}{self._notices_text()}")

    def _notices_text(self) -> str:
        return "".join(f"; {notice}" for notice in self.notices)

    def __enter__(self) -> StagedOutput:
        try:
            with os_calls.delay_signals():
                for abandoned in find_abandoned(self.destination):
                    old = put_back(abandoned.folder, self.destination)
                    if old is None and find_unfinished(abandoned.folder) is None:
                        _try_to_remove(abandoned)
                self._made = make_parents(self.destination)
                self._open()
            return self
        except OSError as error:
            self._remove()
            raise self._error(f"{self.destination.parent} cannot be written to", error) from None
        except BaseException:
            self._remove()
            raise

    def _open(self) -> None:
        """Take over the folder of a run that stopped, or create one."""
        taken = None if self.identity is None else take_over(self.destination, self.identity)
        self._held, self._lock = taken or create_partial(self.destination)
        self.folder, self.scratch = self._held / OUT, self._held / SCRATCH
        self.scratch.mkdir()
        if taken is None:
            self.folder.mkdir()
            if self.identity is not None:
                write_identity(self._held, self.identity)
        if self.identity is not None:
            self.journal = self._held / JOURNAL

    def clear(self) -> None:
        """Remove what a run that stopped left of the output, for a merge that begins from the start."""
        if any(self.folder.iterdir()):
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with os_calls.delay_signals():
            self._remove(keep=error is not None and not isinstance(error, _LASTING))
        if isinstance(error, OSError):
            elsewhere = error.filename is not None and str(self._held) not in str(error.filename)
            raise self._error(f"cannot be written: {error.filename}" if elsewhere else "cannot be written", error)
        if isinstance(error, MergingError) and self.notices:
            error.args = (f"{error}{self._notices_text()}",)
        elif error is not None and self.notices:
            warnings.warn(self.notices[0], MergingWarning, stacklevel=2)

    def _remove(self, keep: bool = False) -> None:
        """Remove what is left of the temporary folder, and note it if that fails.

        With ``keep``, finished work stays that a later run can go on with.
        """
        if self._held is None:
            return remove_empty(self._made)
        old = put_back(self._held, self.destination)
        try:
            if old is None and keep and self.journal is not None and has_entries(self.journal):
                shutil.rmtree(self.scratch, ignore_errors=True)
                self.notices.append(
                    f"the finished work stays in {self._held}: the same command with {option('resume', True)} goes on"
                )
            elif old is None and self._lock is not None:
                _try_to_remove(self._lock)
                if os.path.lexists(self._held):
                    self._lock.remove_folder()  # the rest is tried once more, to get the reason
            else:
                self.notices.append(
                    f"{old} is what was there before: the next merge to {self.destination} moves it back"
                )
        except FileNotFoundError:
            pass
        except OSError as error:
            self.notices.append(
                f"the temporary folder {self._held} could not be removed ({error.strerror}): the next merge to "
                f"{self.destination} removes it"
            )
        if self._lock is not None:
            self._lock.release()
        self._held = self._lock = None
        return remove_empty(self._made)

    def commit(self) -> None:
        """Make the output durable and put it in place, atomically. Signals wait until it is in place.

        Raises :class:`~merging.errors.OutputError`, also if the output is in place and the disk does not confirm its
        name.
        """
        with os_calls.delay_signals():
            self._put_in_place()
            self._remove()

    def _put_in_place(self) -> None:
        try:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and path.suffix != ".safetensors":  # safetensors were synced when they were closed
                    _sync_file(path)
                elif path.is_dir():
                    os_calls.sync_folder(path)
            os_calls.sync_folder(self.folder)
            if self._held is not None and self.identity is not None:
                mark_placing(self._held)
            self._place_file() if self.file else self._place_folder()
        except OSError as error:
            # ENOTEMPTY: a folder appeared between the last check and the renaming
            if isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY:
                raise destination_error(self.destination, "was created by someone else meanwhile") from None
            raise OutputError(f"{self.destination}: cannot be put in place: {error.strerror}") from None
        self.journal = None  # of an output in place no work is left to go on with
        try:
            os_calls.sync_folder(self.destination.parent)
        except OSError as error:
            raise OutputError(
                f"{self.destination}: is in place, but the disk does not confirm it ({error.strerror}): after a power "
                f"cut it may be gone"
            ) from None

    def _place_file(self) -> None:
        (built,) = self.folder.iterdir()
        if self.overwrite:
            if self.destination.is_dir():
                raise destination_error(self.destination, "is a folder, and the output is a file")
            built.replace(self.destination)
            return
        place_new_file(built, self.destination)

    def _place_folder(self) -> None:
        if self.overwrite:
            # checked again: something may have been created there since the beginning
            check_replaced(self.destination, self.destination)
        if self.overwrite and os_calls.exchange(self.folder, self.destination):
            return  # the old output has the temporary name now, and is removed with it
        if not os.path.lexists(self.destination):
            self.folder.rename(self.destination)
            return
        if not self.overwrite:
            raise FileExistsError
        self.destination.rename(self.folder.with_name(OLD))
        self.folder.rename(self.destination)


def _try_to_remove(lock: FolderLock) -> None:
    """Remove a temporary folder as far as possible."""
    with suppress(OSError):
        lock.remove_folder()
        return
    shutil.rmtree(lock.folder, ignore_errors=True)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os_calls.sync(fd)
    finally:
        os.close(fd)
