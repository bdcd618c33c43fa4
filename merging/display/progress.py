"""Progress callbacks, and their display: a bar, lines in a log, or events for programs."""

from __future__ import annotations

import json
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from merging.display.tables import format_size
from merging.errors import OptionError

__all__ = [
    "PhaseClock",
    "Progress",
    "ProgressBar",
    "ProgressEvents",
    "ProgressLines",
    "announce_phase",
    "resolve_progress",
]

Progress = Callable[[int, int], None]
"""Called with the bytes or steps done and their total, from one thread at a time.

An object may have a method ``phase``, which is called with the name of each phase when it begins."""

_LINE_PERIOD = 30.0
"""Seconds between two lines of a log."""

_EVENT_PERIOD = 1.0
"""Seconds between two events of a phase."""


def announce_phase(progress: Progress | None, name: str) -> None:
    """Tell a callback that a phase begins, if it has a method ``phase``."""
    phase = getattr(progress, "phase", None)
    if phase is not None:
        phase(name)


class ProgressBar:
    """A progress callback that shows a bar: a widget in a notebook, else a line on stderr.

    Args:
        title: The word before the bar.
        leave: Whether the finished bar stays.
    """

    def __init__(self, title: str = "merging", leave: bool = True) -> None:
        self._title, self._leave = title, leave
        self._bar: Any = None

    def __repr__(self) -> str:
        return f"ProgressBar({self._title!r})"

    def phase(self, name: str) -> None:
        """Show the name of a phase before the bar."""
        self._title = name
        if self._bar is not None:
            self._bar.set_description(name)

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None and done < self._bar.n:
            self.close()  # the next stage, such as merging after a download
        if self._bar is None:
            self._bar = _bar_class()(
                desc=self._title, total=total, unit="B", unit_scale=True, leave=self._leave, file=sys.stderr
            )
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar, finished or not."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class _Report(ABC):
    """A progress callback that reports from time to time: the phase, the bytes, their speed and the time left."""

    _short = False
    """Whether the end of a task is no reason for a report."""

    def __init__(self, title: str, period: float) -> None:
        self._phase, self._period = title, period
        self._begun = self._last = time.monotonic()
        self._first: int | None = None
        self._done = 0

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase = name

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None or done < self._done:  # the next task, such as merging after a download
            self._begun, self._first = now, done
        self._done = done
        if now - self._last < self._period and (done < total or self._short):
            return
        self._last = now
        speed = (done - self._first) / max(now - self._begun, 1e-9)
        left = (total - done) / speed if speed > 0 else None
        self._show(done, total, speed, left)

    @abstractmethod
    def _show(self, done: int, total: int, speed: float, left: float | None) -> None:
        """Report the state of a task."""


class ProgressLines(_Report):
    """A progress callback that writes a line to stderr every 30 seconds, for logs.

    Args:
        title: The word before the numbers, until a phase begins.
        period: The seconds between two lines.
    """

    _short = True

    def __init__(self, title: str = "merging", period: float = _LINE_PERIOD) -> None:
        super().__init__(title, period)

    def _show(self, done: int, total: int, speed: float, left: float | None) -> None:
        share = f"{100 * done / max(total, 1):.0f}% of {format_size(total)}"
        ends = "" if left is None else f", {_format_seconds(left)} left"
        print(f"{self._phase}: {share}, {format_size(speed)}/s{ends}", file=sys.stderr, flush=True)


class ProgressEvents(_Report):
    """A progress callback that writes JSON to stderr for programs: a line a second, and one for the end of a task.

    Args:
        title: The phase, until one begins.
        period: The seconds between two lines.
    """

    def __init__(self, title: str = "merging", period: float = _EVENT_PERIOD) -> None:
        super().__init__(title, period)

    def _show(self, done: int, total: int, speed: float, left: float | None) -> None:
        event = {
            "event": "progress",
            "phase": self._phase,
            "done": done,
            "total": total,
            "per_second": round(speed),
            "seconds_left": None if left is None else round(left, 1),
        }
        print(json.dumps(event), file=sys.stderr, flush=True)


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bar_class() -> Any:
    """Return tqdm's bar for this place: a notebook without ipywidgets has the line of a terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")
        from tqdm.auto import tqdm

    return tqdm


def resolve_progress(progress: Progress | bool | None, title: str = "merging") -> Progress | None:
    """Return the callback for the option ``progress`` of a public function.

    Args:
        progress: True for a bar, False or None for nothing, or a callback.
        title: The word before the bar.

    Raises:
        OptionError: for anything else.
    """
    if progress is None or isinstance(progress, bool):
        return ProgressBar(title) if progress else None
    if not callable(progress):
        raise OptionError(
            f"progress = {str(progress)[:80]!r}: use True for a bar, or give a function that takes the bytes done and "
            f"the bytes in all"
        )
    return progress


class PhaseClock:
    """A progress callback that takes the time of each phase, and hands everything on to another callback.

    Attributes:
        seconds: the seconds of each phase that ended, by its name.
    """

    def __init__(self, progress: Progress | None, first: str) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._phase = progress, first
        self._begun = time.perf_counter()

    def phase(self, name: str) -> None:
        """Begin a phase."""
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._begun
        self._phase, self._begun = name, now
        announce_phase(self._progress, name)

    def __call__(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(done, total)
