"""Requests over a network, sent again after a failure that may pass."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from merging.errors import InputError, MergingError

__all__ = ["LONGEST", "Unreachable", "backoff", "keep_trying"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST = 60.0
"""The longest wait in seconds before another try, even if the server asks for more."""


class Unreachable(InputError):
    """A server did not answer correctly in any of several tries; it may later."""


def backoff(number: int) -> float:
    """Return the seconds to wait after the ``number``-th failure, counted from 0."""
    seconds: float = 2**number * random.uniform(0.5, 1)
    return min(LONGEST, seconds)


def keep_trying(
    ask: Callable[[], T],
    pause_after: Callable[[Exception, int], float | None],
    explain: Callable[[Exception], InputError],
    name: str,
) -> T:
    """Return the result of ``ask``, which is tried again after temporary failures.

    Args:
        ask: A request that changes nothing.
        pause_after: Returns the seconds to wait after the ``number``-th failure, None to give up.
        explain: Returns the error for users of the last failure.
        name: The name of the requested thing in the log.

    Raises:
        InputError: The request keeps failing, or fails in a way that no further try can mend.
    """
    number = 0
    while True:
        try:
            return ask()
        except MergingError:
            raise
        except Exception as error:
            pause = pause_after(error, number)
            if pause is None:
                raise explain(error) from None
        _log.warning("%r: the request failed, trying again in %.1f s", name, pause)
        time.sleep(pause)
        number += 1
