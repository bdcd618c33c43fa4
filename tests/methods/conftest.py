"""Models in files, one tensor of which takes more than a tile."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import merging
from support.changes import LARGE, changes
from support.references import unflatten
from support.tiny import load, save


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three models of a base in files, one tensor of more than a tile; their changes, and how to merge them."""
    folder, count = tmp_path_factory.mktemp("files"), itertools.count()
    base = changes(1, 9, shapes=LARGE)[0]
    tuned = [{name: base[name] + each[name] for name in LARGE} for each in changes(3, shapes=LARGE)]
    taus = [{name: each[name] - base[name] for name in LARGE} for each in tuned]
    paths = [save(folder / f"tuned{i}", each, shards=1 + i % 2) for i, each in enumerate(tuned)]
    origin = save(folder / "base", base)

    def merge(method: str, **options: Any) -> Any:
        output = folder / f"out{next(count)}"
        merging.merge(paths, method=method, base=origin, output=output, **options)
        return load(output)

    def plus(change: Tensor) -> Any:
        return {name: base[name] + value for name, value in unflatten(change, base).items()}

    return SimpleNamespace(base=base, changes=taus, paths=paths, origin=origin, merge=merge, plus=plus)
