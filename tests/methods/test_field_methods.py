"""Methods of the wider field against their naive references: entries, angles and spectra, on full changes and factors.

Rows of the golden table, random changes of all kinds of tensors, factors of many shapes, and what must never happen.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, equal

import merging
from merging.errors import InputError, OptionError
from merging.maths.delta import LowRank, Stack
from merging.maths.layers import Stacks
from merging.maths.site import site_of
from merging.methods import chain
from merging.methods.contract.wrapper import unwrap_outer
from merging.plan.items import TILE
from support import field_references as field
from support.changes import (
    EXACT,
    EXPERTS,
    F32,
    F64,
    LARGE,
    PLACES,
    K,
    Q,
    by_tensor,
    changes,
    close,
    dense,
    merged,
    written,
)
from support.paths import SHIPPED
from support.references import GOLDEN, flatten, golden_adapters, ties
from support.tiny import load, save

TABLE = "embed_tokens.weight"
MATRICES = (Q, K, "layers.0.k.weight", "layers.1.q.weight")
Function = Callable[[Tensor], Tensor]


def flat(function: Function) -> Any:
    """A reference on flat changes `[n, d]`, on each tensor alone."""
    return lambda models: by_tensor(models, lambda part: function(flatten(part)))


def rows(function: Function) -> Any:
    """A reference on the last axis of `[n, ..., c]`, on each tensor alone."""
    return lambda models: torch.cat([function(side_by_side(models, name)).flatten() for name in sorted(models[0])])


def side_by_side(models: Any, name: str) -> Tensor:
    return torch.stack([each[name] for each in models])


def by_kind(models: Any, matrix: Function, other: Function, tables: bool = False) -> Tensor:
    """A reference on matrices `[n, out, in]` and experts one by one, flat, and another one on all other tensors.

    With `tables` also on embeddings, whose inputs are their rows.
    """

    def one(name: str) -> Tensor:
        x = side_by_side(models, name)
        if name == EXPERTS:
            return torch.stack([matrix(expert) for expert in x.transpose(0, 1)])
        if name == TABLE and tables:
            return matrix(x.mT).mT
        return matrix(x) if name in MATRICES else other(x)

    return torch.cat([one(name).flatten() for name in sorted(models[0])])


def doubles(models: Any) -> Any:
    return [{name: value.double() for name, value in each.items()} for each in models]


def within(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == F32 else 1e-10


def places(method: str) -> Any:
    """The shapes to merge; numbers alone may be opposite, and have no Karcher mean then."""
    return {name: shape for name, shape in PLACES.items() if method != "karcher" or shape != (1,)}


dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


# ---- Golden numbers


def knots_ties(tau: Tensor, density: float = 0.2, scale: float = 1.0) -> Tensor:
    u, parts = field.knots(tau)
    merged_parts = ties(parts.flatten(1), density, scale=scale) if tau.any() else parts[0]
    return u @ merged_parts.view(parts.shape[1:])


def core_ties(tau: Tensor, density: float = 0.2, scale: float = 1.0) -> Tensor:
    u, v, parts = field.core(tau)
    merged_parts = ties(parts.flatten(1), density, scale=scale) if tau.any() else parts[0]
    return u @ merged_parts.view(parts.shape[1:]) @ v.T


def on_flat(function: Any, **options: Any) -> Function:
    return lambda tau: function(tau.flatten(1), **options).view(tau.shape[1:])


ALL = [0, 1, 2]
# Row -> (adapters, method, parameters, reference)
GOLD: Any = {
    f"SCE t={t} {select}": (ALL, "sce", {"density": t, "select": select}, on_flat(field.sce, density=t, select=select))
    for t, select in itertools.product([0.1, 0.5], ["deltas", "weights"])
}
GOLD |= {
    "VaRM": (ALL, "varm", {}, on_flat(field.varm)),
    "SCE t=1": (ALL, "sce", {"density": 1.0}, on_flat(field.sce, density=1.0)),
    "KnOTS-TIES keep 1": (ALL, "knots+ties", {"density": 1.0}, lambda tau: knots_ties(tau, 1.0)),
    "KnOTS-TIES keep 0.2": (ALL, "knots+ties", {}, knots_ties),
    "TSV-M, T=2 (i=0,1), k=2": ([0, 1], "tsv", {}, field.tsv),
    "Iso-C on D_0+D_1, rank-restricted (R=4)": ([0, 1], "iso_c", {"scale": 1.0}, lambda tau: field.iso_c(tau, 1.0)),
    "mean": (ALL, "knots+linear", {}, lambda tau: tau.mean(0)),
    "same w on deltas": (ALL, "core", {"weights": (0.5, -0.3, 0.8)}, None),
    "D_0": ([0], "passthrough", {}, None),
    "D_1": ([1], "svd", {"energy": 1.0}, lambda tau: field.svd(tau, 1.0)),
    "D_2": ([2], "wudi", {}, field.wudi),
}


@pytest.mark.parametrize("row", GOLD)
def test_golden(row: str) -> None:
    """From factors and from full changes; and the references themselves."""
    which, method, options, reference = GOLD[row]
    adapters = [{Q: LowRank(*golden_adapters()[i], (6, 5))} for i in which]
    found = [merged(inputs, method, **options).view(6, 5) for inputs in (adapters, written(adapters))]
    if reference is not None:
        found.append(reference(side_by_side(written(adapters), Q)))
    for got in found:
        numbers = [float(x) for x in (got.norm(), got.sum(), got[0, 0], got[-1, -1])]
        assert numbers == pytest.approx(GOLDEN[row], abs=6e-7)


# ---- Every kind of tensor, full changes


def mean(scale: float = 1.0) -> Function:
    return lambda x: scale * x.mean(0)


def weighted(x: Tensor) -> Tensor:
    return torch.tensordot(x.new_tensor(EXACT), x, 1)


# Name -> (method, parameters, reference on state dicts in float64)
ENTRIES: Any = {
    "sce": ("sce", {}, flat(field.sce)),
    "sce-scaled": ("sce", {"density": 0.4, "scale": 0.5}, flat(lambda x: field.sce(x, 0.4, scale=0.5))),
    "sce-deltas": ("sce", {"density": 0.3, "select": "deltas"}, flat(lambda x: field.sce(x, 0.3, "deltas"))),
    "sce-all": ("sce", {"density": 1.0, "select": "deltas"}, flat(lambda x: field.sce(x, 1.0))),
    "varm": ("varm", {"scale": 0.7}, flat(lambda x: field.varm(x, 0.7))),
    "ram": ("ram", {"scale": 0.7}, flat(lambda x: field.ram(x, scale=0.7))),
    "ram-wide": ("ram", {"epsilon": 0.5}, flat(lambda x: field.ram(x, 0.5))),
    "ram-absolute": ("ram", {"epsilon": 5e-3, "relative": False}, flat(lambda x: field.ram(x, 5e-3, False))),
    "ramplus": ("ramplus_tl", {"epsilon": 0.5}, flat(lambda x: field.ram(x, 0.5, r=0.1, alpha=0.2))),
    "ramplus-open": (
        "ramplus_tl",
        {"epsilon": 0.5, "r": 0.7, "alpha": 30.0, "scale": 0.3},
        flat(lambda x: field.ram(x, 0.5, scale=0.3, r=0.7, alpha=30.0)),
    ),
    "model_stock": ("model_stock", {}, flat(field.model_stock)),
    "multislerp": ("multislerp", {"space": "changes"}, flat(field.multislerp)),
    "multislerp-weighted": (
        "multislerp",
        {"space": "changes", "weights": (0.5, 1.0, 0.3), "normalize": False},
        flat(lambda x: field.multislerp(x, (0.5, 1.0, 0.3), False)),
    ),
    "karcher": ("karcher", {"space": "changes"}, flat(field.karcher)),
    "karcher-weighted": (
        "karcher",
        {"space": "changes", "weights": (0.5, 1.0, 0.3), "max_iter": 100, "tol": 1e-12},
        flat(lambda x: field.karcher(x, (0.5, 1.0, 0.3), 100, 1e-12)),
    ),
    "karcher-one-step": (
        "karcher",
        {"space": "changes", "weights": (0.5, 1.0, 0.3), "max_iter": 1},
        flat(lambda x: field.karcher(x, (0.5, 1.0, 0.3), 1)),
    ),
    "tsv": ("tsv", {"scale": 0.7}, lambda m: by_kind(m, lambda x: field.tsv(x, 0.7), mean(0.7))),
    "iso_c": ("iso_c", {}, lambda m: by_kind(m, field.iso_c, mean(1.5))),
    "iso_c-tables": ("iso_c", {"embeddings": True}, lambda m: by_kind(m, field.iso_c, mean(1.5), True)),
    "iso_cts": ("iso_cts", {}, lambda m: by_kind(m, field.iso_cts, mean(1.5))),
    "iso_cts-tables": (
        "iso_cts",
        {"scale": 0.7, "common": 0.4, "embeddings": True},
        lambda m: by_kind(m, lambda x: field.iso_cts(x, 0.7, 0.4), mean(0.7), True),
    ),
    "wudi": ("wudi", {"scale": 0.7}, lambda m: by_kind(m, lambda x: field.wudi(x, 0.7), mean(0.7))),
    "wudi-tables": ("wudi", {"embeddings": True}, lambda m: by_kind(m, field.wudi, mean(), True)),
    "tsv-tables": ("tsv", {"embeddings": True}, lambda m: by_kind(m, field.tsv, mean(), True)),
    "svd": ("svd", {}, lambda m: by_kind(m, field.svd, lambda x: x.sum(0))),
    "svd-weighted": (
        "svd",
        {"energy": 0.6, "weights": EXACT, "scale": 0.7, "embeddings": True},
        lambda m: by_kind(m, lambda x: field.svd(x, 0.6, weights=EXACT, scale=0.7), lambda x: 0.7 * weighted(x), True),
    ),
    "svd-components": (
        "svd",
        {"energy": 1.0, "max_rank": 3},
        lambda m: by_kind(m, lambda x: field.svd(x, 1.0, 3), lambda x: x.sum(0)),
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


@pytest.mark.parametrize("count", [2, 4])
@dtypes
def test_sce_selects_what_equals_the_threshold(count: int, dtype: torch.dtype) -> None:
    """On a grid, where variances are exact and many are equal or zero."""
    models = [{n: (100 * v).round() / 64 for n, v in each.items()} for each in changes(count, 4, dtype, PLACES)]
    chosen = set()
    for density, select in itertools.product([0.05, 0.3, 0.7], ["weights", "deltas"]):
        wanted = flat(lambda x, density=density, select=select: field.sce(x, density, select))(doubles(models))
        assert close(merged(models, "sce", density=density, select=select).double(), wanted, within(dtype))
        chosen.add(int(wanted.count_nonzero()))
    assert len(chosen) > 3


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


# ---- Factors


def low(pair: tuple[Tensor, Tensor], transposed: bool = False) -> LowRank:
    shape = pair[0].shape[0], pair[1].shape[1]
    return LowRank(*pair, shape[::-1] if transposed else shape, transposed)


def pairs(out: int, inputs: int, ranks: Any, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Factors `(up, down)`, of a size of their own each."""
    random = torch.Generator().manual_seed(seed)
    return [
        ((i + 1) * torch.randn(out, r, generator=random) / 50, torch.randn(r, inputs, generator=random))
        for i, r in enumerate(ranks)
    ]


