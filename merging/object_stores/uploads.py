"""Uploads that no reader sees before they are completed, which another process can do too.

S3 has multipart uploads: the parts wait in the store until they are completed. In other stores the file is written
under a hidden name, and copied to its own by the store itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from merging.object_stores.store import Store

__all__ = ["LostUpload", "Upload", "UploadFacts", "abort_upload", "begin_upload", "complete_upload", "is_pending"]

UploadFacts = Mapping[str, Any]
"""All that completes an upload, in plain values: ``path``, ``upload`` and ``etags``, or ``path`` and ``hidden``."""


class LostUpload(Exception):
    """An upload that can no longer be completed: the store, or somebody, removed its parts."""


class Upload(Protocol):
    """An upload of one file.

    Attributes:
        in_any_order: whether parts can be put in any order, and from several threads.
    """

    in_any_order: bool

    def put(self, number: int, data: bytes | bytearray) -> None:
        """Upload a part; they are numbered from 0. Raises :class:`~merging.errors.InputError`."""

    def finish(self) -> None:
        """End the upload after its last part."""

    def entry(self) -> dict[str, Any]:
        """Return all that completes the upload."""


def begin_upload(store: Store, path: str, hidden: str, part: int) -> Upload:
    """Begin the upload of a file.

    Args:
        store: the store.
        path: the path of the file there.
        hidden: the path of the file until it is completed, for stores without multipart uploads.
        part: the size of a part in bytes.
    """
    return _Multipart(store, path) if store.has_multipart else _Hidden(store, path, hidden, part)


class _Multipart:
    """A multipart upload of S3."""

    in_any_order = True

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._id: str = store.call_s3("create_multipart_upload", path)["UploadId"]
        self._etags: dict[int, str] = {}

    def put(self, number: int, data: bytes | bytearray) -> None:
        answer = self._store.call_s3("upload_part", self._path, UploadId=self._id, PartNumber=number + 1, Body=data)
        self._etags[number] = answer["ETag"]

    def finish(self) -> None:
        pass

    def entry(self) -> dict[str, Any]:
        return {"path": self._path, "upload": self._id, "etags": [self._etags[each] for each in sorted([*self._etags])]}


class _Hidden:
    """A file that is written under a hidden name.

    A write or close that failed is not repeated: fsspec's file would hold the part twice, or pass for closed.
    """

    in_any_order = False

    def __init__(self, store: Store, path: str, hidden: str, part: int) -> None:
        self._store, self._path, self._hidden = store, path, hidden
        store.make_parent(hidden)
        self._file = store.ask(lambda: store.system.open(hidden, "wb", block_size=part), path)

    def put(self, number: int, data: bytes | bytearray) -> None:
        self._store.ask(lambda: self._file.write(data), self._path, repeat=False)

    def finish(self) -> None:
        self._store.ask(self._file.close, self._path, repeat=False)

    def entry(self) -> dict[str, Any]:
        return {"path": self._path, "hidden": self._hidden}


def is_pending(store: Store, entry: UploadFacts) -> bool:
    """Return whether an upload waits to be completed."""
    if "hidden" in entry:
        return store.exists(entry["hidden"])
    try:
        store.call_s3("list_parts", entry["path"], UploadId=entry["upload"], MaxParts=1)
    except FileNotFoundError:
        return False
    return True


def complete_upload(store: Store, entry: UploadFacts, since: float) -> None:
    """Put an uploaded file in its place. A file that is there already, changed at ``since`` or later, stays.

    Raises :class:`LostUpload` if there is neither, and :class:`~merging.errors.InputError`.
    """
    path = entry["path"]
    try:
        if "hidden" in entry:
            store.make_parent(path)
            store.ask(lambda: store.system.cp_file(entry["hidden"], path), path, missing=True)
            store.remove(entry["hidden"])
            return
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(entry["etags"], 1)]
        store.call_s3("complete_multipart_upload", path, UploadId=entry["upload"], MultipartUpload={"Parts": parts})
    except FileNotFoundError:  # completed by an earlier run, or by a request whose answer was lost
        if store.last_change(path) < since:
            raise LostUpload(path) from None


def abort_upload(store: Store, entry: UploadFacts) -> None:
    """Remove the parts of an upload; a hidden file is removed with its folder."""
    if "upload" in entry:
        with suppress(FileNotFoundError):
            store.call_s3("abort_multipart_upload", entry["path"], UploadId=entry["upload"])
