"""A model's repository at one commit, mirrored as a folder that every reader of models understands."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from merging.errors import InputError, nearest
from merging.hub.address import Address
from merging.hub.cards import stated_licence
from merging.hub.client import Unreachable, api, explain_error, offline, with_retries
from merging.hub.remote import RemoteFile
from merging.sources.links import link_or_copy, trust_links
from merging.sources.opening import open_tensors
from merging.sources.pickled import PYTORCH_ENDINGS
from merging.sources.stored import FileContents

__all__ = ["Repository", "open_repository"]

_PLANNED = ("README.md", "config.json", "adapter_config.json", "model_index.json", "modules.json", "*.index.json")
"""Names of the files from which a merge is planned, in addition to the headers of the weights."""

_KNOWN: dict[str, Repository] = {}
"""The opened repositories, by their commits."""

_WEIGHTS = (".safetensors", ".gguf", *PYTORCH_ENDINGS)


@dataclass(frozen=True, slots=True, eq=False)
class Repository:
    """A repository at one commit, mirrored in a folder.

    Attributes:
        repo: Its name, ``org/name``.
        commit: The commit's hash.
        folder: The mirror, which holds the small files, and empty placeholders or links for the weights.
        sizes: The bytes of each file, by its name in the repository.
        remote_files: The weights that are not downloaded yet, by their paths in the mirror.
    """

    repo: str
    commit: str
    folder: Path
    sizes: dict[str, int]
    remote_files: dict[Path, RemoteFile] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The address of exactly these bytes."""
        return f"{self.repo}@{self.commit}"

    @property
    def licence(self) -> str | None:
        """The licence that the model card states."""
        return stated_licence(self.folder / "README.md")

    def download_files(self, patterns: Iterable[str], under: str = "") -> None:
        """Download the missing files that match a pattern into the mirror, except weights.

        A pattern is matched against the path within ``under``, a folder of the repository.
        """
        patterns = tuple(patterns)
        start = f"{under}/" if under else ""
        for name in self.sizes:
            inner = name.removeprefix(start)
            wanted = name.startswith(start) and any(fnmatch(inner, pattern) for pattern in patterns)
            if wanted and not name.endswith(_WEIGHTS) and not (self.folder / name).exists():
                _link(self.folder / name, _download(self, name))

    def add_weights(self, remote: RemoteFile) -> None:
        """Put a link to the cached weights file into the mirror, or an empty placeholder."""
        cached = remote.cached_path()
        if cached is not None:
            _link(remote.path, cached)
            return
        remote.path.parent.mkdir(parents=True, exist_ok=True)
        remote.path.touch()
        self.remote_files[remote.path] = remote

    def open_file(self, path: Path) -> FileContents:
        """Open a weights file of the mirror: by its header on the Hub until it is downloaded."""
        remote = self.remote_files.get(path)
        if remote is None or path.is_symlink():
            return open_tensors(path)
        tensors, metadata = remote.contents
        return dict(tensors), dict(metadata)


def open_repository(address: Address) -> Repository:
    """Open the repository of an address, and download a few small files. The revision is resolved once to a commit.

    Raises :class:`~merging.errors.InputError` if it does not exist, is not visible, or cannot be reached.
    """
    if str(Address(address.repo, address.revision)) in _KNOWN:
        repository = _KNOWN[str(Address(address.repo, address.revision))]
    else:
        repository = _open_cached(address) if offline() else _ask_hub(address.repo, address.revision)
        _KNOWN[repository.name] = repository
    if address.path and address.path not in repository.sizes:
        inside = f"{address.path}/"
        if not any(name.startswith(inside) for name in repository.sizes):
            raise InputError(
                f"{address}: {address.repo} holds no such file or folder{nearest(address.path, repository.sizes)}"
            )
    under = address.path if address.path not in repository.sizes else address.path.rpartition("/")[0]
    repository.download_files([pattern for each in _PLANNED for pattern in (each, f"*/{each}")], under)
    return repository


@cache
def _mirrors() -> Any:
    """Return the folder of this process's mirrors, which is removed when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="merging-hub-")
    trust_links(Path(folder.name))  # they lead to the library's cache, and their names stay in the mirror
    return folder


def _ask_hub(repo: str, revision: str | None) -> Repository:
    """Open a repository on the Hub, and mirror it with placeholders for its weights."""
    name = f"{repo}@{revision}" if revision else repo
    try:
        info = with_retries(lambda: api().model_info(repo, revision=revision, files_metadata=True), name)
    except Unreachable as error:
        reason = str(error).removeprefix(f"{name}: ")
        raise Unreachable(f"{name}: there is no such file or folder here, and {reason}") from None
    siblings = info.siblings or []
    folder = Path(_mirrors().name) / repo / info.sha
    sizes = {each.rfilename: each.size or 0 for each in siblings if _safe(each.rfilename)}
    found = Repository(repo, info.sha, folder, sizes)
    for each in siblings:
        if each.rfilename in found.sizes and each.rfilename.endswith(_WEIGHTS):
            sha256 = each.lfs.sha256 if each.lfs else None
            found.add_weights(
                RemoteFile(
                    repo, info.sha, each.rfilename, size=each.size or 0, sha256=sha256, path=folder / each.rfilename
                )
            )
    folder.mkdir(parents=True, exist_ok=True)
    _remember(repo, revision or "main", info.sha)
    return found


def _remember(repo: str, revision: str, commit: str) -> None:
    """Note the commit of a revision in the library's cache, as the library does, for use without a network."""
    from huggingface_hub import constants

    note = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
    if revision != commit:
        with suppress(OSError):  # a cache that cannot be written to
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(commit)


def _safe(name: str) -> bool:
    """Whether a file name leads to a place within the repository's folder: names come from strangers."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        link_or_copy(place, target)


def _download(repository: Repository, name: str) -> Path:
    """Download one small file into the library's cache."""
    from huggingface_hub import hf_hub_download

    def ask() -> str:
        return str(hf_hub_download(repository.repo, name, revision=repository.commit))

    return Path(with_retries(ask, f"{repository.name}/{name}"))


def _open_cached(address: Address) -> Repository:
    """Open a repository in the library's cache, as an earlier download left it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    find: Callable[..., Any] = snapshot_download
    try:
        folder = Path(find(address.repo, revision=address.revision, local_files_only=True, allow_patterns=["*.none"]))
    except Exception as error:
        what = OfflineModeIsEnabled() if isinstance(error, OSError) else error
        raise explain_error(what, str(address)) from None
    files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return Repository(address.repo, folder.name, folder, files)