def modules() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Three adapters' factors of several matrices; rank 0 is nothing."""
    made = {
        "equal ranks": pairs(30, 20, (2, 2, 2)),
        "unequal ranks": pairs(20, 31, (1, 5, 2)),
        "more ranks than rows": pairs(12, 20, (9, 7, 5)),
        "more ranks than columns": pairs(20, 12, (12, 12, 12)),
        "one row": pairs(1, 20, (1, 1, 1)),
        "one column": pairs(20, 1, (1, 1, 1)),
        "duplicates": [*pairs(20, 31, (3,)) * 2, *pairs(20, 31, (2,), 1)],
        "all the same": pairs(20, 31, (3,)) * 3,
        "opposite": [*pairs(20, 31, (3,)), (-pairs(20, 31, (3,))[0][0], pairs(20, 31, (3,))[0][1])],
        "zero": pairs(20, 31, (3, 3, 3)),
        "absent": pairs(20, 31, (3, 0, 2)),
        "one alone": pairs(20, 31, (0, 4, 0)),
        "nothing": pairs(20, 31, (0, 0, 0)),
        "redundant factors": [(torch.cat([u, u], 1), torch.cat([d, d], 0)) for u, d in pairs(20, 31, (2, 3, 2))],
        "uneven factors": [(1e-4 * up, 1e5 * down) for up, down in pairs(20, 31, (2, 3, 2))],
    }
    made["opposite"] += pairs(20, 31, (2,), 1)
    made["zero"][1] = (0 * made["zero"][1][0], made["zero"][1][1])
    return made


def inner(function: Any, **options: Any) -> Function:
    return lambda tau: function(tau, **options)


# Name -> (method, parameters, reference on [n, out, in])
LOW: Any = {
    "tsv": ("tsv", {"scale": 0.7}, inner(field.tsv, scale=0.7)),
    "iso_c": ("iso_c", {}, field.iso_c),
    "iso_cts": ("iso_cts", {}, field.iso_cts),
    "iso_cts-own": ("iso_cts", {"common": 0.4, "scale": 0.7}, inner(field.iso_cts, common=0.4, scale=0.7)),
    "wudi": ("wudi", {}, field.wudi),
    "svd": ("svd", {"energy": 0.8, "weights": EXACT}, inner(field.svd, energy=0.8, weights=EXACT)),
    "svd-components": ("svd", {"energy": 1.0, "max_rank": 3}, inner(field.svd, energy=1.0, components=3)),
    "varm": ("varm", {"scale": 0.7}, on_flat(field.varm, scale=0.7)),
    "model_stock": ("model_stock", {}, on_flat(field.model_stock)),
    "multislerp": ("multislerp", {"space": "changes"}, on_flat(field.multislerp)),
    "karcher": ("karcher", {"space": "changes"}, on_flat(field.karcher)),
    "knots": ("knots", {"weights": EXACT}, weighted),
    "knots-inputs": ("knots", {"align": "inputs", "weights": EXACT}, weighted),
    "knots+ties": ("knots+ties", {"density": 0.3}, inner(knots_ties, density=0.3)),
    "knots-inputs+ties": ("knots+ties", {"align": "inputs"}, lambda tau: knots_ties(tau.mT).mT),
    "core": ("core", {"weights": EXACT}, weighted),
    "core+ties": ("core+ties", {"density": 0.3}, inner(core_ties, density=0.3)),
}


