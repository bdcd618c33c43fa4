"""What goes wrong on purpose: refused requests, and bodies that are cut off, damaged or slow."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from refusals import BadRequest, Refusal

__all__ = ["Faults", "Lost"]


class Lost(Exception):
    """The connection is to be closed here and now."""


@dataclass
class _Fault:
    """Something that befalls the requests whose "METHOD /path" the pattern is found in."""

    pattern: str


@dataclass
class _Failure(_Fault):
    """The statuses answer one request each, until there are none left."""

    statuses: list[int]
    retry_after: int | None = None


@dataclass
class _Delay(_Fault):
    """Seconds that pass before the request is looked at."""

    seconds: float


@dataclass
class _Throttle(_Fault):
    bytes_per_second: int


@dataclass
class _Rare(_Fault):
    """Happens so many times, and then no more."""

    times: int


@dataclass
class _Cut(_Rare):
    """The connection is closed after so many bytes of a body that has more."""

    after: int


@dataclass
class _Corruption(_Rare):
    """The byte at this place of a file (counted from its end if negative) has its bits turned around."""

    offset: int


_KINDS: dict[str, type[_Fault]] = {
    "fail": _Failure,
    "delay": _Delay,
    "throttle": _Throttle,
    "cut": _Cut,
    "corrupt": _Corruption,
}

AnyFault = TypeVar("AnyFault", bound=_Fault)


class Faults:
    """The faults that wait for their requests, oldest first."""

    def __init__(self) -> None:
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def add(self, kind: str, **fields: Any) -> None:
        if kind not in _KINDS:
            raise BadRequest(f"no fault is called {kind}")
        re.compile(fields["pattern"])
        with self._lock:
            self._faults.append(_KINDS[kind](**fields))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def meet(self, request: str) -> None:
        """What befalls a request as it comes in: it waits, it is refused."""
        with self._lock:
            seconds = sum(delay.seconds for delay in self._of(_Delay, request))
            statuses = next((fault for fault in self._of(_Failure, request) if fault.statuses), None)
            status = statuses.statuses.pop(0) if statuses else None
        time.sleep(seconds)
        if statuses and status:
            wait = statuses.retry_after
            raise Refusal(status, "injected by the test", headers={} if wait is None else {"Retry-After": str(wait)})

    def body(self, request: str, pieces: Iterable[bytes], start: int, end: int, size: int) -> Iterator[bytes]:
        """What comes through of the bytes from `start` to `end` of a file of `size` bytes.

        Raises:
            Lost: where the body is cut off.
        """
        with self._lock:
            cut = next(
                (cut.after for cut in self._of(_Cut, request) if self._happens(cut, end - start > cut.after)), None
            )
            places = ((fault, fault.offset % size) for fault in self._of(_Corruption, request) if size)
            bad = [place for fault, place in places if self._happens(fault, start <= place < end)]
            rate = min((throttle.bytes_per_second for throttle in self._of(_Throttle, request)), default=None)
        pieces = _corrupted(pieces, start, bad)
        pieces = pieces if cut is None else _cut(pieces, cut)
        return iter(pieces) if rate is None else _throttled(pieces, rate)

    def _of(self, kind: type[AnyFault], request: str) -> list[AnyFault]:
        return [fault for fault in self._faults if isinstance(fault, kind) and re.search(fault.pattern, request)]

    @staticmethod
    def _happens(fault: _Rare, applies: bool) -> bool:
        if applies and fault.times > 0:
            fault.times -= 1
            return True
        return False


def _corrupted(pieces: Iterable[bytes], start: int, places: list[int]) -> Iterator[bytes]:
    for piece in pieces:
        damaged = bytearray(piece)
        for place in places:
            if start <= place < start + len(piece):
                damaged[place - start] ^= 0xFF
        start += len(piece)
        yield bytes(damaged)


def _cut(pieces: Iterable[bytes], after: int) -> Iterator[bytes]:
    for piece in pieces:
        if len(piece) > after:
            if after:
                yield piece[:after]
            raise Lost
        after -= len(piece)
        yield piece


def _throttled(pieces: Iterable[bytes], rate: int) -> Iterator[bytes]:
    """Twenty small pieces a second."""
    step = max(1, rate // 20)
    for piece in pieces:
        for at in range(0, len(piece), step):
            part = piece[at : at + step]
            time.sleep(len(part) / rate)
            yield part
