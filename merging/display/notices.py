"""Notices of results: all are in ``.notices``; warnings among them are issued too, and the others are logged."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Mapping
from statistics import fmean

from merging.errors import ResultWarning

__all__ = ["describe_discarded", "report_notices"]

_WARNING = "warning: "
"""The beginning of a notice that the result may not be as wanted."""

_log = logging.getLogger(__name__)


def describe_discarded(discarded: Mapping[str, float], remedy: str) -> list[str]:
    """Return the notice about the energy that a rank discards, a warning above a tenth.

    Args:
        discarded: the share of each tensor's energy that is discarded.
        remedy: a clause about the ways to keep it.

    Returns:
        The notice alone in a list, which is empty if next to nothing is discarded.
    """
    if not discarded or max(discarded.values()) < 5e-4:
        return []
    worst, most = max(discarded.items(), key=lambda each: each[1])
    mean, start = fmean(discarded.values()), _WARNING if most > 0.1 else ""
    return [
        f"{start}the rank discards {mean:.1%} of the energy of the change on average, {most:.1%} at worst ({worst}): "
        f"{remedy}"
    ]


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
