"""Methods on low-rank changes: from factors as from full changes, and what is low-rank stays so."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merging
from merging.maths.delta import LowRank
from support import references
from support.changes import EXACT, EXPERTS, F32, F64, Q, close, dense, merged, written
from support.factors import low, modules, pairs
from support.on_models import (
    TABLE,
    core_ties,
    doubles,
    dtypes,
    inner,
    knots_ties,
    mean,
    on_flat,
    side_by_side,
    weighted,
)
from support.paths import SHIPPED

CTM = {"max_rank": 3, "steps": 5, "tol": 0.0}


def compressed_sum(tau: Tensor) -> Tensor:
    u, v, inside = references.ctm(tau, 3)
    return u @ inside.sum(0) @ v.T


# Name -> (method, parameters, reference on [n, out, in])
LOW: Any = {
    "tsv": ("tsv", {"scale": 0.7}, inner(references.tsv, scale=0.7)),
    "iso_c": ("iso_c", {}, references.iso_c),
    "iso_cts": ("iso_cts", {}, references.iso_cts),
    "iso_cts-own": ("iso_cts", {"common": 0.4, "scale": 0.7}, inner(references.iso_cts, common=0.4, scale=0.7)),
    "wudi": ("wudi", {}, references.wudi),
    "actmat": ("actmat", {}, references.actmat),
    "ace": ("ace", {}, references.ace),
    "ace-unequal": ("ace", {"threshold": 0.01, "refine": 0.5}, inner(references.ace, threshold=0.01, refine=0.5)),
    "star": ("star", {"eta": 0.7}, inner(references.star, eta=0.7)),
    "dc_merge": ("dc_merge", {}, references.dc_merge),
    "dc_merge-own": (
        "dc_merge",
        {"keep": 0.2, "smooth": "linear", "scale": 0.7},
        inner(references.dc_merge, keep=0.2, smooth="linear", scale=0.7),
    ),
    "dop": ("dop", {"scale": 0.7}, inner(references.dop, scale=0.7)),
    "svc": ("svc", {}, lambda tau: references.svc(tau, tau.sum(0))),
    "pico": ("pico", {"norm": 0.7}, lambda tau: references.pico(tau, lambda x: x.sum(0), 0.7)),
    "ctm": ("ctm", CTM, compressed_sum),
    "geometric_median": ("geometric_median", {"scale": 0.7}, on_flat(references.geometric_median, scale=0.7)),
    "svd": ("svd", {"energy": 0.8, "weights": EXACT}, inner(references.svd, energy=0.8, weights=EXACT)),
    "svd-components": ("svd", {"energy": 1.0, "max_rank": 3}, inner(references.svd, energy=1.0, components=3)),
    "varm": ("varm", {"scale": 0.7}, on_flat(references.varm, scale=0.7)),
    "model_stock": ("model_stock", {}, on_flat(references.model_stock)),
    "multislerp": ("multislerp", {"space": "changes"}, on_flat(references.multislerp)),
    "karcher": ("karcher", {"space": "changes"}, on_flat(references.karcher)),
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


@pytest.mark.parametrize("ranks", [(2, 3, 2), (0, 0, 0)])
@pytest.mark.parametrize("name", [*LOW, "sce", "ram", "ties"])
def test_factors_of_zero(name: str, ranks: tuple[int, ...]) -> None:
    method, options, _ = LOW.get(name, (name, {}, None))
    adapters = [{Q: low((0 * up, down))} for up, down in pairs(20, 31, ranks)]
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


SLOW = ("dop", "ctm", "pico")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in SLOW)) for name in LOW])
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
        ("tsv", references.tsv, mean()),
        ("iso_c", references.iso_c, mean(1.5)),
        ("iso_cts", references.iso_cts, mean(1.5)),
        ("wudi", references.wudi, mean()),
        ("svd", references.svd, lambda x: x.sum(0)),
    ):
        wanted = (reference if embeddings else plain)(tau)
        for inputs in (adapters, written(adapters)):
            got = merged(inputs, method, embeddings=embeddings).view(20, 12)
            assert close(got, wanted.T, 1e-9)
