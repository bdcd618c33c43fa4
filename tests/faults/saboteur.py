"""Harm done to the disk under the command line: a call that fails, or the process killed in its place.

The command runs in a fork of this process, which has everything imported, so that the harm falls on the work. Only
forked processes are harmed.
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
from typing import Any

from merging import os_calls
from merging.cli.main import cli

__all__ = ["CHANGING", "ERRORS", "Ended", "Saboteur", "command"]

CHANGING = (
    "write", "pwrite", "ftruncate", "fsync", "fdatasync", "rename", "replace", "link", "mkdir",
    "unlink", "rmdir",
)  # fmt: skip
"""Functions of os that change the disk; opening for writing is caught on its own."""

FREEING = ("unlink", "rmdir")
"""What a full disk lets through."""

ERRORS = ("ENOSPC", "EIO", "kill")


class Saboteur:
    """Counts the calls that change the disk, and does harm at one of them. Lives in a forked process only.

    Without ``exchanges`` the disk cannot swap two names, as many file systems cannot.
    """

    def __init__(self, at: int | None = None, error: str = "", exchanges: bool = True) -> None:
        self.at, self.error, self.exchanges = at, error, exchanges
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def pass_by(self, name: str) -> None:
        """Note a call; raise, or kill this process, if it is its turn."""
        with self._lock:
            self.calls.append(name)
            turn = len(self.calls)
        if self.at is None:
            return
        if self.error == "kill" and turn == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error == "EIO" and turn == self.at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.error == "ENOSPC" and turn >= self.at and name not in FREEING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        """Stand between this process and the disk, for good."""
        for name in CHANGING:
            if hasattr(os, name):
                setattr(os, name, self._watched(name, getattr(os, name)))
        plain_open = os.open

        def open_watched(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.pass_by("open")
            return plain_open(path, flags, *rest, **more)

        os.open = open_watched
        io.open = builtins.open = self._stream(io.open)
        os_calls.allocate = self._watched("allocate", os_calls.allocate)
        os_calls.exchange = self._exchange(os_calls.exchange)

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **named: Any) -> Any:
            self.pass_by(name)
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
                saboteur.pass_by("write")
                return super().write(data)

        def open_stream(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return function(file, mode, *rest, **more)
            saboteur.pass_by("open")
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
