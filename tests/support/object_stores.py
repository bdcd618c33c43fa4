"""A store in memory with a log of what is read, and folders that are put into stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from merging.object_stores.connection import connect

__all__ = ["MemoryStore", "memory_store", "put"]


@dataclass
class MemoryStore:
    """``memory://box``: `reads` are the names and sizes of ranges that were read, `cache` the folder of downloads."""

    cache: Path
    reads: list[tuple[str, int]] = field(default_factory=list)

    def put(self, folder: Path, name: str = "") -> str:
        """Put a folder or file into the box, and return its address."""
        return put(folder, f"memory://box/{name or folder.name}")

    def downloaded(self) -> list[str]:
        """The names of the files in the cache."""
        return sorted(path.name for path in self.cache.rglob("*") if path.is_file() and path.name != ".lock")


def put(source: Path, address: str) -> str:
    """Put a folder or file at an address, and return the address."""
    system, root = connect(address)
    if source.is_file():
        system.pipe_file(root, source.read_bytes())
        return address
    for path in sorted(source.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{root}/{path.relative_to(source).as_posix()}", path.read_bytes())
    return address


@pytest.fixture
def memory_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """An empty store of this process, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    store = MemoryStore(tmp_path / "cache")
    plain = MemoryFileSystem.cat_file

    def cat_file(
        self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None, **kwargs: object
    ) -> bytes:
        content: bytes = plain(self, path, start=start, end=end, **kwargs)
        store.reads.append((path.removeprefix("/box/"), len(content)))
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return store
