"""What an input may do to the process that reads it, and how anything else is caught and told."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from merging.errors import MergingError

__all__ = ["Finding", "Guard"]

SECONDS, PATIENCE = 5, 120
"""Most seconds of a core, and of the clock, that an input of some kilobytes may take."""

MEMORY = 800_000_000
"""Most bytes that it may ask for at once, above what the process has; threads of malloc's own take some."""

LONGEST = 10_000
"""Characters of a message that a person may be asked to read."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime",
}  # fmt: skip
_FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not have happened: what, where in the project, an example of it, and the whole story."""

    what: str
    where: str = ""
    example: str = ""
    story: str = ""


class _Hang(BaseException):
    """Raised by the alarm; no handler of errors catches it."""


class Guard:
    """Runs inputs one after the other in this process, each within limits. Belongs into a process of its own."""

    def __init__(self) -> None:
        self._within: str | None = None
        self._outside: str | None = None
        sys.addaudithook(self._audit)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _hangs)

    def judge(self, read: Callable[[], object], output: Path) -> Finding | None:
        """Read one input, which may write below ``output``; what it does that it must not, if anything."""
        self._outside, self._within = None, os.path.realpath(output)
        _limit_memory()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        found: Finding | None = None
        try:
            read()
        except MergingError as error:
            found = _judged(error)
        except _Hang as error:
            found = _told(f"takes more than {SECONDS} s", error)
        except BaseException as error:
            found = _told(type(error).__name__, error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._within = None
        if self._outside is not None and found is None:
            found = Finding(self._outside.partition(":")[0], "", self._outside, self._outside)
        return found

    def _audit(self, event: str, facts: tuple[Any, ...]) -> None:
        if self._within is None:
            return
        if event in _FORBIDDEN:
            self._outside = f"does {event}"
        elif event == "open" and isinstance(facts[2], int) and facts[2] & _WRITING:
            if not isinstance(facts[0], int) and Path(os.fsdecode(facts[0])).is_absolute():
                self._check(event, facts[0], -1)  # what is relative may be so to an open folder, which is not told
        elif event in _CHANGING:
            folder = facts[-1] if isinstance(facts[-1], int) else -1
            for path in facts[:2] if event in ("os.rename", "os.link") else facts[:1]:
                self._check(event, path, folder)

    def _check(self, event: str, path: Any, folder: int) -> None:
        if isinstance(path, int) or path is None or not self._within:
            return
        above = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path()
        real = os.path.realpath(above / os.fsdecode(path))
        if real not in ("/dev/null", self._within) and not real.startswith(self._within + os.sep):
            self._outside = f"{event} outside of its output: {real}"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def _hangs(number: int, frame: FrameType | None) -> NoReturn:
    raise _Hang(signal.Signals(number).name)


def _judged(error: MergingError) -> Finding | None:
    """A refusal must be one that can be printed and read."""
    message = str(error)
    if not message.strip():
        return _told("a refusal without a message", error)
    if len(message) > LONGEST:
        return _told("a message that is too long to be read", error)
    if not message.isprintable() and not message.replace("\n", "").isprintable():
        return _told("a message that cannot be printed", error)
    return None


def _told(what: str, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}merging{os.sep}" in f.filename]
    last = (ours or frames)[-1]
    where = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno}"
    story = "".join(traceback.format_exception(error))
    return Finding(what, where, str(error)[:200], story[-6000:])
