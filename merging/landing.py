"""Where an output comes down: built beside its destination, made durable, and moved there whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from merging import platform
from merging.errors import OutputError

__all__ = ["Landing", "check_destination", "umask"]

_SLACK = 1 << 24
"""Bytes for configs, tokenizer and index beside the weights of a folder, when space is checked."""

_MODEL_FILES = (
    "config.json",
    "adapter_config.json",
    "model_index.json",
    "modules.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
)
"""What tells the folder of a model, which may be overwritten, from one of anything else."""


def check_destination(destination: Path, inputs: Iterable[Path], nbytes: int, overwrite: bool) -> None:
    """Refuse a destination that exists (unless it may be overwritten), lies on top of an input, or has no room.

    Raises :class:`~merging.errors.OutputError`.
    """
    try:
        target = destination.resolve()
    except (OSError, RuntimeError):  # RuntimeError: in older Pythons
        raise OutputError(f"{destination}: is a link to itself, or cannot be reached: choose another -o") from None
    for path in inputs:
        resolved = path.resolve()
        if resolved == target or target in resolved.parents:
            raise OutputError(f"{destination}: the output would replace the input {path}: choose another -o")
    if os.path.lexists(destination) and not overwrite:
        raise OutputError(f"{destination}: exists already: choose another -o, or use --overwrite")
    _check_replaced(destination)
    parent = destination.parent
    if not parent.is_dir():
        raise OutputError(f"{destination}: the folder {parent} does not exist: create it first")
    needed = nbytes + (0 if destination.suffix == ".safetensors" else _SLACK)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{destination}: needs {needed / 1e6:.1f} MB, and {parent} has {free / 1e6:.1f} MB free")


def _check_replaced(destination: Path) -> None:
    """Only a file is overwritten by a file, and only the folder of a model, or an empty one, by a folder."""
    if not os.path.lexists(destination):
        return
    single = destination.suffix == ".safetensors"
    if single and destination.is_dir():
        raise OutputError(f"{destination}: is a folder, and the output is a file: choose another -o")
    if single and not destination.is_file() and not destination.is_symlink():
        raise OutputError(f"{destination}: is no ordinary file: choose another -o")
    if not single and not destination.is_dir():
        raise OutputError(f"{destination}: is no folder, and the output is one: choose another -o")
    if not single and any(destination.iterdir()) and not any(any(destination.glob(name)) for name in _MODEL_FILES):
        raise OutputError(f"{destination}: is a folder of something else than a model, which is not overwritten")


class Landing:
    """A temporary folder beside ``destination`` that becomes it, or (``file`` given) one file of which becomes it.

    Used as a context manager: :meth:`commit` moves the output into place, leaving without it removes every trace. A
    process that is killed leaves a hidden folder ``.NAME.*.partial``, which the next merge to the same place removes.
    """

    def __init__(self, destination: Path, overwrite: bool, file: bool) -> None:
        self.destination = destination
        self.overwrite = overwrite
        self.file = file
        parent = destination.parent
        self._remove_abandoned(parent)
        try:
            # Locked before it has the name of a partial output: no other merge may take it for abandoned.
            new = Path(tempfile.mkdtemp(".new", f".{destination.name}.", parent))
        except OSError as error:
            raise OutputError(f"{destination}: {parent} cannot be written to: {error.strerror}") from None
        try:
            self._lock = platform.open_folder(new)
            if self._lock is not None:
                platform.claim(self._lock)
            self.folder = new.rename(new.with_suffix(".partial"))
        except OSError as error:
            with suppress(OSError):
                new.rmdir()
            raise OutputError(f"{destination}: {parent} cannot be written to: {error.strerror}") from None

    def _remove_abandoned(self, parent: Path) -> None:
        for folder in parent.glob(f".{glob.escape(self.destination.name)}.*.partial"):
            try:
                fd = platform.open_folder(folder)
            except OSError:  # it has just become an output, or was removed
                continue
            if fd is None:
                continue
            try:
                if platform.claim(fd):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)

    def __enter__(self) -> Landing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self.folder.is_dir() and not self.folder.is_symlink():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            with suppress(OSError):
                self.folder.unlink()

    def commit(self) -> None:
        """Make what was built durable and put it in place, atomically. Raises :class:`~merging.errors.OutputError`."""
        try:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and path.suffix != ".safetensors":  # those were synced when they were closed
                    _sync_file(path)
                elif path.is_dir():
                    platform.sync_folder(path)
            platform.sync_folder(self.folder)
            self._place_file() if self.file else self._place_folder()
            platform.sync_folder(self.destination.parent)
        except FileExistsError:
            raise OutputError(f"{self.destination}: was created by someone else meanwhile: choose another -o") from None
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:  # a folder that appeared between the last look and the renaming
                raise OutputError(
                    f"{self.destination}: was created by someone else meanwhile: choose another -o"
                ) from None
            raise OutputError(f"{self.destination}: cannot be put in place: {error.strerror}") from None

    def _place_file(self) -> None:
        (built,) = self.folder.iterdir()
        if self.overwrite:
            if self.destination.is_dir():
                raise OutputError(f"{self.destination}: is a folder, and the output is a file: choose another -o")
            built.replace(self.destination)
            return
        try:
            os.link(built, self.destination)  # unlike a rename, it never replaces what appeared meanwhile
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if os.path.lexists(self.destination):
                raise FileExistsError from None
            built.rename(self.destination)

    def _place_folder(self) -> None:
        self.folder.chmod(0o777 & ~umask())
        if self.overwrite and platform.exchange(self.folder, self.destination):
            return  # what was there has the temporary name now, and goes with it
        if self.overwrite and os.path.lexists(self.destination):
            old = Path(tempfile.mkdtemp(".replaced", f".{self.destination.name}.", self.destination.parent))
            self.destination.rename(old / "old")
            try:
                self.folder.rename(self.destination)
            except OSError:
                (old / "old").rename(self.destination)
                old.rmdir()
                raise
            # Only now may the next merge remove it, should this one be killed here.
            shutil.rmtree(old.rename(old.with_suffix(".partial")), ignore_errors=True)
        elif os.path.lexists(self.destination):
            raise FileExistsError
        else:
            self.folder.rename(self.destination)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        platform.sync(fd)
    finally:
        os.close(fd)


def umask() -> int:
    """The bits that new files and folders do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
