"""Which file it is, and in which state: what tells an input that somebody writes to while it is read."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["Stamp", "stamp_of"]


class Stamp(NamedTuple):
    """What tells a file, and its state: the fields of its status of these names."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int

    def is_same_state(self, later: Stamp) -> bool:
        """Whether nobody replaced the file, wrote to it or cut it.

        Who writes to a file can set its time of writing back, but not that of its last change. Another mode, owner or
        number of links is a change too, and one of no content: it explains another time.
        """
        if self[:4] != later[:4]:
            return False
        return self.ctime_ns == later.ctime_ns or self[5:] != later[5:]


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file of this status."""
    return Stamp(*(getattr(status, f"st_{field}") for field in Stamp._fields))
