"""Staged outputs: built next to their destination, made durable, and moved there whole or not at all.

An output is built in a hidden folder ``.NAME.*.partial``, which is locked by its merge. ``out`` in it becomes the
output, ``scratch`` is for temporary files, and ``old`` is the replaced output where two names cannot be exchanged in
one step. A folder with no other content and no lock was left by a killed merge. The next merge to the same destination
moves ``old`` back if nothing took its place, and removes the rest. Missing parents of an output are made, and removed
again if it is not written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from merging import os_calls
from merging.errors import MergingError, MergingWarning, OutputError, option
from merging.storage.atomic import existing_parent, make_parents, place_new_file, remove_empty, temporary_paths
from merging.storage.replacing import check_replaced, destination_error

__all__ = ["StagedOutput", "check_destination"]

_SLACK = 1 << 24
"""Bytes for configs, tokenizer and index of a folder of weights, when the free space is checked."""

_PARTIAL, _OUT, _OLD, _SCRATCH = ".partial", "out", "old", "scratch"

_OTHER_FILES = {
    ".bin", ".ckpt", ".csv", ".ggml", ".gguf", ".gz", ".h5", ".html", ".json", ".jsonl", ".md", ".msgpack", ".npy",
    ".npz", ".onnx", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensor", ".sft", ".svg", ".tar", ".tgz",
    ".txt", ".yaml", ".yml", ".zip",
}  # fmt: skip
"""Endings of files that are not written, and which are not meant as names of folders."""


def check_destination(
    destination: Path, inputs: Iterable[Path], nbytes: int, overwrite: bool, dry: bool = False
) -> str:
    """Refuse a destination that exists (unless it may be overwritten), overlaps an input, or has no room.

    A model that a killed merge to this destination had moved aside is moved back, and its other files are removed. With
    ``dry`` nothing is changed, such a model counts as existing, and a destination that exists is remarked.

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
    ending = destination.suffix.lower()
    if ending in _OTHER_FILES or (ending == ".safetensors" and destination.suffix != ending):
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
        resolved = path.resolve()
        if resolved == target or target in resolved.parents:
            raise destination_error(destination, f"the output would replace the input {path}")
    existing = destination
    for abandoned in _find_abandoned(destination):
        aside = abandoned / _OLD if dry else _put_back(abandoned, destination)
        if aside is not None and os.path.lexists(aside) and not os.path.lexists(destination):
            existing = aside
        elif not dry and not os.path.lexists(abandoned / _OLD):
            shutil.rmtree(abandoned, ignore_errors=True)
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
    needed = nbytes + (0 if destination.suffix == ".safetensors" else _SLACK)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{destination}: needs {needed / 1e6:.1f} MB, and {parent} has {free / 1e6:.1f} MB free")
    return remark


class StagedOutput:
    """A temporary folder that becomes the output at ``destination``, or, with ``file``, whose only file becomes it.

    Used as a context manager: :meth:`commit` moves the output into place, and leaving without it removes every trace.
    Raises :class:`~merging.errors.OutputError` for errors of the disk, also for those in the body.

    Attributes:
        folder: The folder in which the output is built.
        scratch: A folder for temporary files.
        notices: Remarks on files that could not be removed.
    """

    def __init__(self, destination: Path, overwrite: bool, file: bool) -> None:
        self.destination = destination
        self.overwrite = overwrite
        self.file = file
        self.notices: list[str] = []
        self._held: Path | None = None
        self._made: list[Path] = []
        self._lock: int | None = None

    def _error(self, what: str, error: OSError) -> OutputError:
        return OutputError(f"{self.destination}: {what}: {error.strerror or error}{self._notices_text()}")

    def _notices_text(self) -> str:
        return "".join(f"; {notice}" for notice in self.notices)

    def __enter__(self) -> StagedOutput:
        try:
            with os_calls.delay_signals():
                for abandoned in _find_abandoned(self.destination):
                    if _put_back(abandoned, self.destination) is None:
                        shutil.rmtree(abandoned, ignore_errors=True)
                self._made = make_parents(self.destination)
                self._held, self._lock = _create_partial(self.destination)
                self.folder, self.scratch = self._held / _OUT, self._held / _SCRATCH
                self.folder.mkdir()
                self.scratch.mkdir()
            return self
        except OSError as error:
            self._remove()
            raise self._error(f"{self.destination.parent} cannot be written to", error) from None
        except BaseException:
            self._remove()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with os_calls.delay_signals():
            self._remove()
        if isinstance(error, OSError):
            elsewhere = error.filename is not None and str(self._held) not in str(error.filename)
            raise self._error(f"cannot be written: {error.filename}" if elsewhere else "cannot be written", error)
        if isinstance(error, MergingError) and self.notices:
            error.args = (f"{error}{self._notices_text()}",)
        elif error is not None and self.notices:
            warnings.warn(self.notices[0], MergingWarning, stacklevel=2)

    def _remove(self) -> None:
        """Remove what is left of the temporary folder, and note it if that fails."""
        if self._held is None:
            return remove_empty(self._made)
        old = _put_back(self._held, self.destination)
        try:
            if old is None:
                shutil.rmtree(self._held, ignore_errors=True)
                shutil.rmtree(self._held)  # the rest is tried once more, to get the reason
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
            os.close(self._lock)
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
            self._place_file() if self.file else self._place_folder()
        except OSError as error:
            # ENOTEMPTY: a folder appeared between the last check and the renaming
            if isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY:
                raise destination_error(self.destination, "was created by someone else meanwhile") from None
            raise OutputError(f"{self.destination}: cannot be put in place: {error.strerror}") from None
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
        self.destination.rename(self.folder.with_name(_OLD))
        self.folder.rename(self.destination)


def _create_partial(destination: Path) -> tuple[Path, int | None]:
    """Create a temporary folder for an output. Return it with a descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(_PARTIAL, f".{destination.name}.", destination.parent))
        lock = None
        try:
            lock = os_calls.open_folder(folder)
            if lock is None:
                return folder, None
            if os_calls.claim(lock) is not False and os.path.samestat(os.fstat(lock), folder.stat()):
                return folder, lock
        except FileNotFoundError:
            pass
        except BaseException:
            with suppress(OSError):
                folder.rmdir()
            raise
        # another merge to this destination began just now, and considered the folder abandoned
        with suppress(OSError):
            folder.rmdir()
        if lock is not None:
            os.close(lock)


def _find_abandoned(destination: Path) -> Iterator[Path]:
    """Yield the temporary folders that no living merge holds; each is locked while the caller uses it."""
    for folder in temporary_paths(destination, _PARTIAL):
        try:
            lock = None if folder.is_symlink() else os_calls.open_folder(folder)
        except OSError:  # no folder, or it was removed just now
            continue
        if lock is None:
            continue
        try:
            if os_calls.claim(lock) and {each.name for each in folder.iterdir()} <= {_OUT, _OLD, _SCRATCH}:
                yield folder
        except FileNotFoundError:
            pass
        finally:
            os.close(lock)


def _put_back(folder: Path, destination: Path) -> Path | None:
    """Move an output that was moved aside back, if nothing took its place. Return its path if that fails."""
    old = folder / _OLD
    if not os.path.lexists(old) or os.path.lexists(destination):
        return None
    try:
        old.rename(destination)
    except OSError:
        return old
    return None


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os_calls.sync(fd)
    finally:
        os.close(fd)
