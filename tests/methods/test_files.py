"""Methods on files with a tensor of more than a tile, with one thread and with several, as in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import merging
from merging.plan.items import TILE
from support.changes import LARGE, changes, close
from support.on_models import plus, weights_merged
from support.references import flatten
from support.tiny import load, save


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("della", {}),
        ("della", {"rescale": "l1"}),
        ("breadcrumbs", {}),
        ("sce", {}),
        ("sce", {"select": "deltas", "density": 0.4}),
        ("varm", {}),
        ("ram", {}),
        ("ramplus_tl", {"epsilon": 0.5}),
        ("model_stock", {}),
        ("model_stock", {"filter_wise": True}),
        ("multislerp", {"space": "changes"}),
        ("karcher", {"space": "changes"}),
        ("nuslerp", {"axis": "flat"}),
        ("nuslerp", {"axis": "rows", "space": "changes"}),
        ("nuslerp", {"axis": "columns"}),
        ("nearswap", {"t": 0.02}),
        ("arcee_fusion", {}),
        ("passthrough", {"scale": 0.5}),
        ("tsv", {}),
        ("knots+ties", {}),
    ],
    ids=str,
)
def test_from_files(method: str, options: Any, large: Any) -> None:
    """A tensor of more than a tile, with one thread and with several, as in memory."""
    count = {"nearswap": 1, "passthrough": 1, "nuslerp": 2, "arcee_fusion": 2}.get(method, 3)
    given = {} if method == "arcee_fusion" else {"base": large.base}
    paths = large.paths[:count]
    origin = {} if method == "arcee_fusion" else {"base": large.origin}
    keys = merging.preview(paths, method=method, **origin, **options).keys
    wanted = weights_merged(large.models[:count], method, keys=keys, **given, **options)
    for threads in (1, 3):
        merging.merge(paths, method=method, output=large.output, threads=threads, overwrite=True, **origin, **options)
        got = flatten([load(large.output)])[0]
        assert close(got, wanted, 1e-6)
        assert float(((got - wanted).abs() > 1e-4).double().mean()) == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three fine-tunes of a base in files, a matrix and a vector of more than a tile."""
    folder = tmp_path_factory.mktemp("large")
    shapes = LARGE | {"layers.2.bias": (TILE + 5,)}
    (base,) = changes(1, 9, shapes=shapes)
    models = plus(base, changes(3, shapes=shapes))
    paths = [save(folder / f"tuned{i}", each, shards=1 + i % 2) for i, each in enumerate(models)]
    return SimpleNamespace(
        base=base, models=models, paths=paths, origin=save(folder / "base", base), output=folder / "out"
    )
