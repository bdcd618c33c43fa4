"""The record of an output's uploads, in the store: from it another process completes or aborts them.

It is in a hidden folder ``.NAME.*.partial`` next to the output, as the hidden folders of local outputs. While uploads
are under way it lists them. Once all are whole it says so: from then on the output is put in place by whoever finds it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merging.object_stores.store import Store
from merging.object_stores.uploads import UploadFacts, abort_upload, complete_upload, is_pending

__all__ = ["UploadRecord", "find_records", "new_record"]

_FILE = "uploads.json"

_HIDDEN = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.partial")

_ENTRIES = ("config.json", "adapter_config.json", "model_index.json")
"""The files from which programs begin to read a folder; the last one lists the components of a pipeline."""


@dataclass(frozen=True, kw_only=True)
class UploadRecord:
    """The uploads of one output.

    Attributes:
        store: the store.
        folder: the hidden folder.
        output: the path of the output.
        uploads: all that completes each upload; of uploads that are about to begin, the path alone.
        old: the files of the output that is replaced.
        whole: whether all files are uploaded, so that the output is to be put in place.
        owner: the machine, process and time of its start.
        begun: the time before the first upload, by the store's clock; 0 where it is not known.
    """

    store: Store = field(compare=False)
    folder: str
    output: str
    uploads: tuple[UploadFacts, ...] = ()
    old: tuple[str, ...] = ()
    whole: bool = False
    owner: Mapping[str, Any] = field(default_factory=dict)
    begun: float = 0.0

    @property
    def path(self) -> str:
        """The path of the record."""
        return f"{self.folder}/{_FILE}"

    def save(self) -> None:
        """Write the record into the store. Raises :class:`~merging.errors.InputError`."""
        names = ("uploads", "old", "whole", "owner", "begun")
        facts = {name: getattr(self, name) for name in names}
        self.store.write(self.path, json.dumps(facts).encode())

    def put_in_place(self) -> None:
        """Complete the uploads of a whole output, in an order in which no reader finds old and new files together.

        The files from which programs begin to read go first, then weights come, and those files come last. It can be
        called again after a kill at any moment.

        Raises:
            LostUpload: The parts of a file are gone.
            InputError: The store fails.
        """
        # the time of a file of S3 is the time when its upload began, and not when it was completed
        since = self.begun or self.store.last_change(self.path)
        uploads = sorted(self.uploads, key=lambda each: _turn(each["path"]))
        new = {each["path"] for each in uploads}
        if is_pending(self.store, uploads[0]):
            for path in self.old:
                if _turn(path) > 1:
                    self.store.remove(path)
        bodies = [each for each in uploads if _turn(each["path"]) <= 1]
        for each in bodies:
            complete_upload(self.store, each, since)
        for path in self.old:
            if path not in new:
                self.store.remove(path)
        for each in uploads[len(bodies) :]:
            complete_upload(self.store, each, since)
        self.store.remove_folder(self.folder)

    def abort(self) -> None:
        """Abort all uploads, and remove the record. Raises :class:`~merging.errors.InputError`."""
        for each in (*self.uploads, *self._uploads_by_path()):
            abort_upload(self.store, each)
        self.store.remove_folder(self.folder)

    def bytes_waiting(self) -> int:
        """Return the bytes that wait in the store."""
        total = sum(self.store.files(self.folder).values())
        known = [each for each in self.uploads if "upload" in each]
        for each in (*known, *self._uploads_by_path()):
            total += sum(part["Size"] for part in self._parts(each))
        return total

    def is_alive(self) -> bool:
        """Return whether the process that writes the output runs on this machine."""
        pid = self.owner.get("pid")
        if self.owner.get("host") != socket.gethostname() or not isinstance(pid, int):
            return False
        start = _start_of(pid)
        return start is not None and start == self.owner.get("start")

    def _parts(self, entry: UploadFacts) -> Iterator[Mapping[str, Any]]:
        after = 0
        while True:
            try:
                page = self.store.call_s3("list_parts", entry["path"], UploadId=entry["upload"], PartNumberMarker=after)
            except FileNotFoundError:
                return
            yield from page.get("Parts", ())
            if not page.get("IsTruncated"):
                return
            after = page["NextPartNumberMarker"]

    def _uploads_by_path(self) -> list[UploadFacts]:
        """Return the uploads whose path alone is in the record, since a kill came before more was written down.

        Uploads of a path that another run has in its record too may be its own, and are left to it.
        """
        paths = {each["path"] for each in self.uploads if not {"upload", "hidden"} & {*each}}
        if not (paths and self.store.has_multipart):
            return []
        for record in find_records(self.store, self.output):
            if record.folder != self.folder:
                paths -= {each["path"] for each in record.uploads}
        bucket, _, key = self.output.partition("/")
        listed = self.store.call_s3("list_multipart_uploads", self.output, Prefix=key).get("Uploads", ())
        found = [{"path": f"{bucket}/{each['Key']}", "upload": each["UploadId"]} for each in listed]
        return [each for each in found if each["path"] in paths]

    def is_valid(self) -> bool:
        """Return whether it names nothing but files of its output, as anybody with access could have written it."""
        if not all(isinstance(each, dict) for each in self.uploads):
            return False
        paths = [*(each.get("path") for each in self.uploads), *self.old]
        hidden = [each["hidden"] for each in self.uploads if "hidden" in each]
        if self.whole and not (self.uploads and all({"upload", "hidden"} & {*each} for each in self.uploads)):
            return False
        return all(_is_within(each, self.output) for each in paths) and all(
            _is_within(each, self.folder) for each in hidden
        )


def new_record(store: Store, output: str) -> UploadRecord:
    """Return the record of an output whose uploads are to begin; it is not in the store yet."""
    parent, _, name = output.rpartition("/")
    token, pid = secrets.token_hex(4), os.getpid()
    owner = {"host": socket.gethostname(), "pid": pid, "start": _start_of(pid)}
    return UploadRecord(store=store, folder=f"{parent}/.{name}.{token}.partial", output=output, owner=owner)


def find_records(store: Store, path: str, inside: bool = False) -> list[UploadRecord]:
    """Return the records of an output, or with ``inside`` of all outputs in a folder.

    Raises :class:`~merging.errors.InputError`.
    """
    parent, _, wanted = path.rpartition("/")
    folder = path if inside else parent
    found = []
    for name in sorted(store.names(folder)):
        match = _HIDDEN.fullmatch(name)
        if match is None or not (inside or match["name"] == wanted):
            continue
        record = UploadRecord(store=store, folder=f"{folder}/{name}", output=f"{folder}/{match['name']}")
        try:
            facts = json.loads(store.read(record.path))
            record = replace(
                record,
                uploads=tuple(facts["uploads"]),
                old=tuple(facts["old"]),
                whole=facts["whole"] is True,
                owner=dict(facts["owner"]),
                begun=float(facts.get("begun", 0)),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
        if record.is_valid():
            found.append(record)
    return found


def _is_within(path: object, place: str) -> bool:
    """Return whether a path is a place or in it."""
    if not isinstance(path, str) or ".." in path.split("/"):
        return False
    return path == place or path.startswith(f"{place}/")


def _turn(path: str) -> int:
    """Return when a file is put in place: weights first, then others, and last the files that readers begin from."""
    name = path.rpartition("/")[2]
    if name in _ENTRIES:
        return 3 + _ENTRIES.index(name) // 2
    if name.endswith(".index.json"):
        return 2
    return 0 if name.endswith((".safetensors", ".gguf")) else 1


def _start_of(pid: int) -> str | None:
    """Return when a process of this machine started, in the system's own count; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        if sys.platform in ("linux", "win32"):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user
        pass
    return ""
