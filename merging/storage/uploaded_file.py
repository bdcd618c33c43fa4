"""A weights file that is uploaded in parts while it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from merging import os_calls
from merging.object_stores.uploads import Upload
from merging.storage.scratch import open_scratch

__all__ = ["PART", "UploadedFile", "Uploader", "part_size"]

PART = 1 << 24
"""The bytes of a part. Each thread of an :class:`Uploader` has one in memory."""

_MOST_PARTS = 9000
"""The most parts of a file; S3 allows 10,000."""

_THREADS = 4


def part_size(size: int) -> int:
    """Return the size of the parts of a file in bytes."""
    return max(PART, (size // _MOST_PARTS >> 20) + 1 << 20)


class Uploader:
    """Uploads parts in threads of its own. A thread that adds parts faster than they are uploaded waits."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "upload")
        self._places = threading.Semaphore(2 * _THREADS)
        self._error: BaseException | None = None
        self._stopped = False

    def add(self, upload: Callable[[], None]) -> Future[None]:
        """Upload something in a thread. Raises the error of an earlier upload that failed."""
        self.check()
        self._places.acquire()
        return self._threads.submit(self._run, upload)

    def _run(self, upload: Callable[[], None]) -> None:
        try:
            if self._error is None and not self._stopped:
                upload()
        except BaseException as error:
            self._error = error
        finally:
            self._places.release()

    def check(self) -> None:
        """Raise the error of an upload that failed."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the threads; parts that wait are not uploaded."""
        self._stopped = True
        self._threads.shutdown()


@dataclass(slots=True)
class _OpenPart:
    """The bytes of a part that have arrived, in a file without a name; its length, and the number of missing bytes."""

    file: IO[bytes]
    length: int
    missing: int


class UploadedFile:
    """A file in an object store whose parts are uploaded as each is complete.

    Until then a part waits on the local disk in ``scratch``. So bytes may arrive in any order, and memory stays
    bounded. As the engine works in the order of the file, few parts wait.
    """

    resumed = False

    def __init__(self, upload: Upload, uploader: Uploader, *, scratch: Path, size: int) -> None:
        self._upload, self._uploader, self._scratch, self._size = upload, uploader, scratch, size
        self._length = part_size(size)
        self._parts: dict[int, _OpenPart] = {}
        self._complete: dict[int, _OpenPart] = {}
        self._next = 0
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._uploads: list[Future[None]] = []
        if not size:
            self._uploads.append(uploader.add(partial(upload.put, 0, b"")))

    def write_at(self, data: memoryview, position: int) -> None:
        """Write bytes, and hand parts that are complete to the uploader."""
        while data:
            number, start = divmod(position, self._length)
            piece = data[: self._length - start]
            part = self._part(number)
            os_calls.write_at(part.file.fileno(), piece, start)
            with self._lock:
                part.missing -= len(piece)
                complete = not part.missing
                if complete:
                    self._complete[number] = self._parts.pop(number)
            if complete:
                in_any_order = self._upload.in_any_order
                put = partial(self._put, number) if in_any_order else self._put_in_order
                self._uploads.append(self._uploader.add(put))
            data, position = data[len(piece) :], position + len(piece)

    def _part(self, number: int) -> _OpenPart:
        with self._lock:
            if number not in self._parts:
                length = min(self._length, self._size - number * self._length)
                self._parts[number] = _OpenPart(open_scratch(self._scratch), length, length)
            return self._parts[number]

    def _put(self, number: int) -> None:
        part = self._complete.pop(number)
        content = bytearray(part.length)
        with part.file as file:
            os_calls.read_at(file.fileno(), memoryview(content), 0)
        self._upload.put(number, content)

    def _put_in_order(self) -> None:
        with self._turn:
            while self._next in self._complete:
                self._put(self._next)
                self._next += 1

    def sync(self) -> None:
        """Return when all complete parts are in the store."""
        wait(self._uploads)
        self._uploader.check()

    def close(self) -> None:
        """Forget the parts that are not complete."""
        for part in (*self._parts.values(), *self._complete.values()):
            part.file.close()
