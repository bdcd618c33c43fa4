"""Outputs in object stores: uploaded while they are made, and completed when all of it is in the store.

Weights go into the store part by part; small files wait in a local folder until the end. No reader sees any of it
before :meth:`StoreOutput.commit`, whose order leaves no moment in which old and new files are there together."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from merging import os_calls
from merging.errors import MergingError, OutputError
from merging.object_stores.store import open_store
from merging.object_stores.store_path import StorePath
from merging.object_stores.upload_record import UploadRecord, new_record
from merging.object_stores.uploads import LostUpload, Upload, begin_upload
from merging.storage.leftovers import OUT, SCRATCH, Identity, create_partial, find_abandoned
from merging.storage.locks import FolderLock
from merging.storage.output_file import CreateFile, LocalFile, OutputFile
from merging.storage.replacing import destination_error
from merging.storage.staging import StagedOutput
from merging.storage.store_destination import check_replaced_objects, settle_records
from merging.storage.uploaded_file import UploadedFile, Uploader, part_size

__all__ = ["StoreOutput", "file_creator", "stage_output"]

_BLOCK = 1 << 22


class StoreOutput:
    """An output in an object store that is being made; used like :class:`~merging.storage.staging.StagedOutput`.

    Attributes:
        folder: A local folder for the files that go with the weights.
        scratch: A local folder for temporary files.
        journal: None: a merge into a store begins from the start.
        notices: Remarks on files that could not be removed.
    """

    journal = None

    def __init__(self, destination: StorePath, overwrite: bool, file: bool) -> None:
        self.destination, self.overwrite, self.file = destination, overwrite, file
        self.notices: list[str] = []
        self._store, self._path = open_store(str(destination))
        self._uploader = Uploader()
        self._uploads: list[Upload] = []
        self._files: list[UploadedFile] = []
        self._lock: FolderLock | None = None
        self._record: UploadRecord | None = None

    def __enter__(self) -> StoreOutput:
        settle_records(self._store, self._path)
        local = Path(tempfile.gettempdir(), "merging-output")  # a name in a store may be too long for a disk
        with os_calls.delay_signals():
            for abandoned in find_abandoned(local):
                with suppress(OSError):
                    abandoned.remove_folder()
            held, self._lock = create_partial(local)
            self.folder, self.scratch = held / OUT, held / SCRATCH
            self.folder.mkdir()
            self.scratch.mkdir()
            try:
                record = new_record(self._store, self._path)
                record.save()
                self._record = replace(record, begun=self._store.last_change(record.path))
            except BaseException:
                self._clean_up()
                raise
        return self

    def clear(self) -> None:
        """Do nothing: no former run left anything here."""

    def create_file(self, path: Path, header: bytes, size: int, resume: bool = False) -> OutputFile:
        """Begin the upload of a file of the local folder, which is not made there.

        Raises :class:`~merging.errors.InputError`.
        """
        file = self._begin(path, size)
        file.write_at(memoryview(header), 0)
        return file

    def _begin(self, path: Path, size: int) -> UploadedFile:
        assert self._record is not None
        inside = path.relative_to(self.folder).as_posix()
        target = self._path if self.file else f"{self._path}/{inside}"
        self._record = replace(self._record, uploads=(*self._record.uploads, {"path": target}))
        self._record.save()
        upload = begin_upload(self._store, target, f"{self._record.folder}/{inside}", part_size(size))
        self._uploads.append(upload)
        self._record = replace(self._record, uploads=tuple(each.entry() for each in self._uploads))
        file = UploadedFile(upload, self._uploader, scratch=self.scratch, size=size)
        self._files.append(file)
        return file

    def commit(self) -> None:
        """Upload the small files, and put the output in place. Signals wait until it is in place.

        Raises :class:`~merging.errors.MergingError`.
        """
        assert self._record is not None
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                self._upload_local(path)
        self._uploader.check()
        for upload in self._uploads:
            upload.finish()
        with os_calls.delay_signals():
            old = self._store.files(self._path)
            if old and not self.overwrite:
                raise destination_error(self.destination, "was created by someone else meanwhile")
            check_replaced_objects(self.destination, self._store, self._path)
            entries = tuple(each.entry() for each in self._uploads)
            whole = replace(self._record, uploads=entries, old=tuple(old), whole=True)
            whole.save()
            self._record = None  # the output is complete, and no longer given up
            try:
                whole.put_in_place()
            except LostUpload as error:
                raise OutputError(
                    f"{self.destination}: the store lost the parts of {error}: repeat the merge"
                ) from None
            except MergingError as error:
                _leave(whole)
                raise OutputError(
                    f"{self.destination}: is in the store, and not yet in place: `merge clean {self.destination} "
                    f"--remove` puts it there ({error})"
                ) from None
            self._clean_up()

    def _upload_local(self, path: Path) -> None:
        size = path.stat().st_size
        file = self._begin(path, size)
        with os.fdopen(os_calls.open_regular(path), "rb") as stream:
            position = 0
            while block := stream.read(_BLOCK):
                file.write_at(memoryview(block), position)
                position += len(block)
        file.sync()
        file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with os_calls.delay_signals():
            self._clean_up()
        if isinstance(error, OSError):
            raise OutputError(f"{self.destination}: cannot be written: {error.strerror or error}") from None
        if isinstance(error, MergingError) and self.notices:
            error.args = (f"{error}; {'; '.join(self.notices)}",)

    def _clean_up(self) -> None:
        """Abort all uploads, unless the output is complete, and remove the local folder."""
        self._uploader.close()
        for file in self._files:
            file.close()
        if self._lock is not None:
            try:
                self._lock.remove_folder()
            except OSError as error:
                self.notices.append(f"the temporary folder {self._lock.folder} could not be removed ({error.strerror})")
            self._lock.release()
        self._lock = None
        if self._record is not None:
            try:
                self._record.abort()
            except MergingError as error:
                _leave(self._record)
                self.notices.append(
                    f"unfinished uploads stay in the store: `merge clean {self.destination} --remove` removes them "
                    f"({error})"
                )
        self._record = None


def _leave(record: UploadRecord) -> None:
    """Note that no process works on an output any more, as far as the store can be reached."""
    with suppress(MergingError):
        replace(record, owner={}).save()


def stage_output(
    destination: Path, overwrite: bool, file: bool, identity: Identity | None = None
) -> StagedOutput | StoreOutput:
    """Return an output that is being made, on the local disk or in an object store.

    Args:
        destination: Where the output is put in place.
        overwrite: Whether an existing output is replaced.
        file: Whether it is a single file.
        identity: All that decides the output's bytes, for an output on the local disk that can be resumed.
    """
    if isinstance(destination, StorePath):
        return StoreOutput(destination, overwrite, file)
    return StagedOutput(destination, overwrite, file, identity)


def file_creator(staged: StagedOutput | StoreOutput) -> CreateFile:
    """Return how the weights files of an output are created."""
    return staged.create_file if isinstance(staged, StoreOutput) else LocalFile
