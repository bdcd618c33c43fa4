"""The state of a run's inputs, to notice before a run is resumed that models were changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from merging.api.resuming import states_of
from merging.hub.address import hub_address, local_path
from merging.hub.open_model import open_model

__all__ = ["input_states"]


def input_states(names: Iterable[str]) -> list[list[str]]:
    """Return the name of each input with a digest of the state of its files, in their order.

    The state of a local file is its size and the time of its last change; of a file on the Hub, its ETag or commit.
    """
    return [[name, _digest(name)] for name in names]


def _digest(name: str) -> str:
    states = states_of(open_model(name)) if hub_address(name) is not None else _local_states(local_path(name))
    return hashlib.sha256(json.dumps(states, sort_keys=True).encode()).hexdigest()[:16]


def _local_states(path: Path) -> dict[str, list[int]]:
    files = path.glob("*") if path.is_dir() else [path]
    found = {file.name: file.stat() for file in files if file.is_file()}
    return {file: [status.st_size, status.st_mtime_ns] for file, status in found.items()}