@pytest.mark.parametrize("module", modules())
@pytest.mark.parametrize("name", LOW)
def test_factors(name: str, module: str) -> None:
    """From factors as from full changes, stored either way; and what is low-rank stays so."""
    method, options, reference = LOW[name]
    factors = modules()[module]
    wanted = reference(torch.stack([up.double() @ down.double() for up, down in factors]))
    for transposed, precise in itertools.product([False, True], [False, True]):
        chosen = [(up.double(), down.double()) for up, down in factors] if precise else factors
        adapters = [{Q: low(pair, transposed)} for pair in chosen]
        present = [bool(each[Q].rank) or module == "nothing" for each in adapters]
        missing = [each if there else {} for each, there in zip(adapters, present, strict=True)]
        target = wanted.T if transposed else wanted
        got = merging.merge_deltas(missing, method=method, **options)[Q]
        full = merging.merge_deltas(dense(written(adapters)), method=method, transposed=[Q] * transposed, **options)[Q]
        assert isinstance(got, LowRank) and got.transposed == transposed
        assert got.rank <= max(1, sum(pair[0].shape[1] for pair in factors))
        for change in (got, full):
            assert change.dense().dtype == (F64 if precise else F32)
            assert agree(change.dense().double(), target, 1e-9 if precise else 1e-5, chosen)


def agree(got: Tensor, wanted: Tensor, tolerance: float, factors: Any) -> bool:
    """Close in proportion to the result or, where it vanishes, to what was merged."""
    size = max(float((up @ down).norm()) for up, down in factors)
    return close(got, wanted, tolerance) or float((got - wanted).norm()) < 0.1 * tolerance * size


@pytest.mark.parametrize("name", LOW)
def test_merges_of_factors_scale(name: str) -> None:
    method, options, _ = LOW[name]
    for module in ("unequal ranks", "more ranks than rows"):
        adapters = [{Q: low(pair)} for pair in modules()[module]]
        wanted = merged(adapters, method, **options).double()
        for factor in (1e-6, 1e6):
            scaled = [{Q: each[Q].scaled(factor)} for each in adapters]
            assert close(merged(scaled, method, **options).double() / factor, wanted, 2e-5)


@pytest.mark.parametrize("name", [*LOW, "sce", "ram", "ties"])
def test_factors_of_zero(name: str) -> None:
    method, options, _ = LOW.get(name, (name, {}, None))
    adapters = [{Q: low((0 * up, down))} for up, down in pairs(20, 31, (2, 3, 2))]
    assert not merged(adapters, method, **options).any()


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi", "svd", "varm", "knots+ties", "core+ties"])
def test_factors_of_other_tensors(method: str) -> None:
    """Experts and convolutions, as they are merged in full; where nothing is taken apart, as factors."""
    random = torch.Generator().manual_seed(0)
    adapters: Any = []
    for rank in (2, 1, 3):
        up, down = (torch.randn(3, *shape, generator=random, dtype=F64) for shape in ((9, rank), (rank, 12)))
        conv = LowRank(up[0], down[0], (9, 3, 2, 2))
        adapters.append({EXPERTS: LowRank(up, down, (3, 9, 12)), "patch.weight": conv})
    options = {"scope": "tensor"} if "+" in method else {}
    wanted = merging.merge_deltas(dense(written(adapters)), method=method, **options)
    got = merging.merge_deltas(adapters, method=method, **options)
    assert close(got[EXPERTS].dense(), wanted[EXPERTS].dense(), 1e-9)
    if "+" in method:  # what is low-rank has a basis, whatever it belongs to
        tau = torch.stack([each["patch.weight"].up @ each["patch.weight"].down for each in adapters])
        reference = knots_ties if "knots" in method else core_ties
        assert close(got["patch.weight"].dense().flatten(1), reference(tau), 1e-9)
    else:
        assert close(got["patch.weight"].dense(), wanted["patch.weight"].dense(), 1e-9)
    assert isinstance(got["patch.weight"], LowRank)


@pytest.mark.parametrize("outer", ["knots", "core"])
def test_what_is_no_matrix_passes(outer: str) -> None:
    models = changes(3, 4, F64, PLACES)
    inside, plain = (knots_ties if outer == "knots" else core_ties), on_flat(ties)
    wanted = {
        name: (inside if name in MATRICES else plain)(side_by_side(models, name)).flatten() for name in sorted(PLACES)
    }
    assert close(merged(models, f"{outer}+ties", scope="tensor"), torch.cat(list(wanted.values())), 1e-9)


# Decompositions of larger matrices go by their Gram matrices where these tell enough.


def spectrum(rows: int, columns: int, sizes: Any, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(size, len(sizes), generator=random, dtype=F64) for size in (rows, columns))
    return torch.linalg.qr(u)[0] * torch.as_tensor(sizes, dtype=F64) @ torch.linalg.qr(v)[0].T


