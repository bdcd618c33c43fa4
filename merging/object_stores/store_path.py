"""Addresses in object stores as the places of outputs."""

from __future__ import annotations

import re
from pathlib import Path

from merging.errors import InputError, OutputError
from merging.object_stores.address import DRIVERS, check_address, file_path, is_store_address

__all__ = ["StorePath", "output_path", "refuse_store_path"]

_SCHEME = re.compile(rf"(?P<scheme>{'|'.join(DRIVERS)}):/+")


class StorePath(type(Path())):  # type: ignore[misc]
    """The address of an output in an object store, with the name, suffix and parent of a path.

    Nothing is at it on the local disk, and it is never opened there.
    """

    def __str__(self) -> str:
        return _spell(super().__str__())


def output_path(name: str | Path) -> Path:
    """Return the path of an output: a :class:`StorePath` for an address; ``file:///`` is a local path.

    Raises :class:`~merging.errors.InputError` for an empty name, and for an address that cannot be one.
    """
    if name == "":
        raise InputError("a path is empty: is a variable of a script not set?")
    address = _spell(str(name))
    if _SCHEME.match(address) is None and not is_store_address(address):
        return Path(name)
    address = check_address(address)
    return file_path(address) if address.startswith("file://") else StorePath(address)


def refuse_store_path(path: Path) -> None:
    """Raise :class:`~merging.errors.OutputError` for an address, where only local files are written."""
    if _SCHEME.match(str(path)):
        raise OutputError(
            f"{_spell(str(path))}: this is written to a local disk only: name a local path, and copy it to the store"
        )


def _spell(name: str) -> str:
    """Return an address with the two slashes after its scheme, since a path keeps one; any other name as it is."""
    found = _SCHEME.match(name.replace("\\", "/"))
    if found is None:
        return name
    slashes = ":///" if found["scheme"] == "file" else "://"
    return f"{found['scheme']}{slashes}{name[found.end() :]}".replace("\\", "/")
