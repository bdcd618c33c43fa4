"""Progress callbacks, and the bar that shows them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from merging.errors import OptionError

__all__ = ["Progress", "ProgressBar", "resolve_progress"]

Progress = Callable[[int, int], None]
"""Called with the bytes or steps done and their total, from one thread at a time."""


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