STEEP = [10.0 ** (-i / 4) for i in range(8)]
SPECTRA: Any = {
    "random": lambda m, n, i: torch.randn(m, n, generator=torch.Generator().manual_seed(i), dtype=F64),
    "low rank": lambda m, n, i: spectrum(m, n, [x + i / 7 for x in STEEP], i),
    "with a tail below the cut": lambda m, n, i: spectrum(m, n, [*STEEP, *(1e-9 * 0.96**j for j in range(60))], i),
    "with a tail above the cut": lambda m, n, i: spectrum(m, n, [*STEEP, *(3e-4 * 0.96**j for j in range(60))], i),
    "orthogonal": lambda m, n, i: spectrum(m, n, [1 + i + j / 100 for j in range(min(m, n))], i),
    "duplicates": lambda m, n, i: spectrum(m, n, STEEP, i // 2),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(90, 130), (130, 90), (100, 100)])
@dtypes
def test_larger_matrices(kind: str, shape: Any, dtype: torch.dtype) -> None:
    models = [{Q: SPECTRA[kind](*shape, i).to(dtype)} for i in range(3)]
    tau = side_by_side(doubles(models), Q)
    wrong = []
    for name in (
        "tsv",
        "iso_c",
        "iso_cts",
        "iso_cts-own",
        "wudi",
        "svd",
        "svd-components",
        "knots",
        "knots+ties",
        "core+ties",
    ):
        method, options, reference = LOW[name]
        got, wanted = merged(models, method, **options).double(), reference(tau).flatten()
        # in float32 the smallest coordinates are rounding errors, which elections of signs tell from nothing
        tolerance = 1e-7 if dtype == F64 else 1e-4 if "ties" in name else 1e-5
        if not close(got, wanted, tolerance):
            wrong.append((name, float((got - wanted).norm() / wanted.norm())))
    assert wrong == []


def adapter(folder: Path) -> Any:
    config = json.loads((folder / "adapter_config.json").read_text())
    return merging.peft_deltas(load_file(folder / "adapter_model.safetensors"), config)


@pytest.mark.parametrize("name", LOW)
def test_trained_adapters(name: str) -> None:
    """Three adapters of rank 8 on 384 x 384, whose singular values fall off as those of real ones do."""
    method, options, reference = LOW[name]
    options = options | ({"scope": "tensor"} if "ties" in name else {})
    adapters = [adapter(folder) for folder in SHIPPED[:3]]
    module = next(iter(adapters[0]))
    parts = [{module: each[module]} for each in adapters]
    wanted = reference(torch.stack([each[module].up.double() @ each[module].down.double() for each in parts]))
    for inputs in (parts, dense(written(parts))):
        got = merging.merge_deltas(inputs, method=method, **options)
        assert close(got[module].dense().double(), wanted, 1e-5)


@pytest.mark.parametrize(
    "method", ["tsv", "iso_c", "iso_cts", "wudi", "svd", "varm", "model_stock", "knots+ties", "core+ties", "core+tsv"]
)
def test_adapters_from_files(method: str, tmp_path: Path) -> None:
    """As in memory, thresholds over the whole model included."""
    wanted = merging.merge_deltas([adapter(folder) for folder in SHIPPED], method=method)
    merging.merge(SHIPPED, method=method, output=tmp_path / "out", threads=2)
    got = adapter(tmp_path / "out")
    assert got.keys() == wanted.keys()
    assert all(close(got[name].dense(), value.dense(), 1e-6) for name, value in wanted.items())


def test_a_model_inside_the_common_directions_adds_none_of_its_own() -> None:
    """Iso-CTS of adapters that write to different outputs and read different inputs: nothing is left beside the sum."""
    ups, downs = torch.eye(20, dtype=F64), torch.eye(31, dtype=F64)
    sizes = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1], dtype=F64)
    random = torch.Generator().manual_seed(0)
    turn, other = (torch.linalg.qr(torch.randn(k, k, generator=random, dtype=F64))[0] for k in (20, 31))
    adapters = [
        {Q: LowRank(turn @ ups[:, chosen] * sizes[chosen], downs[chosen] @ other, (20, 31))}
        for chosen in (slice(4), slice(4, 8))
    ]
    wanted = field.iso_cts(side_by_side(written(adapters), Q), common=0.7)  # one own direction each
    for inputs in (adapters, written(adapters)):
        assert close(merged(inputs, "iso_cts", common=0.7), wanted.flatten(), 1e-9)


@pytest.mark.parametrize("method", ["knots+ties", "core+ties"])
def test_thresholds_over_all_tensors(method: str) -> None:
    """TIES inside takes its thresholds over the projections of all tensors, and vectors as they are."""
    made = [pairs(12, 20, (2, 3, 1), 3), pairs(17, 9, (1, 1, 4), 4)]
    bias = changes(3, 1, F64, {"layers.0.bias": (17,)})
    adapters: Any = [
        {Q: low((u.double(), d.double())), K: low((v.double(), e.double()))}
        for (u, d), (v, e) in zip(*made, strict=True)
    ]
    bases, parts = [], []
    for name in (Q, K):
        tau = side_by_side(written(adapters), name)
        *sides, projections = field.core(tau) if method == "core+ties" else field.knots(tau)
        bases.append(sides)
        parts.append(projections)
    for extra in (False, True):
        joint = [each.flatten(1) for each in parts] + [side_by_side(bias, "layers.0.bias")] * extra
        pieces = ties(torch.cat(joint, 1)).split([each.shape[1] for each in joint])
        wanted = {
            name: sides[0]
            @ piece.view(each.shape[1:])
            @ (sides[1].T if sides[1:] else torch.eye(each.shape[2], dtype=F64))
            for name, sides, each, piece in zip((Q, K), bases, parts, pieces[:2], strict=True)
        }
        inputs = written(adapters)
        if extra:
            wanted["layers.0.bias"] = pieces[2]
            inputs = [each | vector for each, vector in zip(inputs, bias, strict=True)]
        for deltas in [dense(inputs)] + [adapters] * (not extra):
            got = merging.merge_deltas(deltas, method=method)
            assert all(close(got[name].dense(), value, 1e-9) for name, value in wanted.items())
        alone = merging.merge_deltas(dense(inputs), method=method, scope="tensor")
        assert not all(close(alone[name].dense(), value, 1e-3) for name, value in wanted.items())


@pytest.mark.parametrize("align", ["outputs", "inputs"])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_knots_shows_the_projections(align: str, factored: bool, transposed: bool) -> None:
    """With the signs that make the largest entry of each basis vector positive, and back again."""
    adapters = [{Q: low((u.double(), d.double()), transposed)} for u, d in pairs(12, 20, (2, 3, 1))]
    deltas = [each[Q] for each in (adapters if factored else dense(written(adapters)))]
    site = site_of(Q, (20, 12) if transposed else (12, 20), Stacks({}), transposed)
    unwrapped = unwrap_outer(chain("knots+ties", {"align": align}), Stack(deltas), site, {})
    tau = torch.stack([each[Q].up @ each[Q].down for each in adapters])
    parts = field.knots(tau)[1] if align == "outputs" else field.knots(tau.mT)[1].mT
    assert close(unwrapped.stack.dense(), parts, 1e-9)
    for inside, change in zip(unwrapped.stack.deltas, adapters, strict=True):
        assert close(unwrapped.rewrap(inside).dense(), change[Q].dense(), 1e-9)


@pytest.mark.parametrize("outer", ["knots", "core"])
@pytest.mark.parametrize("name", ["iso_c", "wudi", "svd", "varm", "model_stock", "task_arithmetic", "tsv"])
def test_spectral_methods_do_not_depend_on_the_basis(outer: str, name: str) -> None:
    options = {"energy": 0.8} if name == "svd" else {}
    adapters = [{Q: low((u.double(), d.double()))} for u, d in pairs(17, 25, (2, 5, 1))]
    wanted = merged(written(adapters), name, **options)
    for inputs in (adapters, written(adapters)):
        assert close(merged(inputs, f"{outer}+{name}", **options), wanted, 1e-9)


@pytest.mark.parametrize(
    "method",
    ["tsv", "iso_c", "iso_cts", "wudi", "svd", "varm", "model_stock", "knots", "core", "knots+ties", "core+ties"],
)
def test_no_matrix_is_built_of_factors(method: str) -> None:
    """As floats it would take 240 GB."""
    made = [{Q: low(pair)} for pair in pairs(200_000, 300_000, (2, 1, 2))]
    got = merging.merge_deltas(made, method=method)[Q]
    assert isinstance(got, LowRank) and got.rank <= 5 and got.shape == (200_000, 300_000)
    assert got.up.isfinite().all() and got.down.isfinite().all() and got.down.any() and got.up.any()


