"""An object store that outputs are written to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from merging.object_stores.connection import ask_store, connect, lacks_bucket

__all__ = ["Store", "open_store"]

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A file system of fsspec, and the scheme of its addresses. Requests are sent again after failures that pass.

    Methods raise :class:`~merging.errors.InputError` for the failures of a store. Paths are in the notation of the file
    system.
    """

    system: Any
    scheme: str

    @property
    def has_multipart(self) -> bool:
        """Whether the store has the multipart uploads of S3."""
        return self.scheme in ("s3", "s3a")

    def address(self, path: str) -> str:
        """Return the address of a path."""
        return f"{self.scheme}://{path.lstrip('/')}"

    def ask(self, request: Callable[[], T], path: str, missing: bool = False, repeat: bool = True) -> T:
        """Return the result of a request, which is sent once if it must not ``repeat``.

        With ``missing``, a missing file is a FileNotFoundError.
        """
        absent: list[FileNotFoundError] = []

        def ask() -> T | None:
            try:
                return request()
            except FileNotFoundError as error:
                if not missing or lacks_bucket(error):
                    raise
                absent.append(error)
                return None

        answer = ask_store(ask, self.address(path), repeat)
        if absent:
            raise absent[0]
        return answer  # type: ignore[return-value]

    def call_s3(self, method: str, path: str, **values: Any) -> dict[str, Any]:
        """Call a method of S3 on a path. Raises FileNotFoundError for an upload that is not there."""
        bucket, key, _ = self.system.split_path(path)
        missing = method != "create_multipart_upload"
        return self.ask(lambda: self.system.call_s3(method, Bucket=bucket, Key=key, **values), path, missing)

    def exists(self, path: str) -> bool:
        """Return whether a file or folder is there."""
        return bool(self.ask(lambda: self.system.exists(path), path))

    def last_change(self, path: str) -> float:
        """Return the time of a file's last change in seconds since 1970, by the store's clock; 0 without a file."""
        try:
            return float(self.ask(lambda: self.system.modified(path).timestamp(), path, missing=True))
        except FileNotFoundError:
            return 0.0

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; none if it is missing."""
        try:
            found = self.ask(lambda: self.system.ls(folder, detail=False), folder, missing=True)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def files(self, path: str) -> dict[str, int]:
        """Return the sizes of all files below a path, or of the file itself, by path."""
        try:
            found = self.ask(lambda: self.system.find(path, detail=True), path, missing=True)
        except FileNotFoundError:
            return {}
        return {name: int(facts["size"] or 0) for name, facts in found.items()}

    def state(self, path: str) -> str | None:
        """Return a text that changes whenever a file at a path changes; None if there is none."""
        try:
            found = self.ask(lambda: self.system.find(path, detail=True), path, missing=True)
        except FileNotFoundError:
            return None
        return repr(sorted(found.items())) if found else None

    def read(self, path: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError."""
        return bytes(self.ask(lambda: self.system.cat_file(path), path, missing=True))

    def write(self, path: str, content: bytes) -> None:
        """Write a small file."""
        self.make_parent(path)
        self.ask(lambda: self.system.pipe_file(path, content), path)

    def make_parent(self, path: str) -> None:
        """Make the folder of a file, where a store has folders."""
        if not self.has_multipart:
            self.ask(lambda: self.system.makedirs(path.rpartition("/")[0], exist_ok=True), path)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.ask(lambda: self.system.rm_file(path), path, missing=True)

    def remove_folder(self, path: str) -> None:
        """Remove all files below a path."""
        for file in self.files(path):
            self.remove(file)
        if not self.has_multipart:
            with suppress(FileNotFoundError):
                self.ask(lambda: self.system.rm(path, recursive=True), path, missing=True)


def open_store(address: str) -> tuple[Store, str]:
    """Return the store of an address, and the path there. Raises :class:`~merging.errors.InputError`."""
    system, path = connect(address)
    return Store(system, address.partition("://")[0]), path
