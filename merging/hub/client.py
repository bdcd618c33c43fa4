"""Requests to the Hub through its own library, with retries where they may help, and errors that say what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from merging.errors import InputError
from merging.object_stores.retries import LONGEST, Unreachable, backoff, keep_trying

__all__ = ["RETRIED_STATUSES", "Unreachable", "api", "endpoint", "explain_error", "offline", "with_retries"]

T = TypeVar("T")

RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""

_TRIES = 6
_FIRST_TRIES = 3
"""Tries as long as no request of this process has reached the Hub: most likely there is no network."""

_reached: set[str] = set()
"""Addresses of the Hubs that have answered."""


def offline() -> bool:
    """Whether HF_HUB_OFFLINE restricts this process to earlier downloads."""
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def endpoint() -> str:
    """Return the Hub's address (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def api() -> Any:
    """Return the library's client, with the user's token; its progress bars are off where nobody would see them."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    from merging.version import __version__

    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()

    return HfApi(library_name="merging", library_version=__version__)


def with_retries(ask: Callable[[], T], name: str) -> T:
    """Return the result of ``ask``, which is tried again after temporary failures, each time a little later.

    A ``Retry-After`` header is honoured.

    Args:
        ask: A request that changes nothing.
        name: The name of the requested thing in messages.

    Raises:
        InputError: The request keeps failing, or fails in a way that no further try can mend.
    """

    def pause_after(error: Exception, number: int) -> float | None:
        if _response(error) is not None:
            _reached.add(endpoint())
        last = number + 1 == (_TRIES if endpoint() in _reached else _FIRST_TRIES)
        return None if last else _pause(error, number)

    answer = keep_trying(ask, pause_after, lambda error: explain_error(error, name), name)
    _reached.add(endpoint())
    return answer


def _pause(error: Exception, number: int) -> float | None:
    """Return the seconds to wait after the ``number``-th failure, None for a permanent one."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return None
    error, response = _http_error(error), _response(error)
    if response is not None:
        if response.status_code not in RETRIED_STATUSES:
            return None
        stated = response.headers.get("Retry-After", "")
        return min(LONGEST, float(stated)) if stated.isdigit() else backoff(number)
    # There was no answer: the connection was refused, reset, timed out or cut short.
    passing = isinstance(error, (_http_error_type(), OSError)) and not isinstance(error, FileNotFoundError)
    return backoff(number) if passing else None


def _http_error(error: Exception) -> Exception:
    """Return the HTTP error behind an error of the library, which names it as its cause."""
    kind = _http_error_type()
    while not isinstance(error, kind) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _http_error_type() -> type[Exception]:
    """Return the base class of the HTTP library's errors: httpx2's with huggingface_hub 2, httpx's before."""
    from huggingface_hub.errors import HfHubHTTPError

    kinds: tuple[type[Exception], ...] = HfHubHTTPError.__mro__
    return next(kind for kind in kinds if kind.__name__ == "HTTPError")


def _response(error: Exception) -> Any:
    """Return the Hub's answer that an error is about, None if there was none."""
    return getattr(_http_error(error), "response", None)


def explain_error(error: Exception, name: str) -> InputError:
    """Return an error that says what to do about an error of the library."""
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
        return InputError(f"{name}: is not a name of a model on the Hub: {str(error).splitlines()[0]}")
    response = getattr(error, "response", None)
    if response is not None:
        return Unreachable(f"{name}: the Hub answered {response.status_code} to every try: try again later")
    reason = str(error).strip().splitlines()
    return Unreachable(
        f"{name}: the Hub ({endpoint()}) cannot be reached: {reason[0] if reason else type(error).__name__}. What is "
        f"in the local cache can be used with HF_HUB_OFFLINE=1"
    )