@pytest.mark.parametrize("embeddings", [False, True])
def test_factors_on_tables_are_averaged_unless_asked(embeddings: bool) -> None:
    made = [(u.double(), d.double()) for u, d in pairs(12, 20, (2, 3, 1))]
    adapters = [{TABLE: low(pair, transposed=True)} for pair in made]
    tau = torch.stack([up @ down for up, down in made])
    for method, reference, plain in (
        ("tsv", field.tsv, mean()),
        ("iso_c", field.iso_c, mean(1.5)),
        ("iso_cts", field.iso_cts, mean(1.5)),
        ("wudi", field.wudi, mean()),
        ("svd", field.svd, lambda x: x.sum(0)),
    ):
        wanted = (reference if embeddings else plain)(tau)
        for inputs in (adapters, written(adapters)):
            got = merged(inputs, method, embeddings=embeddings).view(20, 12)
            assert close(got, wanted.T, 1e-9)


# ---- WUDI by descent


def test_wudi_closed_is_the_minimum() -> None:
    models = changes(3, 1, F64, {Q: (12, 20)})
    tau = side_by_side(models, Q)
    best = field.wudi_loss(merged(models, "wudi").view(12, 20), tau)
    assert best < 0.5 * field.wudi_loss(tau.sum(0), tau)
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = 1e-3 * torch.randn(12, 20, generator=random, dtype=F64) * tau.std()
        assert field.wudi_loss(merged(models, "wudi").view(12, 20) + step, tau) > best


def test_wudi_by_adam() -> None:
    """The loss falls from that of the sum, further with more steps; scaled changes scale the result."""
    models = changes(3, 1, F32, PLACES)
    sums = {name: side_by_side(models, name).sum(0) for name in models[0]}
    deltas, losses = dense(models), []
    for steps in (1, 20, 150):
        got = merging.merge_deltas(deltas, method="wudi", mode="adam", steps=steps)
        losses.append([field.wudi_loss(got[name].dense(), side_by_side(models, name)) for name in MATRICES])
        assert close(got["layers.0.bias"].dense(), side_by_side(models, "layers.0.bias").mean(0))
    start = [field.wudi_loss(sums[name], side_by_side(models, name)) for name in MATRICES]
    best = [field.wudi_loss(field.wudi(side_by_side(models, name)), side_by_side(models, name)) for name in MATRICES]
    for zero, one, few, many, least in zip(start, *losses, best, strict=True):
        assert zero > one > few > many > 0.999 * least
    wanted = merged(models, "wudi", mode="adam", steps=30)
    for factor in (1e-6, 1e6):
        scaled = [{place: value * factor for place, value in each.items()} for each in models]
        assert close(merged(scaled, "wudi", mode="adam", steps=30) / factor, wanted, 1e-4)


def test_wudi_by_adam_on_factors() -> None:
    adapters = [
        {Q: low((u.double(), d.double())), K: low((u.double(), d.double()), True)} for u, d in pairs(17, 25, (2, 5, 1))
    ]
    got = merging.merge_deltas(adapters, method="wudi", mode="adam", steps=20)
    full = merging.merge_deltas(dense(written(adapters)), method="wudi", mode="adam", steps=20, transposed=[K])
    for name in (Q, K):
        assert close(got[name].dense(), full[name].dense(), 1e-6)
    assert close(got[Q].dense(), got[K].dense().T, 1e-9)


# ---- Weights and changes


def weights_merged(models: Any, method: str, **options: Any) -> Tensor:
    return flatten([merging.merge_state_dicts(models, method=method, **options)])[0]


def plus(base: Any, models: Any) -> Any:
    return [{name: base[name] + value for name, value in each.items()} for each in models]


WITHOUT_CONV: Any = {name: shape for name, shape in PLACES.items() if name != "patch.weight"}
TWO_AXES: Any = {name: shape for name, shape in PLACES.items() if len(shape) == 2}
AXES: Any = {
    "flat": (PLACES, lambda w: flat(lambda x: field.nuslerp(x, w))),
    "rows": (WITHOUT_CONV, lambda w: rows(lambda x: field.nuslerp(x, w))),
    "columns": (TWO_AXES, lambda w: rows(lambda x: field.nuslerp(x.mT, w).mT)),
}


@pytest.mark.parametrize("axis", AXES)
@dtypes
def test_nuslerp(axis: str, dtype: torch.dtype) -> None:
    shapes, reference = AXES[axis]
    (base,), models = changes(1, 3, dtype, shapes), changes(2, 4, dtype, shapes)
    for weights in ((1.0, 1.0), (0.3, 0.9), (0.0, 2.0)):
        options = {"axis": axis, "weights": weights}
        wanted = reference(weights)(doubles(models))
        got = weights_merged(models, "nuslerp", space="weights", **options)
        assert close(got.double(), wanted, within(dtype))
        assert close(merged(models, "nuslerp", space="changes", **options).double(), wanted, within(dtype))
        on_base = weights_merged(plus(base, models), "nuslerp", base=base, space="changes", **options).double()
        assert close(on_base, flatten(doubles([base]))[0] + wanted, 1e-5 if dtype == F32 else 1e-12)
    default = weights_merged(models, "nuslerp")
    assert close(default.double(), flat(field.nuslerp)(doubles(models)), within(dtype))


def test_nuslerp_of_factors() -> None:
    made = [(u.double(), d.double()) for u, d in pairs(9, 12, (2, 5))]
    for transposed in (False, True):
        adapters = [{Q: low(pair, transposed)} for pair in made]
        for axis, (_, reference) in AXES.items():
            options: Any = {"axis": axis, "space": "changes", "weights": (0.3, 0.9)}
            assert close(merged(adapters, "nuslerp", **options), reference((0.3, 0.9))(written(adapters)), 1e-9)
    got = merging.merge_deltas(adapters, method="nuslerp", space="changes")[Q]
    assert isinstance(got, LowRank) and got.rank == 7 and got.transposed


@pytest.mark.parametrize("axis", AXES)
def test_nuslerp_of_models_with_little_or_no_angle_between(axis: str) -> None:
    shapes, reference = AXES[axis]
    first, second = changes(2, 4, F64, shapes)
    weights = (0.3, 0.7)
    for near in (
        first,
        {name: 2 * value for name, value in first.items()},
        plus(first, [{n: 1e-3 * v for n, v in second.items()}])[0],
    ):
        models = [first, near]
        assert close(weights_merged(models, "nuslerp", axis=axis, weights=weights), reference(weights)(models), 1e-5)
    nothing = {name: 0 * value for name, value in first.items()}
    for models in ([first, nothing], [nothing, first], [nothing, nothing], [first, {n: -v for n, v in first.items()}]):
        assert weights_merged(models, "nuslerp", axis=axis, weights=weights).isfinite().all()


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@dtypes
def test_means_on_the_sphere(method: str, dtype: torch.dtype) -> None:
    shapes = places(method)
    (base,), models = changes(1, 3, dtype, shapes), changes(3, 4, dtype, shapes)
    reference = getattr(field, method)
    for options in ({}, {"weights": (0.5, 1.0, 2.0)}):
        wanted = flat(lambda x, options=options: reference(x, **options))(doubles(models))
        assert close(weights_merged(models, method, space="weights", **options).double(), wanted, within(dtype))
        tuned = plus(base, models)
        on_base = weights_merged(tuned, method, base=base, space="changes", **options).double()
        assert close(on_base, flatten(doubles([base]))[0] + wanted, 1e-5 if dtype == F32 else 1e-12)
        near = flat(lambda x, options=options: reference(x, **options))(doubles(tuned))
        assert close(weights_merged(tuned, method, space="weights", **options).double(), near, within(dtype))


