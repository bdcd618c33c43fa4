"""A model's folder that is not on this disk, mirrored as a folder that every reader of models understands."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from merging.hub.cards import stated_licence
from merging.hub.remote import RemoteFile
from merging.sources.links import link_or_copy, trust_links
from merging.sources.opening import open_tensors
from merging.sources.pickled import PYTORCH_ENDINGS
from merging.sources.stored import FileContents

__all__ = ["WEIGHTS", "Mirror", "is_safe", "make_link", "mirrors_folder"]

WEIGHTS = (".safetensors", ".gguf", *PYTORCH_ENDINGS)
"""Endings of the files that have placeholders."""


@dataclass(frozen=True, slots=True, eq=False)
class Mirror(ABC):
    """A repository at one commit, or a folder of an object store in one state, mirrored in a folder.

    Attributes:
        repo: Its name, ``org/name``, or its address in a store.
        commit: The commit's hash, or a key of the folder's state.
        folder: The mirror, which holds the small files, and empty placeholders or links for the weights.
        sizes: The bytes of each file, by its path in the folder.
        remote_files: The weights that are not downloaded yet, by their paths in the mirror.
    """

    repo: str
    commit: str
    folder: Path
    sizes: dict[str, int]
    remote_files: dict[Path, RemoteFile] = field(default_factory=dict)

    @property
    @abstractmethod
    def name(self) -> str:
        """The address for messages."""

    @abstractmethod
    def download_small(self, name: str) -> None:
        """Put a small file into the mirror."""

    @property
    def licence(self) -> str | None:
        """The licence that the model card states."""
        return stated_licence(self.folder / "README.md")

    def download_files(self, patterns: Iterable[str], under: str = "") -> None:
        """Download the missing files that match a pattern into the mirror, except weights.

        A pattern is matched against the path within ``under``, a folder of the model.
        """
        patterns = tuple(patterns)
        start = f"{under}/" if under else ""
        for name in self.sizes:
            inner = name.removeprefix(start)
            wanted = name.startswith(start) and any(fnmatch(inner, pattern) for pattern in patterns)
            if wanted and not name.endswith(WEIGHTS) and not (self.folder / name).exists():
                self.download_small(name)

    def add_weights(self, remote: RemoteFile) -> None:
        """Put a link to the cached weights file into the mirror, or an empty placeholder."""
        cached = remote.cached_path()
        if cached is not None:
            make_link(remote.path, cached)
            return
        remote.path.parent.mkdir(parents=True, exist_ok=True)
        remote.path.touch()
        self.remote_files[remote.path] = remote

    def open_file(self, path: Path) -> FileContents:
        """Open a weights file of the mirror: by its header until it is downloaded."""
        remote = self.remote_files.get(path)
        if remote is None or path.is_symlink():
            return open_tensors(path)
        tensors, metadata = remote.contents
        return dict(tensors), dict(metadata)


def mirrors_folder() -> Path:
    """Return the folder of this process's mirrors, which is removed when it ends."""
    return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="merging-hub-")
    trust_links(Path(folder.name))  # they lead to caches, and their names stay in the mirror
    return folder


def is_safe(name: str) -> bool:
    """Whether a file name leads to a place within the mirror: names come from strangers."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def make_link(place: Path, target: Path) -> None:
    """Put a link to a file of a cache into the mirror."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        link_or_copy(place, target)
