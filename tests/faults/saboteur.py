"""Harm done to the disk under the command line: a call that fails, or the process killed in its place.

The command runs in a fork of this process, which has everything imported, so that the harm falls on the work. Only
forked processes are harmed. A kill in the place of a write leaves half of it. A power cut is a kill after which all
bytes that no fsync confirmed are zeros.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.cli.main import cli

__all__ = ["CHANGING", "ERRORS", "READING", "Ended", "Saboteur", "command", "errors_at"]

CHANGING = (
    "write", "pwrite", "ftruncate", "fsync", "fdatasync", "rename", "replace", "link", "mkdir",
    "unlink", "rmdir",
)  # fmt: skip
"""Functions of os that change the disk; opening for writing is caught on its own."""

READING = ("preadv", "readlink", "scandir", "listdir")
"""Functions of os that read the disk; opening for reading is caught on its own."""

FREEING = ("unlink", "rmdir")
"""What a full disk lets through."""

ERRORS = ("ENOSPC", "EIO", "kill")

FULL, LASTING, ONCE, DEADLY = ("ENOSPC", "EDQUOT"), ("EROFS",), ("EIO", "EMFILE", "EINTR"), ("kill", "power cut")
"""Errors of a full disk, of a disk that takes no change from then on, and of one call; ends of a process."""

_TO_READ = "open to read"


def errors_at(call: str) -> tuple[str, ...]:
    """The errors that a call may have, and the ends that a process may find there."""
    opens = ("EMFILE",) if call in ("open", _TO_READ, "scandir", "listdir") else ()
    if call in (*READING, _TO_READ):
        return ("EIO", "EINTR", *opens, *DEADLY)
    return ("EIO", "EINTR", *opens, *LASTING, *(() if call in FREEING else FULL), *DEADLY)


class Saboteur:
    """Counts the calls that change the disk, and does harm at one of them. Lives in a forked process only.

    Without ``exchanges`` the disk cannot swap two names, as many file systems cannot. With ``reads``, calls that read
    files in this folder count too.
    """

    def __init__(
        self, at: int | None = None, error: str = "", exchanges: bool = True, reads: Path | None = None
    ) -> None:
        self.at, self.error, self.exchanges, self.reads = at, error, exchanges, reads
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._unsure: dict[tuple[int, int], tuple[int, list[tuple[int, int]]]] = {}
        self._pwrite, self._fsync = os.pwrite, os.fsync

    def pass_by(self, name: str, fd: int = -1, data: Any = b"", offset: int = 0, path: Any = None) -> None:
        """Note a call, which may write data or take a path; raise, or kill this process, if it is its turn."""
        with self._lock:
            self.calls.append(name)
            turn = len(self.calls)
        if self.at is None or turn < self.at:
            return
        if self.error in DEADLY and turn == self.at:
            self._die(fd, data, offset)
        if (
            (self.error in ONCE and turn == self.at)
            or (self.error in FULL and name not in (*FREEING, *READING, _TO_READ))
            or (self.error in LASTING and name not in (*READING, _TO_READ))
        ):
            number = getattr(errno, self.error)
            raise OSError(number, os.strerror(number), path)

    def _die(self, fd: int, data: Any, offset: int) -> None:
        if fd >= 0:
            self._pwrite(fd, bytes(data)[: len(data) // 2], offset)
        if self.error == "power cut":
            for copy, ranges in self._unsure.values():
                for start, length in ranges:
                    self._pwrite(copy, bytes(length), start)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrote(self, fd: int, offset: int, length: int) -> None:
        """Remember bytes that no fsync has confirmed, if there may be a power cut."""
        if self.error != "power cut":
            return
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino
        with self._lock:
            if key not in self._unsure:
                self._unsure[key] = os.dup(fd), []
            self._unsure[key][1].append((offset, length))

    def _confirm(self, fd: int) -> None:
        """Make a file's bytes durable, those that were written before."""
        status = os.fstat(fd)
        ranges = self._unsure.get((status.st_dev, status.st_ino), (-1, []))[1]
        before = len(ranges)
        self._fsync(fd)
        del ranges[:before]

    def install(self) -> None:
        """Stand between this process and the disk, for good."""
        os.fsync = os.fdatasync = self._confirm
        for name in (*CHANGING, *(READING if self.reads else ())):
            if hasattr(os, name):
                setattr(os, name, self._watched(name, getattr(os, name)))
        plain_open = os.open

        def open_watched(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.pass_by("open", path=path)
            elif self._is_watched(path):
                self.pass_by(_TO_READ, path=path)
            return plain_open(path, flags, *rest, **more)

        def pwrite(fd: int, data: Any, offset: int) -> int:
            self.pass_by("pwrite", fd, data, offset)
            written = self._pwrite(fd, data, offset)
            self.wrote(fd, offset, written)
            return written

        os.open, os.pwrite = open_watched, pwrite
        io.open = builtins.open = self._stream(io.open)
        os_calls.allocate = self._watched("allocate", os_calls.allocate)
        os_calls.exchange = self._exchange(os_calls.exchange)

    def _is_watched(self, path: Any) -> bool:
        """Whether reads of a file or folder count."""
        return self.reads is not None and isinstance(path, str | Path) and self.reads in Path(path).parents

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **named: Any) -> Any:
            self.pass_by(name, path=args[0] if args and isinstance(args[0], str | Path) else None)
            return function(*args, **named)

        return watched

    def _exchange(self, function: Callable[..., bool]) -> Callable[..., bool]:
        """`renameat2` is called by C, and its failure is an answer."""

        def exchange(*args: Any) -> bool:
            if not self.exchanges:
                return False
            try:
                self.pass_by("exchange")
            except OSError:
                return False
            return function(*args)

        return exchange

    def _stream(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`open`, whose buffers are written by C behind our back: here each write of one passes by as well."""
        saboteur = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                offset = self.tell()
                saboteur.pass_by("write", self.fileno(), data, offset)
                written = super().write(data)
                saboteur.wrote(self.fileno(), offset, written)
                return written

        def open_stream(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                if saboteur._is_watched(file):
                    saboteur.pass_by(_TO_READ, path=file)
                return function(file, mode, *rest, **more)
            saboteur.pass_by("open", path=file)
            if "opener" in more or "+" in mode:  # a file without a name, which is only written by pwrite
                return function(file, mode, *rest, **more)
            buffered = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
            return buffered if "b" in mode else io.TextIOWrapper(buffered, more.get("encoding"), write_through=False)

        return open_stream


@dataclass(frozen=True, slots=True)
class Ended:
    """How a forked process came to its end: its exit code (None: killed), what it said, the calls it made."""

    code: int | None
    said: str
    calls: list[str]
    seconds: float


def command(words: Sequence[str], saboteur: Saboteur | None = None, kill_after: float | None = None) -> Ended:
    """Run `merge` with these words in a fork of this process, which is killed after so many seconds."""
    reading, writing = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        _be_command(words, saboteur or Saboteur(), writing)
    os.close(writing)
    if kill_after is not None:
        time.sleep(max(0.0, kill_after - (time.perf_counter() - began)))
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - began
    if os.WIFSIGNALED(status) or not answer:
        return Ended(None, "", [], seconds)
    return Ended(*pickle.loads(answer), seconds)


def _be_command(words: Sequence[str], saboteur: Saboteur, answers: int) -> None:
    """What the forked process does; never returns."""
    write = os.write
    sys.stdout = sys.stderr = said = io.StringIO()
    code: Any = 0
    try:
        saboteur.install()
        cli.main(list(words))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 70
        said.write(traceback.format_exc())
    answer = pickle.dumps((code, said.getvalue(), saboteur.calls))
    while answer:
        answer = answer[write(answers, answer) :]
    os._exit(0)
