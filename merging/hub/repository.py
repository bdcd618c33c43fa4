"""A model's repository on the Hub at one commit, or a folder of an object store, mirrored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from merging.errors import InputError, nearest
from merging.hub.address import Address
from merging.hub.client import Unreachable, api, explain_error, offline, with_retries
from merging.hub.hub_file import HubFile
from merging.hub.mirror import WEIGHTS, Mirror, is_safe, make_link, mirrors_folder
from merging.hub.object_folder import open_object_folder

__all__ = ["Repository", "open_repository"]

_PLANNED = ("README.md", "config.json", "adapter_config.json", "model_index.json", "modules.json", "*.index.json")
"""Names of the files from which a merge is planned, in addition to the headers of the weights."""

_KNOWN: dict[str, Repository] = {}
"""The opened repositories, by their commits."""


class Repository(Mirror):
    """A repository on the Hub at one commit."""

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.commit}"

    def download_small(self, name: str) -> None:
        make_link(self.folder / name, _download(self, name))


def open_repository(address: Address) -> Mirror:
    """Open the repository or folder of an address, and download a few small files.

    The revision of a repository is resolved once to a commit. Raises :class:`~merging.errors.InputError` if it does not
    exist, is not visible, or cannot be reached.
    """
    repository = open_object_folder(address) if address.in_store else _open_on_hub(address)
    if address.path and address.path not in repository.sizes:
        inside = f"{address.path}/"
        if not any(name.startswith(inside) for name in repository.sizes):
            raise InputError(
                f"{address}: {address.repo} holds no such file or folder{nearest(address.path, repository.sizes)}"
            )
    under = address.path if address.path not in repository.sizes else address.path.rpartition("/")[0]
    repository.download_files([pattern for each in _PLANNED for pattern in (each, f"*/{each}")], under)
    return repository


def _open_on_hub(address: Address) -> Repository:
    known = _KNOWN.get(str(Address(address.repo, address.revision)))
    if known is None:
        known = _open_cached(address) if offline() else _ask_hub(address.repo, address.revision)
        _KNOWN[known.name] = known
    return known


def _ask_hub(repo: str, revision: str | None) -> Repository:
    """Open a repository on the Hub, and mirror it with placeholders for its weights."""
    name = f"{repo}@{revision}" if revision else repo
    try:
        info = with_retries(lambda: api().model_info(repo, revision=revision, files_metadata=True), name)
    except Unreachable as error:
        reason = str(error).removeprefix(f"{name}: ")
        raise Unreachable(f"{name}: there is no such file or folder here, and {reason}") from None
    siblings = info.siblings or []
    folder = mirrors_folder() / repo / info.sha
    sizes = {each.rfilename: each.size or 0 for each in siblings if is_safe(each.rfilename)}
    found = Repository(repo, info.sha, folder, sizes)
    for each in siblings:
        if each.rfilename in found.sizes and each.rfilename.endswith(WEIGHTS):
            sha256 = each.lfs.sha256 if each.lfs else None
            found.add_weights(
                HubFile(
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
