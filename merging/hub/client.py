"""Talking to the Hub through its own library: patiently where that may help, and with errors that say what to do."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from merging.errors import InputError, MergingError

__all__ = ["RETRIED", "Unreachable", "api", "endpoint", "explained", "offline", "patiently"]

T = TypeVar("T")

RETRIED = (408, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""

_TRIES = 6
_FIRST_TRIES = 3
"""Tries for a Hub that no request of this process has reached yet: most likely there is no network."""

_LONGEST = 60.0
"""Seconds waited before one more try, at most, also where the server asks for more."""


_reached: set[str] = set()
"""The addresses of Hubs that have answered."""


class Unreachable(InputError):
    """The Hub did not answer, or not sensibly, although it was asked again and again: later it may."""


def offline() -> bool:
    """Whether HF_HUB_OFFLINE says that only what was downloaded before is to be used."""
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def endpoint() -> str:
    """The Hub's address (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def api() -> Any:
    """The library's client, with the user's token; its own progress bars stay off where nobody would see them."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    from merging.version import __version__

    if not sys.stderr.isatty():
        disable_progress_bars()

    return HfApi(library_name="merging", library_version=__version__)


def patiently(ask: Callable[[], T], name: str, number: int = 0) -> T:
    """What ``ask`` returns, asked again after failures that may pass, each time a little later.

    A ``Retry-After`` is honoured. Only for requests that change nothing. ``name`` is what is asked for, ``number`` how
    often it failed before. Raises :class:`~merging.errors.InputError` when it keeps failing, and at once for what
    cannot pass.
    """
    try:
        answer = ask()
    except MergingError:
        raise
    except Exception as error:
        pause = _pause(error, number)
        if _answer(error) is not None:
            _reached.add(endpoint())
        if pause is None or number + 1 == (_TRIES if endpoint() in _reached else _FIRST_TRIES):
            raise explained(error, name) from None
    else:
        _reached.add(endpoint())
        return answer
    time.sleep(pause)
    return patiently(ask, name, number + 1)


def _pause(error: Exception, number: int) -> float | None:
    """Seconds to wait after the ``number``-th failure, None for one that will not pass."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return None
    backoff: float = min(_LONGEST, 2**number * random.uniform(0.5, 1))
    error, response = _origin(error), _answer(error)
    if response is not None:
        if response.status_code not in RETRIED:
            return None
        stated = response.headers.get("Retry-After", "")
        return min(_LONGEST, float(stated)) if stated.isdigit() else backoff
    # Without an answer: refused, reset, timed out or cut short.
    return backoff if isinstance(error, (HTTPError, OSError)) and not isinstance(error, FileNotFoundError) else None


def _origin(error: Exception) -> Exception:
    """What went wrong: the library wraps it in errors of its own, which name it as their cause."""
    from httpx2 import HTTPError

    while not isinstance(error, HTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _answer(error: Exception) -> Any:
    """The Hub's answer that an error is about, None if there was none."""
    return getattr(_origin(error), "response", None)


def explained(error: Exception, name: str) -> InputError:
    """The library's error in words that say what to do about it."""
    from huggingface_hub import errors

    page = f"{endpoint()}/{name.partition('@')[0]}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError(
            f"{name}: there is no such file or folder, and no such model in the Hub's local cache; the Hub itself is "
            f"not asked while HF_HUB_OFFLINE is set"
        )
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{name}: is gated: ask for access on {page}, then log in with `hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name}: the model has no such revision: see {page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{name}: is neither a local path nor a model on the Hub ({endpoint()}) that you may see: check the name, "
            f"and if it is private, log in with `hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return InputError(f"{name}: there is no such file on the Hub")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{name}: is no name of a model on the Hub: {str(error).splitlines()[0]}")
    response = getattr(error, "response", None)
    if response is not None:
        return Unreachable(f"{name}: the Hub answered {response.status_code} to every try: try again later")
    reason = str(error).strip().splitlines()
    return Unreachable(
        f"{name}: the Hub ({endpoint()}) cannot be reached: {reason[0] if reason else type(error).__name__}. What is "
        f"in the local cache can be used with HF_HUB_OFFLINE=1"
    )
