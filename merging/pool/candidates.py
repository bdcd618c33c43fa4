"""The sources of adapters: files, folders, and the Hub."""

from __future__ import annotations

from pathlib import Path

from merging.errors import InputError
from merging.hub.address import hub_address, no_such_path
from merging.hub.query import Query
from merging.pool.audit import Candidate

__all__ = ["candidates_in", "candidates_of"]

_WEIGHTS = (".safetensors", ".bin", ".pt")


def candidates_in(path: str | Path) -> list[Candidate]:
    """List the adapters at a path or address: the adapter itself, or all adapters in a folder, by name.

    Raises :class:`~merging.errors.InputError` if there is no adapter.
    """
    address = hub_address(str(path))
    if address is not None:
        return [Candidate(str(address), address.repo.partition("/")[0])]
    path = Path(path).expanduser()
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


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or any(folder.glob("adapter_model.*"))
