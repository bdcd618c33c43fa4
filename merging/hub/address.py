"""Addresses of models: on the Hub, ``org/name@revision``, ``hf://...``, or the URL of a page; in a store, ``s3://...``."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from merging.errors import InputError, nearest
from merging.object_stores.address import check_address, file_path, hide_secrets, is_store_address
from merging.object_stores.store_path import StorePath

__all__ = ["Address", "hub_address", "local_path", "no_such_path", "path_of_name", "resolve_path"]

_SCHEME = "hf://"
_FILE_SCHEME = "file://"
_PART = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(r"refs/(?:pr|convert)/[^/%]+")
_WRITTEN = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".ckpt", ".gguf", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Address:
    """A model on the Hub or in an object store.

    Attributes:
        repo: ``org/name``, or the address of a folder in a store.
        revision: A branch, tag or commit; in a store the key of a folder's state, which no name shows.
        path: A folder or file in it, empty for all of it.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    @property
    def in_store(self) -> bool:
        """Whether it is in an object store, and not on the Hub."""
        return is_store_address(self.repo)

    def __str__(self) -> str:
        if self.in_store:
            return f"{self.repo}/{self.path}" if self.path else self.repo
        whole = self.revision and _REFERENCE.fullmatch(self.revision)
        revision = self.revision if whole else quote(self.revision or "", safe="")  # as of a branch called a/b
        name = f"{self.repo}@{revision}" if revision else self.repo
        return f"{name}/{self.path}" if self.path else name


def local_path(name: str) -> Path:
    """Return the path that a name means: ``~`` is the home folder, where there is one, and ``file:///a`` is ``/a``.

    Raises :class:`~merging.errors.InputError` if the name is empty, or no valid path.
    """
    if not name:
        raise InputError("a model has an empty name: is a variable of a script not set?")
    path = file_path(name) if name.startswith(_FILE_SCHEME) else Path(name)
    with suppress(RuntimeError, ValueError):  # a ~name without such a user is an ordinary name, as in a shell
        path = path.expanduser()
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"{name}: cannot be looked for: {error.strerror}") from None
    return path


def resolve_path(path: Path) -> Path:
    """Return the absolute path without links, also where none leads: a loop of links, or a name with a NUL byte."""
    if isinstance(path, StorePath):
        return path
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a loop, before Python 3.13
        return path.absolute()


def path_of_name(name: str) -> Path:
    """Return the path that stands for a model's name in messages and records."""
    in_store = is_store_address(name) and not name.startswith(_FILE_SCHEME)
    path: Path = StorePath(name) if in_store else Path(name)
    return path


def no_such_path(path: Path) -> InputError:
    """Return the error for a local path that does not exist, with the most similar existing name.

    A link that leads nowhere has an error of its own.
    """
    with suppress(OSError, ValueError):  # a name with a NUL byte is none
        return InputError(f"{path}: is a link to {path.readlink()}, which leads to no file or folder")
    try:
        near = nearest(path.name, [each.name for each in path.parent.iterdir()])
    except OSError:
        near = ""
    hint = near or (": the Hub is meant by hf://ORG/NAME" if _WRITTEN.fullmatch(str(path)) else "")
    return InputError(f"{path}: there is no such file or folder{hint}")


def hub_address(name: str) -> Address | None:
    """Return the address that a name means, on the Hub or in an object store; None for a local path.

    An existing path is local; ``hf://`` forces the Hub, and ``s3://`` and its like an object store. A plain
    ``org/name`` is an address if nothing suggests a path: it does not exist, has no file's ending, and there is no
    folder ``org``. A single word is never an address. Raises :class:`~merging.errors.InputError` for a malformed
    address.
    """
    if is_store_address(name):
        return None if name.startswith(_FILE_SCHEME) else _in_store(check_address(name))
    if name.startswith(_SCHEME):
        return _parse(name, name[len(_SCHEME) :])
    if name.startswith(("https://", "http://")):
        return _from_url(name)
    written = _WRITTEN.fullmatch(name)
    if written is None or local_path(name).exists():
        return None
    if written["revision"] is None:
        local = written["path"] is not None or name.endswith(_FILES) or Path(name).parent.is_dir()
        return None if local else Address(name)
    return _parse(name, name)


def _parse(name: str, text: str) -> Address:
    written = _WRITTEN.fullmatch(text)
    if written is None or text.encode(errors="replace").decode() != text:
        raise InputError(f"{name}: is not an address on the Hub: write hf://org/name@revision/path/in/it")
    path = (written["path"] or "").rstrip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise InputError(f"{name}: {path} is not a path in a repository")
    return Address(written["repo"], unquote(written["revision"]) if written["revision"] else None, path)


def _in_store(address: str) -> Address:
    """Return the address of a folder, or of a file in its folder."""
    folder, _, name = address.rpartition("/")
    is_file = name.endswith(_FILES) and not folder.endswith("/")
    return Address(folder, path=name) if is_file else Address(address)


def _from_url(url: str) -> Address:
    """Return the address of a page or file: ``https://HOST/org/name[/(tree|blob|resolve)/revision[/path]]``."""
    from huggingface_hub import constants

    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{hide_secrets(url)}: is not an address: {error}") from None
    ours = urlsplit(constants.ENDPOINT).netloc
    if parts.netloc not in (*_HOSTS, ours):
        raise InputError(f"{hide_secrets(url)}: is not on the Hub ({ours}): download it, and name the file")
    words = unquote(parts.path).strip("/").split("/")
    if len(words) < 2 or (len(words) > 2 and (words[2] not in ("tree", "blob", "resolve") or len(words) < 4)):
        raise InputError(
            f"{hide_secrets(url)}: is not a page of a model: copy the address of the model, or of a file of it"
        )
    revision = "@" + words[3] if len(words) > 3 else ""
    path = words[4:]
    if words[3:4] == ["refs"]:
        revision, path = "@" + "/".join(words[3:6]), words[6:]
    return _parse(hide_secrets(url), "/".join(words[:2]) + revision + ("/" + "/".join(path) if path else ""))
