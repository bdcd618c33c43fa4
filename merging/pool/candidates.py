"""The sources of adapters: files, folders, object stores, and the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from merging.errors import InputError
from merging.hub.address import Address, hub_address, local_path, no_such_path
from merging.hub.query import Query
from merging.hub.repository import open_repository
from merging.pool.audit import Candidate

__all__ = ["candidates_in", "candidates_of"]

_WEIGHTS = (".safetensors", ".bin", ".pt")
_MARK = re.compile(r"adapter_config\.json|adapter_model\.[^/]*")
"""The files that mark the folder of an adapter."""


def candidates_in(path: str | Path) -> list[Candidate]:
    """List the adapters at a path or address: the adapter itself, or all adapters in a folder, by name.

    Raises :class:`~merging.errors.InputError` if there is no adapter.
    """
    address = hub_address(str(path))
    if address is not None and address.in_store:
        return [Candidate(each) for each in _adapters_in_store(address)]
    if address is not None:
        return [Candidate(str(address), address.repo.partition("/")[0])]
    path = local_path(str(path))
    if not path.exists():
        raise no_such_path(path)
    if path.is_file() or _is_adapter(path):
        return [Candidate(str(path.resolve()))]
    inside = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    found = [each for each in inside if each.suffix in _WEIGHTS or (each.is_dir() and _is_adapter(each))]
    if not found:
        raise InputError(f"{path}: holds no adapter, and no folder with an adapter")
    return [Candidate(str(each.resolve())) for each in found]


def candidates_of(query: Query) -> list[Candidate]:
    """List the adapters that a query finds on the Hub, the most downloaded first."""
    return [
        Candidate(str(each.address), each.repo.partition("/")[0], each.created.isoformat(), each.downloads, each.gated)
        for each in sorted(query.models(), key=lambda each: -each.downloads)
    ]


def _adapters_in_store(address: Address) -> list[str]:
    """Return the addresses of the adapter at an address in a store, or of all adapters in its folder."""
    inside = open_repository(address).sizes
    if address.path or any(_MARK.fullmatch(name) for name in inside):
        return [str(address)]
    folders = {name.partition("/")[0] for name in inside if _MARK.fullmatch(name.partition("/")[2])}
    found = sorted(folders | {name for name in inside if "/" not in name and name.endswith(_WEIGHTS)})
    if not found:
        raise InputError(f"{address}: holds no adapter, and no folder with an adapter")
    return [f"{address}/{name}" for name in found]


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or any(folder.glob("adapter_model.*"))
