"""What a user writes to name a model on the Hub: ``org/name``, ``org/name@revision``, ``hf://...``, or a page's URL."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from merging.errors import InputError, nearest

__all__ = ["Address", "hub_address", "local_path", "no_such_path"]

_SCHEME = "hf://"
_PART = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(r"refs/(?:pr|convert)/[^/%]+")
_WRITTEN = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".ckpt", ".gguf", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Address:
    """A model on the Hub: ``repo`` is ``org/name``, ``path`` a folder or file in it, empty for all of it."""

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        whole = self.revision and _REFERENCE.fullmatch(self.revision)
        revision = self.revision if whole else quote(self.revision or "", safe="")  # as of a branch called a/b
        return f"{self.repo}{'@' * bool(revision)}{revision}{'/' + self.path if self.path else ''}"


def local_path(name: str) -> Path:
    """The path that a name means; ``~`` is the home folder, where there is one.

    Raises :class:`~merging.errors.InputError` for what the system takes for no path.
    """
    if not name:
        raise InputError("a model has an empty name: is a variable of a script not set?")
    path = Path(name)
    with suppress(
        RuntimeError, ValueError
    ):  # ~nobody, of whom there is none, is a name as any other, as it is to a shell
        path = path.expanduser()
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"{name}: cannot be looked for: {error.strerror}") from None
    return path


def no_such_path(path: Path) -> InputError:
    """The refusal of a local path where nothing is, with the name there that is nearest to it."""
    try:
        near = nearest(path.name, [each.name for each in path.parent.iterdir()])
    except OSError:
        near = ""
    hint = near or (": the Hub is meant by hf://ORG/NAME" if _WRITTEN.fullmatch(str(path)) else "")
    return InputError(f"{path}: there is no such file or folder{hint}")


def hub_address(name: str) -> Address | None:
    """The address that a name means, or None for one that is a local path.

    What exists locally is local; ``hf://`` forces the Hub. ``org/name`` with nothing more is the Hub if it can be
    nothing else: no such folder, no ending of a file, no folder ``org`` here. A single word is never the Hub. Raises
    :class:`~merging.errors.InputError` for something that begins as an address and is none.
    """
    if name.startswith(_SCHEME):
        return _parsed(name, name[len(_SCHEME) :])
    if name.startswith(("https://", "http://")):
        return _from_url(name)
    written = _WRITTEN.fullmatch(name)
    if written is None or local_path(name).exists():
        return None
    if written["revision"] is None:
        local = written["path"] is not None or name.endswith(_FILES) or Path(name).parent.is_dir()
        return None if local else Address(name)
    return _parsed(name, name)


def _parsed(name: str, text: str) -> Address:
    written = _WRITTEN.fullmatch(text)
    if written is None or text.encode(errors="replace").decode() != text:
        raise InputError(f"{name}: is no address on the Hub: write hf://org/name@revision/path/in/it")
    path = (written["path"] or "").rstrip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise InputError(f"{name}: {path} is no path in a repository")
    return Address(written["repo"], unquote(written["revision"]) if written["revision"] else None, path)


def _from_url(url: str) -> Address:
    """The address of a page or file: ``https://HOST/org/name[/(tree|blob|resolve)/revision[/path]]``."""
    from huggingface_hub import constants

    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url}: is no address: {error}") from None
    ours = urlsplit(constants.ENDPOINT).netloc
    if parts.netloc not in (*_HOSTS, ours):
        raise InputError(f"{url}: is not on the Hub ({ours}): download it, and name the file")
    words = unquote(parts.path).strip("/").split("/")
    if len(words) < 2 or (len(words) > 2 and (words[2] not in ("tree", "blob", "resolve") or len(words) < 4)):
        raise InputError(f"{url}: is no page of a model: copy the address of the model, or of a file of it")
    revision = "@" + words[3] if len(words) > 3 else ""
    path = words[4:]
    if words[3:4] == ["refs"]:
        revision, path = "@" + "/".join(words[3:6]), words[6:]
    return _parsed(url, "/".join(words[:2]) + revision + ("/" + "/".join(path) if path else ""))