def test_the_mean_on_the_sphere_is_one() -> None:
    """The logarithms at the Karcher mean cancel out; two points meet half way, as slerp has them."""
    models = changes(2, 4, F64, {Q: (40, 16)})
    halfway = flat(field.nuslerp)([{Q: each[Q] / each[Q].norm()} for each in models])
    size = sum(float(each[Q].norm()) for each in models) / 2
    for method in ("karcher", "multislerp"):
        got = weights_merged(models, method, space="weights")
        assert close(got, size * halfway / halfway.norm(), 1e-9)
        assert close(weights_merged([models[0]] * 3, method, space="weights"), models[0][Q].flatten(), 1e-7)
    three = changes(3, 4, F64, {Q: (4, 4)})
    got = weights_merged(three, "karcher", space="weights", max_iter=200, tol=1e-13)
    unit = flatten(three) / flatten(three).norm(dim=1, keepdim=True)
    point = got / got.norm()
    cosine = unit @ point
    logs = (cosine.acos() / torch.sin(cosine.acos()))[:, None] * (unit - cosine[:, None] * point)
    assert float(logs.mean(0).norm()) < 1e-11
    assert not close(weights_merged(three, "multislerp", space="weights"), got, 1e-4)


def test_a_mean_that_vanishes() -> None:
    """Two opposite models are averaged; of three whose unit vectors cancel out there is none."""
    x = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=F64)
    got = weights_merged([{"a.weight": each} for each in x], "multislerp", space="weights")
    assert close(got, torch.tensor([1.0, 0.0], dtype=F64), 1e-12)
    angles = torch.tensor([0.0, 2 / 3, 4 / 3], dtype=F64) * torch.pi
    star = [{"a.weight": torch.stack([angle.cos(), angle.sin()])} for angle in angles]
    with pytest.raises((OptionError, InputError), match="cancel out"):
        weights_merged(star, "multislerp", space="weights")
    for models in (star, [{"a.weight": each} for each in x]):
        assert weights_merged(models, "karcher", space="weights").isfinite().all()


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher", "arcee_fusion"])
def test_changes_alone_do_not_tell_the_weights(method: str) -> None:
    options = {} if method == "arcee_fusion" else {"space": "weights"}
    with pytest.raises(OptionError, match=method):
        merged(changes(2, 1), method, **options)
    if options:
        with pytest.raises(OptionError, match="base"):
            weights_merged(changes(2, 1), method, space="changes")


@dtypes
def test_model_stock(dtype: torch.dtype) -> None:
    """By tensor and by row; models that agree stay where they are, and those that have nothing in common go back."""
    (base,), models = changes(1, 3, dtype, WITHOUT_CONV), changes(4, 4, dtype, WITHOUT_CONV)
    common = [{name: value + 2 * models[0][name] for name, value in each.items()} for each in models]
    for wise, wanted in ((False, flat(field.model_stock)), (True, rows(field.model_stock))):
        for tuned in (models, common):
            got = merged(tuned, "model_stock", filter_wise=wise)
            assert close(got.double(), wanted(doubles(tuned)), 10 * within(dtype))
        got = weights_merged(plus(base, common), "model_stock", base=base, filter_wise=wise).double()
        assert close(got, flatten(doubles([base]))[0] + wanted(doubles(common)), 1e-5 if dtype == F32 else 1e-10)
    assert close(merged([models[0]] * 3, "model_stock"), flatten(models[:1])[0], 1e-6)
    up, down = models[0], {name: -value for name, value in models[0].items()}
    assert merged([up, down], "model_stock").isfinite().all()
    adapters = [{Q: low(pair)} for pair in pairs(9, 12, (2, 2))]
    assert not isinstance(merging.merge_deltas(adapters, method="model_stock", filter_wise=True)[Q], LowRank)
    got = merged(adapters, "model_stock", filter_wise=True)
    assert close(got, rows(field.model_stock)(written(adapters)), 1e-5)


@dtypes
def test_nearswap(dtype: torch.dtype) -> None:
    """As its formula has it; which is the change, clipped."""
    (base,), (change,) = changes(1, 3, dtype, PLACES), changes(1, 4, dtype, PLACES)
    change = {name: torch.where(value.abs() < 1e-4, 0, value) for name, value in change.items()}
    (tuned,) = plus(base, [change])
    origin, other = (flatten(doubles([each]))[0] for each in (base, tuned))
    for t in (0.001, 0.02, 10.0):
        got = weights_merged([tuned], "nearswap", base=base, t=t).double()
        wanted = field.nearswap(origin, other, t)
        assert float((got - wanted).abs().max()) < (1e-6 if dtype == F32 else 1e-15)
        assert torch.allclose(wanted, origin + (other - origin).clamp(-t, t), atol=1e-15)
        assert close(merged([change], "nearswap", t=t).double(), flatten(doubles([change]))[0].clamp(-t, t), 1e-6)
    assert equal(
        weights_merged([tuned], "nearswap", base=base), weights_merged([tuned], "nearswap", base=base, t=0.001)
    )
    with pytest.raises(OptionError, match="merges 1 model"):
        weights_merged([tuned, tuned], "nearswap", base=base)


@dtypes
def test_arcee_fusion(dtype: torch.dtype) -> None:
    """All but entries of float32 that lie at the threshold; rows are those of the last axis."""
    shapes = {name: shape for name, shape in WITHOUT_CONV.items() if name != "norm.weight"}
    for seed, size in ((1, 1.0), (2, 10.0)):
        a, b = ({name: size * value for name, value in each.items()} for each in changes(2, seed, dtype, shapes))
        got = weights_merged([a, b], "arcee_fusion").double()
        wanted = rows(lambda x: field.arcee_fusion(*x))(doubles([a, b]))
        assert 0.005 < float((wanted != flatten(doubles([a]))[0]).double().mean()) < 0.4
        assert float((got != wanted).double().mean()) <= (1e-3 if dtype == F32 else 0)
    assert equal(weights_merged([a, a], "arcee_fusion"), flatten([a])[0])
    with pytest.raises(OptionError, match="2 models"):
        weights_merged([a, b, a], "arcee_fusion")


def test_passthrough() -> None:
    (base,), (change,) = changes(1, 3, F32, PLACES), changes(1, 4, F32, PLACES)
    assert equal(weights_merged([change], "passthrough"), flatten([change])[0])
    assert close(weights_merged([change], "passthrough", scale=0.3), 0.3 * flatten([change])[0])
    tuned = plus(base, [change])
    assert equal(weights_merged(tuned, "passthrough"), flatten(tuned)[0])
    adapter = {Q: low(pairs(9, 12, (2,))[0])}
    got = merging.merge_deltas([adapter], method="passthrough", scale=0.5)[Q]
    assert isinstance(got, LowRank) and close(got.dense(), 0.5 * adapter[Q].dense())
    with pytest.raises(OptionError, match="merges 1 model"):
        merged([change, change], "passthrough")


# ---- Breadcrumbs


