"""Methods on full changes of tensors of every kind, against their naive references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merging.errors import OptionError
from support import references
from support.changes import EXACT, F32, F64, Q, changes, close, merged
from support.on_models import by_kind, doubles, dtypes, flat, mean, places, thinned, weighted, within
from support.references import flatten

# Name -> (method, parameters, reference on state dicts in float64)
ENTRIES: Any = {
    "sce": ("sce", {}, flat(references.sce)),
    "sce-scaled": ("sce", {"density": 0.4, "scale": 0.5}, flat(lambda x: references.sce(x, 0.4, scale=0.5))),
    "sce-deltas": ("sce", {"density": 0.3, "select": "deltas"}, flat(lambda x: references.sce(x, 0.3, "deltas"))),
    "sce-all": ("sce", {"density": 1.0, "select": "deltas"}, flat(lambda x: references.sce(x, 1.0))),
    "varm": ("varm", {"scale": 0.7}, flat(lambda x: references.varm(x, 0.7))),
    "ram": ("ram", {"scale": 0.7}, flat(lambda x: references.ram(x, scale=0.7))),
    "ram-wide": ("ram", {"epsilon": 0.5}, flat(lambda x: references.ram(x, 0.5))),
    "ram-absolute": ("ram", {"epsilon": 5e-3, "relative": False}, flat(lambda x: references.ram(x, 5e-3, False))),
    "ramplus": ("ramplus_tl", {"epsilon": 0.5}, flat(lambda x: references.ram(x, 0.5, r=0.1, alpha=0.2))),
    "ramplus-open": (
        "ramplus_tl",
        {"epsilon": 0.5, "r": 0.7, "alpha": 30.0, "scale": 0.3},
        flat(lambda x: references.ram(x, 0.5, scale=0.3, r=0.7, alpha=30.0)),
    ),
    "model_stock": ("model_stock", {}, flat(references.model_stock)),
    "multislerp": ("multislerp", {"space": "changes"}, flat(references.multislerp)),
    "multislerp-weighted": (
        "multislerp",
        {"space": "changes", "weights": (0.5, 1.0, 0.3), "normalize": False},
        flat(lambda x: references.multislerp(x, (0.5, 1.0, 0.3), False)),
    ),
    "karcher": ("karcher", {"space": "changes"}, flat(references.karcher)),
    "karcher-weighted": (
        "karcher",
        {"space": "changes", "weights": (0.5, 1.0, 0.3), "max_iter": 100, "tol": 1e-12},
        flat(lambda x: references.karcher(x, (0.5, 1.0, 0.3), 100, 1e-12)),
    ),
    "karcher-one-step": (
        "karcher",
        {"space": "changes", "weights": (0.5, 1.0, 0.3), "max_iter": 1},
        flat(lambda x: references.karcher(x, (0.5, 1.0, 0.3), 1)),
    ),
    "tsv": ("tsv", {"scale": 0.7}, lambda m: by_kind(m, lambda x: references.tsv(x, 0.7), mean(0.7))),
    "iso_c": ("iso_c", {}, lambda m: by_kind(m, references.iso_c, mean(1.5))),
    "iso_c-tables": ("iso_c", {"embeddings": True}, lambda m: by_kind(m, references.iso_c, mean(1.5), True)),
    "iso_cts": ("iso_cts", {}, lambda m: by_kind(m, references.iso_cts, mean(1.5))),
    "iso_cts-tables": (
        "iso_cts",
        {"scale": 0.7, "common": 0.4, "embeddings": True},
        lambda m: by_kind(m, lambda x: references.iso_cts(x, 0.7, 0.4), mean(0.7), True),
    ),
    "wudi": ("wudi", {"scale": 0.7}, lambda m: by_kind(m, lambda x: references.wudi(x, 0.7), mean(0.7))),
    "wudi-tables": ("wudi", {"embeddings": True}, lambda m: by_kind(m, references.wudi, mean(), True)),
    "tsv-tables": ("tsv", {"embeddings": True}, lambda m: by_kind(m, references.tsv, mean(), True)),
    "actmat": ("actmat", {"scale": 0.7}, lambda m: by_kind(m, lambda x: references.actmat(x, 0.7), mean(0.7))),
    "ace": ("ace", {"scale": 0.7}, lambda m: by_kind(m, lambda x: references.ace(x, 0.7), mean(0.7))),
    "ace-unequal": (
        "ace",
        {"epsilon": 0.1, "threshold": 0.0},
        lambda m: by_kind(m, lambda x: references.ace(x, epsilon=0.1, threshold=0.0), mean()),
    ),
    "star": ("star", {"eta": 0.6}, lambda m: by_kind(m, lambda x: references.star(x, eta=0.6), mean())),
    "star-tables": ("star", {"embeddings": True}, lambda m: by_kind(m, references.star, mean(), True)),
    "dc_merge": ("dc_merge", {}, lambda m: by_kind(m, references.dc_merge, mean(1.2))),
    "dc_merge-own": (
        "dc_merge",
        {"keep": 0.1, "smooth": "linear", "scale": 0.7},
        lambda m: by_kind(m, lambda x: references.dc_merge(x, 0.7, 0.1, "linear"), mean(0.7)),
    ),
    "dop": ("dop", {"scale": 0.7}, lambda m: by_kind(m, lambda x: references.dop(x, scale=0.7), mean(0.7))),
    "geometric_median": ("geometric_median", {"scale": 0.7}, flat(lambda x: references.geometric_median(x, None, 0.7))),
    "geometric_median-weighted": (
        "geometric_median",
        {"weights": (0.5, 1.0, 0.3)},
        flat(lambda x: references.geometric_median(x, (0.5, 1.0, 0.3))),
    ),
    "svd": ("svd", {}, lambda m: by_kind(m, references.svd, lambda x: x.sum(0))),
    "svd-weighted": (
        "svd",
        {"energy": 0.6, "weights": EXACT, "scale": 0.7, "embeddings": True},
        lambda m: by_kind(
            m, lambda x: references.svd(x, 0.6, weights=EXACT, scale=0.7), lambda x: 0.7 * weighted(x), True
        ),
    ),
    "svd-components": (
        "svd",
        {"energy": 1.0, "max_rank": 3},
        lambda m: by_kind(m, lambda x: references.svd(x, 1.0, 3), lambda x: x.sum(0)),
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
@dtypes
def test_full_changes(name: str, dtype: torch.dtype) -> None:
    method, options, reference = ENTRIES[name]
    for seed in (1, 2):
        models = changes(3, seed, dtype, places(method))
        got = merged(models, method, **options)
        assert got.dtype == dtype
        assert close(got.double(), reference(doubles(models)), within(dtype))


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "ram-absolute"])
def test_results_scale_with_the_changes(name: str) -> None:
    """No cut-off is a number of its own."""
    method, options, _ = ENTRIES[name]
    models = changes(3, 1, F32, places(method))
    wanted = merged(models, method, **options).double()
    for factor in (1e-6, 1e6):
        scaled = [{place: value * factor for place, value in each.items()} for each in models]
        assert close(merged(scaled, method, **options).double() / factor, wanted, 2e-5)


@pytest.mark.parametrize("name", [name for name in ENTRIES if "weights" not in ENTRIES[name][1]])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_any_number_of_models(name: str, count: int) -> None:
    method, options, reference = ENTRIES[name]
    models = changes(count, 5, F64, places(method))
    if (method, count) == ("model_stock", 1):
        with pytest.raises(OptionError, match="at least 2 models"):
            merged(models, method, **options)
        return
    assert close(merged(models, method, **options), reference(models), 1e-9)


@pytest.mark.parametrize("name", ENTRIES)
def test_changes_of_zero(name: str) -> None:
    """All zero, one of them, and some tensors of one: no division by zero, and what the reference says."""
    method, options, reference = ENTRIES[name]
    models = changes(3, 6, F64, places(method))
    nothing = {place: 0 * value for place, value in models[0].items()}
    half = {place: value if place == Q else 0 * value for place, value in models[1].items()}
    assert not merged([nothing] * 3, method, **options).any()
    for chosen in ([models[0], nothing, models[2]], [models[0], half, models[2]]):
        got = merged(chosen, method, **options)
        assert got.isfinite().all()
        assert close(got, reference(chosen), 1e-9)


@pytest.mark.parametrize("method", ["magmax", "consensus", "pcb", "dare-inverse", "dare-l1"])
def test_coefficients_of_doubles_are_doubles(method: str) -> None:
    models, (name, _, rescale) = changes(2, 1, F64), method.partition("-")
    if name == "dare":
        wanted = thinned(models, 0.9, rescale, 0, "ab").sum(0)
        assert close(merged(models, name, drop=0.9, rescale=rescale, keys="ab"), wanted, 1e-12)
    else:
        wanted = getattr(references, name)(flatten(models), weights=(0.7, 1.3))
        assert close(merged(models, name, weights=(0.7, 1.3)), wanted, 1e-12)
