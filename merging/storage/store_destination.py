"""Checks of addresses that an output is written to, and the end of outputs that killed runs left there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from merging.errors import MergingError, OutputError, option
from merging.object_stores.address import DRIVERS
from merging.object_stores.connection import connect
from merging.object_stores.store import Store, open_store
from merging.object_stores.store_path import StorePath
from merging.object_stores.upload_record import UploadRecord, find_records
from merging.object_stores.uploads import LostUpload
from merging.sources.model_files import PIPELINE
from merging.storage.replacing import check_replaced, destination_error

__all__ = [
    "StoreLeftover",
    "check_replaced_objects",
    "check_store_destination",
    "find_store_leftovers",
    "settle_records",
]


_MOST_FILES = 2000
"""The most names that are looked at in an output that is to be replaced; no model has as many files."""


def check_store_destination(destination: StorePath, inputs: Iterable[Path], overwrite: bool, dry: bool) -> str:
    """Refuse an address that exists (unless it may be overwritten), holds an input, or names only a bucket.

    Outputs of killed runs are put in place if they are complete, and removed if not; with ``dry`` they stay. Returns a
    remark on a destination that exists, if ``dry``. Raises :class:`~merging.errors.MergingError`.
    """
    store, path = open_store(str(destination))
    if "/" not in path.strip("/"):
        raise destination_error(destination, "is a whole bucket: name a folder or file in it")
    if not dry:
        settle_records(store, path)
    existing = bool(store.files(path))
    for address in inputs:
        if isinstance(address, StorePath) and _replaces(destination, address, existing):
            raise destination_error(destination, f"the output would replace the input {address}")
    if existing and not overwrite:
        if not dry:
            raise destination_error(destination, "exists already", f", or use {option('overwrite', True)}")
        return (
            f"{destination} exists already: the merge needs another {option('output')}, or {option('overwrite', True)}"
        )
    check_replaced_objects(destination, store, path)
    return ""


def _replaces(destination: StorePath, address: StorePath, existing: bool) -> bool:
    """Return whether an output takes the place of an input, of a folder around it, or of files that exist in it."""
    schemes = (str(each).partition("://")[0] for each in (destination, address))
    if len({DRIVERS[scheme].package for scheme in schemes}) > 1:
        return False
    output, read = (f"{connect(str(each))[1].strip('/')}/" for each in (destination, address))
    return read.startswith(output) or (existing and output.startswith(read))


def check_replaced_objects(destination: StorePath, store: Store, path: str) -> None:
    """Refuse to replace anything but a file by a file, and the folder of one model by a folder.

    The names in the store decide, as :func:`~merging.storage.replacing.check_replaced` does for local names. Raises
    :class:`~merging.errors.OutputError`.
    """
    with tempfile.TemporaryDirectory(prefix="merging-") as root:
        mirror = Path(root, destination.name)
        for file in islice(store.files(path), _MOST_FILES):
            inside = file[len(path) :].strip("/")
            if {"", ".", ".."} & {*inside.split("/")} and inside:
                raise destination_error(destination, f"holds {inside}, which no model has")
            place = mirror / inside if inside else mirror
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(store.read(file) if inside == PIPELINE else b"")
        try:
            check_replaced(mirror, mirror)
        except OutputError as error:
            raise OutputError(str(error).replace(str(mirror), str(destination))) from None


def settle_records(store: Store, path: str) -> None:
    """Put outputs in place that killed runs had completed, and remove the uploads of others.

    Raises :class:`~merging.errors.MergingError`.
    """
    for record in find_records(store, path):
        if record.is_alive():
            continue
        if record.whole:
            try:
                record.put_in_place()
                continue
            except LostUpload:
                pass
        record.abort()


class StoreLeftover:
    """The uploads of a killed run, like :class:`~merging.storage.leftovers.Leftover`.

    Attributes:
        path: the address of the record of the uploads.
        output: the address of the run's output.
        bytes: the size of the parts in the store.
        modified: the time of the last change, in seconds since 1970.
        whole: whether the output is complete, and is put in place.
    """

    resumable = holds_old = False

    def __init__(self, record: UploadRecord) -> None:
        self._record = record
        store = record.store
        self.path, self.output = store.address(record.folder), store.address(record.output)
        self.bytes, self.modified, self.whole = record.bytes_waiting(), store.last_change(record.path), record.whole

    def to_dict(self) -> dict[str, object]:
        """Return the same in plain values."""
        names = ("path", "output", "bytes", "modified", "resumable", "holds_old", "whole")
        return {name: getattr(self, name) for name in names}

    def remove(self) -> None:
        """Abort the uploads, or put a complete output in place. Raises :class:`~merging.errors.OutputError`."""
        try:
            if self.whole:
                return self._record.put_in_place()
            return self._record.abort()
        except LostUpload:
            self._record.abort()
            raise OutputError(f"{self.output}: parts of it are gone from the store: repeat the merge") from None
        except MergingError as error:
            raise OutputError(f"{self.path}: cannot be removed: {error}") from None


def find_store_leftovers(address: str) -> list[StoreLeftover]:
    """Return what killed runs left of an output in a store, and of the outputs in it, if it is a folder of outputs.

    Runs that live on this machine are not among it. Raises :class:`~merging.errors.InputError`.
    """
    store, path = open_store(address)
    records = find_records(store, path, inside=True)
    if "/" in path.strip("/"):
        records = [*find_records(store, path), *records]
    return [StoreLeftover(record) for record in records if not record.is_alive()]
