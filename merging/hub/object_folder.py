"""A model's folder in an object store in one state, mirrored as a folder that every reader of models understands."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from merging.display.tables import format_size
from merging.errors import FormatError, InputError
from merging.hub.address import Address
from merging.hub.mirror import WEIGHTS, Mirror, is_safe, mirrors_folder
from merging.hub.object_file import ObjectFile
from merging.object_stores.objects import StoredObject, find_object, list_folder
from merging.object_stores.retries import Unreachable
from merging.sources.small_files import LIST_LIMIT

__all__ = ["ObjectFolder", "open_object_folder"]


@dataclass(frozen=True, slots=True, eq=False)
class ObjectFolder(Mirror):
    """A folder of an object store, or a file and its neighbours, with the state of each file."""

    objects: dict[str, StoredObject] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.repo

    def download_small(self, name: str) -> None:
        stored = self.objects[name]
        if stored.size > LIST_LIMIT:
            raise FormatError(f"{stored.address}: has {format_size(stored.size)}, more than {format_size(LIST_LIMIT)}")
        content = stored.read(0, stored.size) if stored.size else b""
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)


_KNOWN: dict[tuple[str, str], ObjectFolder] = {}
"""The opened folders, by their addresses and states."""


def open_object_folder(address: Address) -> ObjectFolder:
    """Open the folder of an address in a store; of a file's address, the folder that it is in, without inner folders.

    Raises:
        InputError: It does not exist or cannot be reached, or is no longer in the state that the address states.
    """
    known = _KNOWN.get((address.repo, address.revision or ""))
    if known is not None:
        return known
    listed = _list_neighbours(address) if address.path else list_folder(address.repo)
    objects = {name: stored for name, stored in sorted(listed.items()) if is_safe(name)}
    state = _key_of(objects)
    if address.revision is not None and state != address.revision:
        raise InputError(f"{address}: changed since it was opened: try again when it is complete")
    known = _KNOWN.get((address.repo, state))
    if known is None:
        known = _KNOWN[address.repo, state] = _mirror(address.repo, state, objects)
    return known


def _list_neighbours(address: Address) -> dict[str, StoredObject]:
    """List the files next to a file; the file alone where the store lets nobody list its folder."""
    try:
        return list_folder(address.repo, depth=1)
    except Unreachable:  # a file alone may mean something else than next to its config
        raise
    except InputError:
        return {address.path: find_object(str(address))}


def _key_of(objects: dict[str, StoredObject]) -> str:
    """Return a key of the names and states of all files."""
    lines = [f"{name} {stored.size} {stored.version}\n" for name, stored in objects.items()]
    return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()[:16]


def _mirror(repo: str, state: str, objects: dict[str, StoredObject]) -> ObjectFolder:
    folder = Path(tempfile.mkdtemp(dir=mirrors_folder()))
    sizes = {name: stored.size for name, stored in objects.items()}
    mirror = ObjectFolder(repo, state, folder, sizes, objects=objects)
    for name, stored in objects.items():
        if name.endswith(WEIGHTS):
            mirror.add_weights(ObjectFile(repo, name, Path(folder, name), stored))
    return mirror