@pytest.mark.parametrize("density", [0.9, 0.31, 1.0, 0.001])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.25])
def test_breadcrumbs(density: float, gamma: float) -> None:
    """Counts are exact, by tensor; the method inside sees what is left."""
    for dtype in (F32, F64):
        models, options = changes(3, 2, dtype, PLACES), {"density": density, "gamma": gamma}
        thin = [{n: field.breadcrumbs(v.flatten(), density, gamma).view(v.shape) for n, v in m.items()} for m in models]
        got = merging.merge_deltas(dense(models[:1]), method="breadcrumbs", **options)
        for name, value in models[0].items():
            assert equal(got[name].dense(), thin[0][name])
            assert int((got[name].dense() != 0).sum()) == max(1, int(density * value.numel()))
        assert close(merged(models, "breadcrumbs", **options), flatten(thin).sum(0))
        before_ties = {"breadcrumbs.density": density, "gamma": gamma, "ties.density": 0.4}
        assert close(merged(models, "breadcrumbs+ties", **before_ties), ties(flatten(thin), 0.4))


def test_breadcrumbs_by_model() -> None:
    models, densities, gammas = changes(3, 2, F64, PLACES), (0.9, 0.2, 0.5), (0.0, 0.1, 0.01)
    thin = [
        flat(lambda x, d=d, g=g: field.breadcrumbs(x[0], d, g))([m])
        for m, d, g in zip(models, densities, gammas, strict=True)
    ]
    assert close(merged(models, "breadcrumbs", density=densities, gamma=gammas), torch.stack(thin).sum(0), 1e-12)
    default = [flat(lambda x: field.breadcrumbs(x[0], 0.9, 0.01))([m]) for m in models]
    assert close(merged(models, "breadcrumbs"), torch.stack(default).sum(0), 1e-12)


def test_breadcrumbs_keeps_what_equals_a_threshold() -> None:
    x = torch.tensor([1, -1, 1, 2, -2, 3, 3, -4, 4, 5], dtype=F32)
    for density, gamma, kept in (
        (0.5, 0.0, [3, 4]),  # 5 4 4 3 3
        (0.6, 0.0, [2, 3, 4]),  # 5 4 4 3 3 2, and the other 2
        (0.4, 0.1, [3, 4]),
        (0.4, 0.2, [2, 3, 4]),  # 4 3 3 2: the other 4 as well, and the other 2
        (0.1, 0.3, [3]),
        (0.9, 0.5, [1, 2, 3, 4]),  # only one of the largest can go
    ):
        got = merged([{Q: x}], "breadcrumbs", density=density, gamma=gamma)
        assert equal(got, field.breadcrumbs(x, density, gamma))
        wanted = [magnitude in (kept if gamma else [*kept, 5]) for magnitude in x.abs().tolist()]
        assert (got != 0).tolist() == wanted
    coarse = [{n: (8 * v).bfloat16().float() for n, v in each.items()} for each in changes(1, 2, F32, PLACES)]
    wanted = flat(lambda x: field.breadcrumbs(x[0], 0.6, 0.1))(coarse)
    assert equal(merged(coarse, "breadcrumbs", density=0.6, gamma=0.1), wanted)
    assert not merged([{Q: torch.zeros(5, 4)}], "breadcrumbs").any()


# ---- DELLA

WIDE: Any = {
    Q: (3000, 40),
    "layers.0.bias": (60_000,),
    "patch.weight": (2000, 3, 4, 5),
    EXPERTS: (4, 800, 40),
    TABLE: (3000, 24),
}


def as_rows(name: str, value: Tensor) -> Tensor:
    """What is ranked together: rows of matrices, a vector, a filter."""
    if value.dim() == 1:
        return value[None]
    return value.flatten(1) if name == "patch.weight" else value.flatten(0, -2)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("options", [{}, {"density": 0.4, "epsilon": 0.3}, {"density": 0.5, "epsilon": 0.0}], ids=str)
def test_della_keeps_its_shares(name: str, options: Any) -> None:
    """By rank, within five standard deviations; and neighbours in a row or rank are no more alike than others."""
    (model,) = changes(1, 7, F64, {name: WIDE[name]})
    density, epsilon = options.get("density", 0.7), options.get("epsilon", 0.15)
    x = as_rows(name, model[name])
    columns = torch.arange(x.shape[1], dtype=F64)[None] + 1
    by_rank = field.della_probabilities(columns, density, epsilon)[0]
    got = as_rows(name, merging.merge_deltas(dense([model]), method="della", rescale="none", **options)[name].dense())
    assert equal(got, torch.where(got != 0, x, 0))
    kept = (got != 0).double().gather(1, x.abs().argsort(dim=1, stable=True))  # columns are ranks
    count = kept.shape[0]
    if count == 1:  # a vector: ranks by the hundred
        kept, by_rank, count = kept.view(-1, 100).T, by_rank.view(-1, 100).mean(1), 100
    noise = (kept - by_rank) / (by_rank * (1 - by_rank)).sqrt()
    assert float(noise.mean(0).abs().max()) < 5 / count**0.5
    assert float(noise.mean(1).abs().max()) < 5.5 / kept.shape[1] ** 0.5
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    for lag in (1, 2, 7):
        assert abs(float((noise[:, lag:] * noise[:, :-lag]).mean())) < 5 / noise.numel() ** 0.5
        assert abs(float((noise[lag:] * noise[:-lag]).mean())) < 5 / noise.numel() ** 0.5


def test_della_ranks_equal_magnitudes_by_position() -> None:
    model = {Q: torch.ones(4000, 11) * (-1) ** torch.arange(11)}
    kept = merging.merge_deltas(dense([model]), method="della", rescale="none")[Q].dense() != 0
    wanted = field.della_probabilities(torch.ones(1, 11), 0.7, 0.15)[0]
    assert wanted.tolist() == pytest.approx([0.55 + 0.03 * i for i in range(11)])
    assert float((kept.double().mean(0) - wanted).abs().max()) < 5 * 0.5 / 4000**0.5


def test_della_never_drops_what_is_sure_to_be_kept() -> None:
    models = changes(1, 5, F32, {Q: (4000, 5)})
    value = models[0][Q]
    got = merged(models, "della", density=0.6, epsilon=0.4).view(4000, 5)
    largest = value.abs().argmax(1, keepdim=True)
    assert equal(got.gather(1, largest), value.gather(1, largest))
    assert 0.5 < float((got != 0).double().mean()) < 0.7


