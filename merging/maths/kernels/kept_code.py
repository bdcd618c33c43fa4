"""Object code of kernels on the disk, which any number of processes may read and write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path

from merging.maths.kernels.object_code import describe_machine

__all__ = ["any_code_kept", "read_code", "write_code"]

_CHECK = sha256().digest_size
"""Bytes at the beginning of a file that tell whether the rest is whole, and made of these kernels."""


def any_code_kept() -> bool:
    """Return whether there is object code of any kernel."""
    return any(any(folder.glob("*.o")) for folder in _folders())


def read_code(name: str, signature: Sequence[str]) -> tuple[str, bytes] | None:
    """Return a kernel's name in its object code, and the object code; None if it is not kept, damaged, or of others.

    Args:
        name: the kernel.
        signature: the types of its arguments.
    """
    for folder in _folders():
        with suppress(OSError):
            data = (folder / _file_name(name, signature)).read_bytes()
            if data[:_CHECK] == _check(data[_CHECK:]):
                symbol, _, code = data[_CHECK:].partition(b"\n")
                return symbol.decode(), code
    return None


def write_code(name: str, signature: Sequence[str], symbol: str, code: bytes) -> None:
    """Keep object code in the first folder that can be written; in none if the disk is full or read-only."""
    data = symbol.encode() + b"\n" + code
    for folder in _folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _file_name(name, signature)
            hidden = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                hidden.write_bytes(_check(data) + data)
                hidden.replace(path)
            finally:
                hidden.unlink(missing_ok=True)
            return


def _folders() -> Iterator[Path]:
    """Yield the folders of object code: next to this package's bytecode, and in the user's cache folder."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(chosen, "merging")
        return
    yield Path(cache_from_source(__file__)).parent
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "merging", "kernels")


def _file_name(name: str, signature: Sequence[str]) -> str:
    return f"{name}-{'-'.join(signature)}-{_hash(describe_machine().encode()).hex()[:8]}.o"


def _check(data: bytes) -> bytes:
    return _hash(_sources() + data)


def _hash(data: bytes) -> bytes:
    return sha256(data).digest()


@cache
def _sources() -> bytes:
    """Return a hash of numba's version and of the files of this folder, the sources of object code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _hash(b"".join([version("numba").encode(), *(file.read_bytes() for file in files)]))
