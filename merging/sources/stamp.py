"""The identity and state of a file, to notice that somebody writes to an input while it is read."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["Stamp", "stamp_of"]


class Stamp(NamedTuple):
    """The identity and state of a file: the fields of its status with these names."""

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
        """Whether nobody replaced the file, wrote to it or truncated it.

        A writer can reset the time of modification, but not the time of the last change of status. Another mode, owner
        or number of links also changes the latter, and leaves the content alone.
        """
        if self[:4] != later[:4]:
            return False
        return self.ctime_ns == later.ctime_ns or self[5:] != later[5:]

    def is_status(self, status: os.stat_result) -> bool:
        """Whether an open file still has this stamp: all other changes of its status also change one of its times."""
        return status.st_ctime_ns == self.ctime_ns and status.st_mtime_ns == self.mtime_ns and status[6] == self.size


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file with this status."""
    return Stamp(
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
    )
