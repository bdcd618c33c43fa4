"""A model's repository at one commit, mirrored as a folder that every reader of models understands."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

from merging.errors import InputError, nearest
from merging.hub.address import Address
from merging.hub.cards import stated_licence
from merging.hub.client import Unreachable, api, explained, offline, patiently
from merging.hub.remote import RemoteFile, opened_remote
from merging.sources.links import trust_links
from merging.sources.opening import STAND_INS
from merging.sources.stored import FileContents

__all__ = ["Repository", "open_repository"]

_PLANNED = ("README.md", "config.json", "adapter_config.json", "model_index.json", "modules.json", "*.index.json")
"""The files, by their last name, that a merge is planned from beside the headers of the weights."""

_KNOWN: dict[str, Repository] = {}
"""The repositories that were opened, by their commits."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True, eq=False)
class Repository:
    """``repo`` at ``commit``; ``folder`` holds its small files and stands in for its weights.

    ``sizes`` are the bytes of its files by name.
    """

    repo: str
    commit: str
    folder: Path
    sizes: dict[str, int]

    @property
    def name(self) -> str:
        """The address that means these very bytes for ever."""
        return f"{self.repo}@{self.commit}"

    @property
    def licence(self) -> str | None:
        """What its card states."""
        return stated_licence(self.folder / "README.md")

    def bring(self, patterns: Iterable[str], under: str = "") -> None:
        """Download the files that match a pattern (and are no weights) into the mirror, where they are not there yet.

        A pattern is matched against what follows ``under``, a folder in the repository.
        """
        patterns = tuple(patterns)
        start = f"{under}/" if under else ""
        for name in self.sizes:
            inner = name.removeprefix(start)
            wanted = name.startswith(start) and any(fnmatch(inner, pattern) for pattern in patterns)
            if wanted and not name.endswith(_WEIGHTS) and not (self.folder / name).exists():
                _link(self.folder / name, _downloaded(self, name))


def open_repository(address: Address) -> Repository:
    """The repository of an address, its revision resolved once to a commit; a few small files are downloaded.

    Raises :class:`~merging.errors.InputError` where it is not there, not to be seen, or cannot be reached.
    """
    if str(Address(address.repo, address.revision)) in _KNOWN:
        repository = _KNOWN[str(Address(address.repo, address.revision))]
    else:
        repository = _cached_only(address) if offline() else _asked(address.repo, address.revision)
        _KNOWN[repository.name] = repository
    if address.path and address.path not in repository.sizes:
        inside = f"{address.path}/"
        if not any(name.startswith(inside) for name in repository.sizes):
            raise InputError(
                f"{address}: {address.repo} holds no such file or folder{nearest(address.path, repository.sizes)}"
            )
    under = address.path if address.path not in repository.sizes else address.path.rpartition("/")[0]
    repository.bring([pattern for each in _PLANNED for pattern in (each, f"*/{each}")], under)
    return repository


@cache
def _mirrors() -> Any:
    """The folder of this process's mirrors, removed when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="merging-hub-")
    trust_links(Path(folder.name))  # to the library's cache, by names that stay in their repository's folder
    return folder


def _asked(repo: str, revision: str | None) -> Repository:
    name = f"{repo}@{revision}" if revision else repo
    try:
        info = patiently(lambda: api().model_info(repo, revision=revision, files_metadata=True), name)
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
            _stand_in(RemoteFile(repo, info.sha, each.rfilename, each.size or 0, sha256, folder / each.rfilename))
    folder.mkdir(parents=True, exist_ok=True)
    _remember(repo, revision or "main", info.sha)
    return found


def _remember(repo: str, revision: str, commit: str) -> None:
    """Note in the library's cache what the revision means now, as the library does, for when there is no network."""
    from huggingface_hub import constants

    note = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
    if revision != commit:
        with suppress(OSError):  # a cache that cannot be written to
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(commit)


def _safe(name: str) -> bool:
    """Whether a file of that name lies in its repository's folder: names come from strangers."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def _stand_in(remote: RemoteFile) -> None:
    """What a reader of the mirror finds at the place of a weights file: the cached file, or an empty one."""
    cached = remote.cached()
    if cached is not None:
        _link(remote.path, cached)
        return
    remote.path.parent.mkdir(parents=True, exist_ok=True)
    remote.path.touch()
    opened = cache(partial(opened_remote, remote))  # of a commit, so that it stays as it is

    def again() -> FileContents:
        tensors, metadata = opened()
        return dict(tensors), dict(metadata)

    STAND_INS[remote.path] = again


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(target.resolve())


def _downloaded(repository: Repository, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    def ask() -> str:
        return str(hf_hub_download(repository.repo, name, revision=repository.commit))

    return Path(patiently(ask, f"{repository.name}/{name}"))


def _cached_only(address: Address) -> Repository:
    """The repository as an earlier download left it in the library's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    find: Callable[..., Any] = snapshot_download
    try:
        folder = Path(find(address.repo, revision=address.revision, local_files_only=True, allow_patterns=["*.none"]))
    except Exception as error:
        what = OfflineModeIsEnabled() if isinstance(error, OSError) else error
        raise explained(what, str(address)) from None
    files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return Repository(address.repo, folder.name, folder, files)