def test_della_rescales() -> None:
    shapes = {**PLACES, "one.weight": (30, 1)}
    models, keys = changes(3, 2, F64, shapes), "abc"
    options: Any = {"keys": keys, "density": (0.7, 0.5, 0.8), "epsilon": (0.15, 0.4, 0.0), "seed": 3}
    for i, (density, epsilon) in enumerate(zip(options["density"], options["epsilon"], strict=True)):
        alone: Any = {"keys": keys[i], "density": density, "epsilon": epsilon, "seed": 3}
        none, inverse, l1 = (
            merging.merge_deltas(dense(models[i : i + 1]), method="della", rescale=rescale, **alone)
            for rescale in ("none", "inverse", "l1")
        )
        for name, value in models[i].items():
            thin = none[name].dense()
            assert equal(thin != 0, inverse[name].dense() != 0) and equal(thin != 0, l1[name].dense() != 0)
            if thin.any():
                assert close(l1[name].dense(), thin * value.abs().sum() / thin.abs().sum(), 1e-12)
                assert float(l1[name].dense().abs().sum()) == pytest.approx(float(value.abs().sum()), rel=1e-12)
            if value.numel() == 1 or name == "one.weight":  # no ranks among one entry
                assert float(inverse[name].dense().abs().sum()) <= float(thin.abs().sum()) / (density - epsilon) + 1e-12
                continue
            p = field.della_probabilities(as_rows(name, value), density, epsilon).view(value.shape)
            assert close(inverse[name].dense(), torch.where(thin != 0, value / p, 0), 1e-12)
    parts = [
        merged(models[i : i + 1], "della", keys=keys[i], density=density, epsilon=epsilon, seed=3)
        for i, (density, epsilon) in enumerate(zip(options["density"], options["epsilon"], strict=True))
    ]
    assert close(merged(models, "della", **options), sum(parts), 1e-12)
    before_ties = {key: value for key, value in options.items() if key != "density"}
    before_ties |= {"della.density": options["density"], "ties.density": 0.4}
    assert close(merged(models, "della+ties", **before_ties), ties(torch.stack(parts), 0.4), 1e-12)


def test_della_draws_for_places() -> None:
    models = changes(3, 4, F32, PLACES)
    got = merged(models, "della", keys="abc", seed=7)
    assert equal(merged(models, "della", keys="abc", seed=7), got)
    assert equal(merged([dict(reversed(each.items())) for each in models], "della", keys="abc", seed=7), got)
    assert close(merged(models[::-1], "della", keys="cba", seed=7), got)
    assert not close(merged(models[::-1], "della", keys="abc", seed=7), got, 0.01)
    for other in ({"keys": "abd", "seed": 7}, {"keys": "abc", "seed": 8}):
        assert not close(merged(models, "della", **other), got, 0.01)
    assert equal(merged(models, "della", keys="abc"), merged(models, "della", keys="abc", seed=0))


def test_della_keeps_the_expectation() -> None:
    (model,) = changes(1, 3, F64, {Q: (6, 9), "layers.0.bias": (17,)})
    x, runs = flatten([model])[0], 600
    mean_of = sum(merged([model], "della", seed=seed) for seed in range(runs)) / runs
    p = torch.cat([field.della_probabilities(as_rows(n, model[n]), 0.7, 0.15).flatten() for n in sorted(model)])
    z = (mean_of - x) / (x.abs() * ((1 - p) / p / runs).sqrt())
    assert float(z.abs().max()) < 4.5 and 0.5 < float(z.square().mean()) < 1.6


# ---- Cut into blocks, from files


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
def test_from_files(method: str, options: Any, files: Any) -> None:
    """A tensor of more than a tile, with one thread and with several, as in memory."""
    count = {"nearswap": 1, "passthrough": 1, "nuslerp": 2, "arcee_fusion": 2}.get(method, 3)
    given = {} if method == "arcee_fusion" else {"base": files.base}
    paths = files.paths[:count]
    origin = {} if method == "arcee_fusion" else {"base": files.origin}
    keys = merging.preview(paths, method=method, **origin, **options).keys
    wanted = weights_merged(files.models[:count], method, keys=keys, **given, **options)
    for threads in (1, 3):
        merging.merge(paths, method=method, output=files.output, threads=threads, overwrite=True, **origin, **options)
        got = flatten([load(files.output)])[0]
        assert close(got, wanted, 1e-6)
        assert float(((got - wanted).abs() > 1e-4).double().mean()) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three fine-tunes of a base in files, a matrix and a vector of more than a tile."""
    folder = tmp_path_factory.mktemp("files")
    shapes = LARGE | {"layers.2.bias": (TILE + 5,)}
    (base,) = changes(1, 9, shapes=shapes)
    models = plus(base, changes(3, shapes=shapes))
    paths = [save(folder / f"tuned{i}", each, shards=1 + i % 2) for i, each in enumerate(models)]
    return SimpleNamespace(
        base=base, models=models, paths=paths, origin=save(folder / "base", base), output=folder / "out"
    )


# ---- Refusals

REFUSED: Any = [
    ("della", {"density": 0.0}),
    ("della", {"density": 1.5}),
    ("della", {"epsilon": -0.1}),
    ("della", {"density": 0.1}),  # minus epsilon is not above 0
    ("della", {"density": 0.15}),
    ("della", {"density": 0.9}),  # plus epsilon is above 1
    ("della", {"density": (0.7, 0.7, 0.9)}),
    ("della", {"density": 0.7, "epsilon": (0.15, 0.15, 0.7)}),
    ("della", {"rescale": "both"}),
    ("breadcrumbs", {"density": 0.0}),
    ("breadcrumbs", {"density": 1.1}),
    ("breadcrumbs", {"gamma": -0.1}),
    ("breadcrumbs", {"gamma": 1.0}),
    ("sce", {"density": 0.0}),
    ("sce", {"density": 1.01}),
    ("sce", {"select": "both"}),
    ("ram", {"epsilon": -1.0}),
    ("ramplus_tl", {"epsilon": -1.0}),
    ("ramplus_tl", {"r": -0.1}),
    ("ramplus_tl", {"alpha": -0.1}),
    ("nuslerp", {"axis": "planes"}),
    ("nuslerp", {"space": "latent"}),
    ("multislerp", {"space": "latent"}),
    ("nuslerp", {"weights": (1.0, -1.0)}),
    ("karcher", {"weights": (1.0, -1.0, 1.0)}),
    ("karcher", {"max_iter": -1}),
    ("karcher", {"tol": -1.0}),
    ("nearswap", {"t": -1.0}),
    ("iso_cts", {"common": -0.1}),
    ("iso_cts", {"common": 1.1}),
    ("knots", {"align": "both"}),
    ("wudi", {"mode": "open"}),
    ("wudi", {"steps": -1}),
    ("svd", {"energy": 0.0}),
    ("svd", {"energy": 1.1}),
    ("svd", {"max_rank": 0}),
]


@pytest.mark.parametrize(("method", "options"), REFUSED, ids=str)
def test_parameters_out_of_bounds_are_refused(method: str, options: Any) -> None:
    models = changes({"nuslerp": 2, "nearswap": 1}.get(method, 3), 1)
    if method in ("nuslerp", "multislerp", "karcher"):
        options = {"space": "changes", **options}
    (*_, name) = options
    with pytest.raises(OptionError, match=rf"\b({method}\.{name}|{name} of {method})\b"):
        merged(models, method, **options)


def test_models_are_counted() -> None:
    for method, count in (("nuslerp", 1), ("nuslerp", 3), ("model_stock", 1)):
        options = {"space": "changes"} if method == "nuslerp" else {}
        with pytest.raises(OptionError, match=f"{method}.*{count} (was|were) given"):
            merged(changes(count, 1), method, **options)
    with pytest.raises(OptionError, match="3 values for 2 models"):
        merged(changes(2, 1), "svd", weights=EXACT)
