"""Notices of results: all are in ``.notices``; warnings among them are issued too, and the others are logged."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable

from merging.errors import ResultWarning

__all__ = ["report_notices"]

_WARNING = "warning: "
"""The beginning of a notice that the result may not be as wanted."""

_log = logging.getLogger(__name__)


def report_notices(notices: Iterable[str]) -> None:
    """Issue the warnings among the notices of a result as :class:`~merging.errors.ResultWarning`, log the others."""
    for notice in notices:
        if notice.startswith(_WARNING):
            warnings.warn(notice.removeprefix(_WARNING), ResultWarning, stacklevel=_levels_to_user())
        else:
            _log.info("%s", notice)


def _levels_to_user() -> int:
    """Return the ``stacklevel`` at which :func:`report_notices` names the line of the user's code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "merging":
        level, frame = level + 1, frame.f_back
    return level
