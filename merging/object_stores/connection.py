"""The connection to an object store, requests with retries, and errors that say what to do."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

from merging.errors import InputError
from merging.object_stores.address import DRIVERS, check_address, hide_secrets
from merging.object_stores.retries import Unreachable, backoff, keep_trying

__all__ = ["ask_store", "connect", "explain_store_error", "lacks_bucket"]

T = TypeVar("T")

_QUIET = logging.NullHandler()
"""Without any handler, Python prints the drivers' records of failures that are tried again."""

_TRIES = 3
"""Tries of one request. The drivers try several times themselves."""

_SURE = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    NotImplementedError,
    ValueError,
    TypeError,
)
"""Failures that no further try can mend."""

_INVALID = "ParamValidationError"
"""The error of botocore, by name, for a bucket's name that S3 does not allow."""

_NO_BUCKET = re.compile(
    r"NoSuchBucket|ContainerNotFound|no such bucket|(bucket|container)\b.*\b(does not|doesn't) exist", re.IGNORECASE
)

_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""

_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "ClientAuthenticationError",
)
"""Errors of the drivers, by name, for users without credentials."""


def connect(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and its path there. Nothing is asked of the store yet.

    Args:
        address: ``s3://bucket/folder``, ``gs://``, ``az://``, ``memory://`` or ``file:///``.

    Returns:
        An fsspec file system that keeps no listings, and the path in its own notation.

    Raises:
        InputError: The scheme is unknown, its driver is not installed, or its settings cannot be used.
    """
    address = check_address(address)
    scheme = address.partition("://")[0]
    import fsspec

    if (package := DRIVERS[scheme].package) is not None:
        logging.getLogger(package).addHandler(_QUIET)
    try:
        system = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        raise InputError(
            f"{address}: {scheme}:// is read and written with {package}, which is not installed: "
            f"pip install 'merging[fsspec]'"
        ) from None
    except Exception as error:
        raise explain_store_error(error, address) from None
    return system, str(system._strip_protocol(address))


def ask_store(ask: Callable[[], T], address: str, repeat: bool = True) -> T:
    """Return the result of a request to a store, which is sent again after temporary failures.

    Args:
        ask: A request that changes nothing, or that may be repeated.
        address: The address that it is about, for messages.
        repeat: Whether it may be repeated.

    Raises:
        InputError: See :func:`explain_store_error`.
    """
    pause_after = _pause_after if repeat else lambda error, number: None
    return keep_trying(ask, pause_after, lambda error: explain_store_error(error, address), address)


def explain_store_error(error: Exception, address: str) -> InputError:
    """Return an error for users that says what to do about an error of a store or its driver."""
    scheme = address.partition("://")[0]
    driver = DRIVERS[scheme]
    stated = str(error).strip().splitlines()
    first = " ".join(stated[:2]) if stated and stated[0].endswith(":") else "".join(stated[:1])
    reason = hide_secrets(first or type(error).__name__)
    names = {each.__name__ for cause in _causes(error) for each in type(cause).__mro__}
    without = isinstance(error, ValueError) and "credentials" in reason.lower()  # as adlfs says it
    if without or not names.isdisjoint(_NO_CREDENTIALS):
        return InputError(f"{address}: the store wants credentials, and none are found: {driver.credentials}")
    status = _status(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return InputError(
            f"{address}: the store refuses access ({reason}): check the credentials: {driver.credentials}"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        if lacks_bucket(error):
            return InputError(f"{address}: there is no bucket {address.removeprefix(f'{scheme}://').partition('/')[0]}")
        return InputError(f"{address}: there is no such file or folder")
    if _pause_after(error, 0) is None:
        return InputError(f"{address}: the store refuses the request: {reason}: check the address and the settings")
    return Unreachable(f"{address}: the store cannot be reached, or fails: {reason}: try again later")


def lacks_bucket(error: Exception) -> bool:
    """Return whether a store says that there is no such bucket, and not only no such file."""
    return any(_NO_BUCKET.search(str(cause)) for cause in _causes(error))


def _pause_after(error: Exception, number: int) -> float | None:
    """Return the seconds to wait after the ``number``-th failure, None for a permanent one."""
    if number + 1 >= _TRIES or isinstance(error, _SURE):
        return None
    status = _status(error)
    if status is not None:
        return backoff(number) if status in _PASSING else None
    names = {each.__name__ for cause in _causes(error) for each in type(cause).__mro__}
    if not names.isdisjoint((*_NO_CREDENTIALS, _INVALID)) or getattr(error, "errno", None) in (
        errno.EINVAL,
        errno.ENOSPC,
    ):
        return None
    return backoff(number)


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an error, and the errors behind it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _status(error: Exception) -> int | None:
    """Return the HTTP status of the store's answer, as the drivers' errors state it; None without an answer."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            stated = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # azure, aiohttp, gcsfs
            stated = (
                getattr(cause, "status_code", None) or getattr(cause, "status", None) or getattr(cause, "code", None)
            )
        if isinstance(stated, int) and 100 <= stated < 600:
            return stated
    return None
