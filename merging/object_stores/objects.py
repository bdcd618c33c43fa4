"""Objects of a store: listed with their versions, and read by ranges as long as their versions stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from merging.errors import FormatError, InputError, MergingError
from merging.object_stores.connection import ask_store, connect

__all__ = ["StoredObject", "find_object", "list_folder"]

_DEPTH = 3
"""Folders within folders that are listed: components of a pipeline, and folders in them."""

_MOST = 10_000
"""The largest number of files in a model's folder."""

_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "created", "LastModified", "last_modified", "mtime")
"""Facts of a file that change with its content, as the drivers name them, the surest first."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of a store in one state.

    Attributes:
        address: Its address.
        size: Its bytes.
        version: Its ETag, or whatever else the store changes with its content.
    """

    address: str
    size: int
    version: str

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes ``start`` to ``stop``.

        Raises:
            FormatError: The object changed since it was listed.
            InputError: The store refuses, or fails in every try.
        """
        content = self.read_unchecked(start, stop)
        self.check()
        return content

    def read_unchecked(self, start: int, stop: int) -> bytes:
        """Return the bytes ``start`` to ``stop``, as :meth:`read` does; :meth:`check` must follow."""
        system, path = connect(self.address)

        def ask() -> bytes:
            content: bytes = system.cat_file(path, start=start, end=stop)
            if len(content) != stop - start:
                self.check()  # it may have become shorter
                raise ConnectionError(f"{len(content)} of {stop - start} bytes came")
            return content

        try:
            return ask_store(ask, self.address)
        except MergingError:
            self.check()  # an object that became shorter cannot be read at these places
            raise

    def check(self) -> None:
        """Raise :class:`~merging.errors.FormatError` if the object is no longer in this state."""
        now = find_object(self.address)
        if now != self:
            raise FormatError(
                f"{self.address}: changed while it was read: it had {self.size} bytes and the ETag {self.version}, and "
                f"has {now.size} bytes and {now.version}: try again when it is complete"
            )


def list_folder(address: str, depth: int = _DEPTH) -> dict[str, StoredObject]:
    """List the files in a folder of a store, and in folders in it, by their paths within it.

    Args:
        address: The folder.
        depth: The number of levels; 1 for the files in the folder itself.

    Raises:
        InputError: There is no such folder, it holds too many files, or the store cannot be asked.
    """
    system, root = connect(address)
    found: dict[str, StoredObject] = {}
    folders = [root]
    for _ in range(depth):
        inner: list[str] = []
        for folder in folders:
            for entry in ask_store(lambda folder=folder: system.ls(folder, detail=True), address):  # type: ignore[misc]
                path = str(entry["name"])
                name = path.removeprefix(root).strip("/")
                if entry["type"] == "directory":
                    inner.append(path.rstrip("/"))
                elif name and not path.endswith("/"):  # else a marker of an empty folder, or the address is a file
                    found[name] = StoredObject(f"{address}/{name}", int(entry["size"] or 0), _version_of(entry))
            if len(found) + len(inner) > _MOST:
                raise InputError(
                    f"{address}: holds more than {_MOST:,} files and folders: name the folder of one model"
                )
        folders = inner
    if not found:
        raise InputError(f"{address}: is no folder with files: name a folder, or a file with its ending")
    return found


def find_object(address: str) -> StoredObject:
    """Return the object of an address in its present state. Raises :class:`~merging.errors.InputError`."""
    system, path = connect(address)
    info = ask_store(lambda: system.info(path), address)
    if info["type"] == "directory":
        raise InputError(f"{address}: is a folder, and should be a file")
    return StoredObject(address, int(info["size"] or 0), _version_of(info))


def _version_of(info: Mapping[str, Any]) -> str:
    stated = next((info[key] for key in _VERSIONS if info.get(key)), "")
    if isinstance(stated, datetime):  # lists and single answers may state the same moment differently
        stated = stated.timestamp()
    return str(stated).strip('"')
