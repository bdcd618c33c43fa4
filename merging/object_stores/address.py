"""Addresses in object stores: ``s3://bucket/folder``, ``gs://...``, ``az://...``, ``memory://...``, ``file:///...``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from merging.errors import InputError, nearest

__all__ = ["DRIVERS", "Driver", "check_address", "file_path", "hide_secrets", "is_store_address"]


@dataclass(frozen=True, slots=True)
class Driver:
    """The program that fsspec needs for a scheme, None for those in fsspec; and how users give their credentials."""

    package: str | None
    credentials: str = ""


_S3 = Driver(
    "s3fs", "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket, FSSPEC_S3_ANON=1"
)
_GCS = Driver("gcsfs", "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS")
_AZURE = Driver("adlfs", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING")

DRIVERS = {
    "s3": _S3,
    "s3a": _S3,
    "gs": _GCS,
    "gcs": _GCS,
    "az": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "memory": Driver(None),
    "file": Driver(None),
}
"""The known schemes."""

_WRITTEN = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<place>[^/]*)(?P<path>/.*)?", re.DOTALL)
_ELSEWHERE = ("hf", "http", "https")
"""Schemes of the Hub's addresses."""

_AZURE_PLACE = re.compile(r"[^@:]+@[\w.-]+")
"""A container and its account, as in ``abfs://container@account.dfs.core.windows.net/path``."""

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and the bytes of names that are not UTF-8."""

_USER = re.compile(r"(?<=://)(?:(?!arn:)[^/\s:@]+:(?!\d+/)[^\s\"'<>]*|[^/\s@]*)@")
"""A user, or a user and a password, which may hold any of ``/:@``."""

_QUERY = re.compile(r"(://[^\s?\"'<>]*)\?[^\s\"'<>]*")


def is_store_address(name: str) -> bool:
    """Whether a name is an address in an object store, or in another file system that fsspec knows.

    ``file:///...`` is one too, though it means a local path: see :func:`file_path`.
    """
    written = _WRITTEN.fullmatch(name)
    return written is not None and written["scheme"].lower() not in _ELSEWHERE


def check_address(name: str) -> str:
    """Return an address without slashes at its end.

    Raises :class:`~merging.errors.InputError` for an unknown scheme, a missing bucket, a path that leads out of it, and
    for a key, password or query in the address: addresses are written into headers and logs.
    """
    shown = hide_secrets(name)
    written = _WRITTEN.fullmatch(name)
    if written is None:
        raise InputError(f"{shown}: is not an address: write s3://BUCKET/FOLDER")
    scheme, place, path = written["scheme"], written["place"], written["path"] or ""
    if scheme not in DRIVERS:
        raise InputError(
            f"{shown}: there is no scheme {scheme}://{nearest(scheme, DRIVERS)}: "
            f"{', '.join(f'{each}://' for each in DRIVERS)} are known, and hf:// for the Hub"
        )
    has_user = "@" in place and not (DRIVERS[scheme] is _AZURE and _AZURE_PLACE.fullmatch(place))
    if has_user or (":" in place and "@" in path and not place.startswith("arn:")):  # / in a password ends the place
        raise InputError(
            f"{shown}: an address with a user or key in it would be written into headers and logs: leave it out, and "
            f"give credentials by {DRIVERS[scheme].credentials or 'the settings of fsspec'}"
        )
    if "?" in name:
        raise InputError(f"{shown}: an address has no query (?...): name the file or folder alone")
    if not place and scheme not in ("memory", "file"):
        raise InputError(f"{shown}: names no bucket: write {scheme}://BUCKET/FOLDER")
    parts = path.rstrip("/").split("/")[1:]
    if any(part in ("", ".", "..") or _UNUSABLE.search(part) for part in parts):
        raise InputError(
            f"{shown}: {path} is not a path in a bucket: it has empty parts, or . or .., or control characters"
        )
    return f"{scheme}://{place}{'/' if parts else ''}{'/'.join(parts)}"


def file_path(address: str) -> Path:
    """Return the local path that ``file:///...`` means. Raises :class:`~merging.errors.InputError` for another host."""
    path = address.removeprefix("file://")
    if not path.startswith("/"):
        raise InputError(f"{hide_secrets(address)}: write file:///FOLDER, with the whole path after three slashes")
    return Path(path)


def hide_secrets(text: str) -> str:
    """Return a text without the users, passwords and queries of the addresses in it."""
    return _QUERY.sub(r"\1?...", _USER.sub("...@", text))
