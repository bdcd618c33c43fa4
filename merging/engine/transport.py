"""Plans and their parts as bytes for other processes: open files go by their paths, and are checked there."""

from __future__ import annotations

import io
import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from merging.cluster.connection import import_ray
from merging.errors import InputError
from merging.hub.remote import RemoteFile
from merging.sources.open_files import File

__all__ = ["open_recorded", "pack", "unpack"]


class _FileRecord(NamedTuple):
    """An open file as another process finds it: its path, size, and time of the last change."""

    path: str
    size: int
    mtime_ns: int
    node: str


def pack(value: object) -> bytes:
    """Return a value as bytes. Functions and classes of scripts and notebooks go with it."""
    stream = io.BytesIO()
    _pickler()(stream).dump(value)
    return stream.getvalue()


def unpack(content: bytes) -> Any:
    """Return the value in bytes of :func:`pack`, with its files opened.

    Raises :class:`~merging.errors.InputError` for files that this machine does not see, or sees in another state.
    """
    return _Unpickler(io.BytesIO(content)).load()


@cache
def _pickler() -> type[pickle.Pickler]:
    """Return the class that writes; Ray's pickler takes functions by their content where no module has them."""
    import_ray()
    from ray.cloudpickle import CloudPickler

    class Packer(CloudPickler):  # type: ignore[misc, unused-ignore]
        def persistent_id(self, value: object) -> _FileRecord | None:
            if isinstance(value, RemoteFile):
                value = File(value.fetch())  # which finds it in the library's cache
            if not isinstance(value, File):
                return None
            stamp = value.stamp
            return _FileRecord(str(value.path.absolute()), stamp.size, stamp.mtime_ns, os.uname().nodename)

    return Packer


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._files: dict[tuple[str, ...], File] = {}

    def persistent_load(self, record: tuple[Any, ...]) -> File:
        """Return the open file of a record."""
        path, size, mtime_ns, node = record
        if record not in self._files:
            self._files[record] = open_recorded(Path(path), (size, mtime_ns), node)
        return self._files[record]


def open_recorded(path: Path, state: tuple[int, int], node: str) -> File:
    """Return an open file. Raises :class:`~merging.errors.InputError` unless it has this size and time of change."""
    here, shared = os.uname().nodename, "all nodes of the cluster need the inputs under the same paths"
    try:
        file = File(path)
    except OSError as error:
        raise InputError(f"{path}: {here} does not see this file of {node} ({error.strerror}): {shared}") from None
    found = file.stamp.size, file.stamp.mtime_ns
    if found != state:
        what = "size" if found[0] != state[0] else "time of the last change"
        raise InputError(
            f"{path}: on {here} it has another {what} than on {node}: {shared}, shared, or copied with their times"
        )
    return file
