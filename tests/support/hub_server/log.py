"""The requests that came in, as a test may ask for them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

__all__ = ["Entry", "Log"]


@dataclass
class Entry:
    """A request; `sent` and `received` count the bytes of the bodies up to now, `status` is 0 until it is answered."""

    method: str
    path: str
    query: str
    host: str
    range: str | None
    authorization: bool
    status: int = 0
    sent: int = 0
    received: int = 0


class Log:
    """The requests of every port, in the order in which they came in."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._lock = threading.Lock()

    def add(self, entry: Entry) -> None:
        with self._lock:
            self._entries.append(entry)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def json(self) -> list[dict[str, Any]]:
        with self._lock:
            return [vars(entry).copy() for entry in self._entries]
