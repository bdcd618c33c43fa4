"""Repositories with commits, branches and tags, whose files lie on the disk under the SHA-256 of their bytes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from refusals import BadRequest, EntryNotFound, Refusal, RevisionNotFound

__all__ = ["CHUNK", "Commit", "File", "Objects", "Repository", "is_large", "read"]

CHUNK = 1 << 18

_LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".zip", ".npz")
_LARGE_SIZE = 10_000_000


def is_large(name: str, size: int) -> bool:
    """Whether the Hub keeps a file of this name and size in its storage (Git LFS) rather than in git."""
    return size > 0 and (name.endswith(_LARGE_SUFFIXES) or size > _LARGE_SIZE)


def read(path: Path, start: int = 0, length: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `start` on, a piece at a time."""
    left = path.stat().st_size - start if length is None else length
    with path.open("rb") as file:
        file.seek(start)
        while left > 0 and (piece := file.read(min(CHUNK, left))):
            left -= len(piece)
            yield piece


@dataclass(frozen=True)
class File:
    """A file in a commit: the SHA-256 and size of its bytes, and the name of its blob in git.

    In git a large file is a pointer of some 130 bytes, whose blob `oid` then names.
    """

    sha256: str
    size: int
    oid: str
    pointer: int | None = None
    """The size of the pointer, if it is a large file."""

    @property
    def etag(self) -> str:
        """By what a client tells one version from another: of a large file the SHA-256, else git's name."""
        return self.oid if self.pointer is None else self.sha256


class Objects:
    """A folder of files named by the SHA-256 of their bytes; pieces of zeros take no room on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def add(self, pieces: Iterable[bytes], expected: str | None = None) -> str:
        """Keep some bytes; return their SHA-256. Bytes other than the expected ones are refused and not kept."""
        digest, size = hashlib.sha256(), 0
        handle, name = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    size += len(piece)
                    if piece.count(0) == len(piece):
                        file.seek(len(piece), os.SEEK_CUR)
                    else:
                        file.write(piece)
                file.truncate(size)
            if expected not in (None, digest.hexdigest()):
                raise BadRequest(f"the bytes of {expected} have the SHA-256 {digest.hexdigest()}")
            Path(name).replace(self.path(digest.hexdigest()))
        finally:
            Path(name).unlink(missing_ok=True)
        return digest.hexdigest()

    def file(self, sha256: str, large: bool) -> File:
        """The entry of a commit for bytes that are kept here."""
        if sha256 not in self:
            raise BadRequest(f"a commit names the large file {sha256}, which was not uploaded")
        size = self.path(sha256).stat().st_size
        if not large:
            return File(sha256, size, _blob(self.path(sha256).read_bytes()))
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return File(sha256, size, _blob(pointer), len(pointer))


def _blob(content: bytes) -> str:
    """The name that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A state of a repository: every file by its path."""

    sha: str
    title: str
    date: str
    parent: Commit | None
    files: Mapping[str, File]

    def history(self) -> Iterator[Commit]:
        """This commit and those before it, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repository:
    """A repository of the Hub: what it holds, and who may see and read it."""

    id: str
    private: bool = False
    gated: str | bool = False
    topics: tuple[str, ...] = ()
    """Tags of the Hub that nothing in the files gives; `tags` are git's."""
    downloads: int = 0
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._commit("main", "initial commit", None, {})
        self.created = self.at("main").date

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit's own name stands for."""
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        raise RevisionNotFound(revision)

    def commit(
        self,
        branch: str,
        title: str,
        added: Mapping[str, File],
        deleted: Iterable[str] = (),
        parent: str | None = None,
    ) -> Commit:
        """Add and delete files on a branch. Deleted names that end in a slash are folders.

        Raises:
            Refusal: 412 where `parent` is no longer the newest commit of the branch.
        """
        head = self.branches.get(branch)
        if head is None:
            raise RevisionNotFound(branch)
        if parent not in (None, head.sha):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for name in deleted:
            gone = [file for file in files if file == name or (name.endswith("/") and file.startswith(name))]
            if not gone:
                raise EntryNotFound(f"A file with this name doesn't exist: {name}", head.sha)
            for file in gone:
                del files[file]
        return self._commit(branch, title, head, files | dict(added))

    def _commit(self, branch: str, title: str, parent: Commit | None, files: Mapping[str, File]) -> Commit:
        content = [self.id, len(self.commits), parent.sha if parent else "", title, sorted(files.items(), key=str)]
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        commit = Commit(hashlib.sha1(repr(content).encode()).hexdigest(), title, date, parent, files)
        self.branches[branch] = self.commits[commit.sha] = commit
        return commit
