"""Measures of merges: against plain computations in float64, for any number of threads, and without touching a byte."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merging
from merging.engine import probe
from merging.engine.measures import Measure, Measures
from merging.maths.delta import LowRank
from support import tiny

pytestmark = pytest.mark.usefixtures("no_pictures")

F64 = torch.float64
PIECE = 32


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have only tables, as without matplotlib: pictures take longer than these merges."""
    monkeypatch.setattr("merging.api.report_page.find_spec", lambda name: None)


def saved(folder: Path, count: int, **shape: Any) -> tuple[Path, list[Path]]:
    """Models in float64, whose outputs hold what was computed."""
    return tiny.checkpoint(folder, count, dtype=F64, **shape)


def flat(path: Path, name: str) -> Tensor:
    return tiny.load(path)[name].double().flatten()


def sampled(values: Tensor, piece: int) -> Tensor:
    """The values in one of four pieces."""
    places = torch.arange(values.shape[-1]) // piece % 4 == 0
    return values[..., places]


def reference(changes: Tensor, merged: Tensor, base: Tensor | None, weights: Sequence[float], piece: int) -> Measure:
    """The measure of flat changes, ``[n, elements]``, as its definition says."""
    weighted = torch.tensor(weights, dtype=F64)[:, None] * changes
    part = sampled(weighted, piece)
    if len(changes) == 1:
        part = part[:, :0]  # nothing interferes
    magnitudes, net = part.abs().sum(0), part.sum(0).abs()
    opposite = (part > 0).any(0) & (part < 0).any(0)
    return Measure(
        elements=merged.numel(),
        sampled=part.shape[1],
        base=0.0 if base is None else float(base.square().sum()),
        merged=float(merged.square().sum()),
        magnitude=float(magnitudes.sum()),
        net=float(net.sum()),
        conflicting=float(magnitudes[opposite].sum()),
        changes=tuple(changes.square().sum(1).tolist()),
        products=tuple((changes @ merged).tolist()),
        parts=tuple((weighted @ merged).tolist()),
    )


def assert_close(found: Measure, wanted: Measure, tolerance: float = 1e-9) -> None:
    scale = max(map(abs, wanted.numbers()))
    assert found.numbers() == pytest.approx(wanted.numbers(), rel=tolerance, abs=tolerance * scale)


CHAINS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weights": [1.0, 0.5, -0.7]},
    "ties": {"density": 0.5},
    "lines+linear": {},
    "lines+slerp": {"models": 2},
    "tsv": {},
    "linear": {"weights": [1.0, 2.0, 1.0]},
    "karcher": {"models": 2},
    "nuslerp": {"models": 2},
}


def some(chains: Sequence[str]) -> list[Any]:
    """The first two every day, the others in long runs."""
    return [*chains[:2], *(pytest.param(each, marks=pytest.mark.exhaustive) for each in chains[2:])]


@pytest.mark.parametrize("method", some(list(CHAINS)))
def test_numbers_are_those_of_flat_models(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tile, by whole matrix and set aside: every number of every tensor, in pieces that are smaller than most."""
    monkeypatch.setattr(probe, "_PIECE", PIECE)
    options = dict(CHAINS[method])
    base, models = saved(tmp_path, options.pop("models", 3))
    out = tmp_path / "out"
    merged = merging.merge(models, method=method, base=base, output=out, report=tmp_path / "r.html", **options)
    assert merged.report is not None and merged.report.changes
    assert {each.name for each in merged.report.tensors} == tiny.load(base).keys()
    weights = options.get("weights", [1.0] * len(models))
    for each in merged.report.tensors:
        start = flat(base, each.name)
        changes = torch.stack([flat(model, each.name) - start for model in models])
        whole = reference(changes, flat(out, each.name) - start, start, weights, PIECE)
        assert_close(each.measure, whole)
    assert sum(each for each in merged.report.total.measure.shares if each) == pytest.approx(1)  # type: ignore[union-attr]


def test_without_a_base_distances_are_measured(tmp_path: Path) -> None:
    _, models = saved(tmp_path, 3)
    merged = merging.merge(models, method="linear", output=tmp_path / "out", report=tmp_path / "r.html")
    assert merged.report is not None and not merged.report.changes
    for each in merged.report.tensors:
        middle = flat(tmp_path / "out", each.name)
        distances = [float((flat(model, each.name) - middle).norm()) for model in models]
        assert each.measure.norms == pytest.approx(distances)
        assert each.measure.norm == pytest.approx(float(middle.norm()))
        assert each.measure.magnitude == 0 and each.measure.conflict is None and each.measure.shares == (None,) * 3
    assert "Without a base" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_factors_are_measured_as_their_products(kind: Any, tmp_path: Path) -> None:
    """Adapters that stay factors, and adapters that are baked; small ones are sampled in full."""
    base, adapters = tiny.adapters(tmp_path, 2)
    merged = merging.merge(
        adapters,
        method="task_arithmetic",
        weights=[1.0, -0.5],
        output=tmp_path / "out",
        kind=kind,
        base=base if kind == "model" else None,
        dtype="float64",
        report=tmp_path / "r.html",
    )
    assert merged.report is not None and len(merged.report.tensors) == 2
    for each in merged.report.tensors:
        changes = torch.stack([_product(adapter, each.name) for adapter in adapters])
        start = flat(base, each.name) if kind == "model" else None
        whole = changes[0] - 0.5 * changes[1]
        assert_close(each.measure, reference(changes, whole, start, [1.0, -0.5], 1 << 20))


def _product(adapter: Path, name: str) -> Tensor:
    tensors = tiny.load(adapter)
    (down,) = (value for key, value in tensors.items() if key.endswith(f"{name.removesuffix('.weight')}.lora_A.weight"))
    (up,) = (value for key, value in tensors.items() if key.endswith(f"{name.removesuffix('.weight')}.lora_B.weight"))
    return (up.double() @ down.double() * 2 / len(down)).flatten()  # alpha is 2


@pytest.mark.exhaustive
def test_samples_of_factors_are_evenly_spread() -> None:
    """Of matrices rows, of experts rows of some of them, and always the same places of all models."""
    random = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*shape, generator=random) for shape in ((1000, 3), (3, 200)))
    rows = probe._sample_rows(LowRank(up, down, (1000, 200)), 2000)
    assert torch.equal(rows, up[::100] @ down)
    up, down = (torch.randn(*shape, generator=random) for shape in ((32, 100, 3), (32, 3, 20)))
    rows = probe._sample_rows(LowRank(up, down, (32, 100, 20)), 8 * 20 * 5)
    assert torch.allclose(rows, up[::4, ::20] @ down[::4], rtol=1e-5)


def test_reports_change_no_byte_and_no_number_by_threads(tmp_path: Path) -> None:
    base, models = tiny.checkpoint(tmp_path, 3, dtype=torch.bfloat16, width=16, layers=4)
    options = {"method": "ties", "base": base, "density": 0.4}
    merging.merge(models, output=tmp_path / "plain", **options)  # type: ignore[arg-type]
    found = []
    for threads in (1, 4):
        out = tmp_path / str(threads)
        page = tmp_path / f"{threads}.html"
        merged = merging.merge(models, output=out, threads=threads, report=page, **options)  # type: ignore[arg-type]
        assert tiny.identical(tiny.load(out), tiny.load(tmp_path / "plain"))
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
        assert merged.report is not None
        found.append({each.name: each.measure.numbers() for each in merged.report.tensors})
    assert found[0] == found[1] and len(found[0]) == 11


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", CHAINS)
def test_all_methods_give_the_same_with_any_number_of_threads(method: str, tmp_path: Path) -> None:
    """Of tensors that several units share, too: their sums are rounded once."""
    options = dict(CHAINS[method])
    base, models = tiny.checkpoint(tmp_path, options.pop("models", 3), layers=2, width=8)
    random = torch.Generator().manual_seed(3)
    big = {"big.weight": torch.randn(1300, 4096, generator=random)}
    for seed, folder in enumerate((base, *models)):
        tensors = {**tiny.load(folder), "big.weight": tiny.fine_tune(big, seed)["big.weight"]}
        tiny.save(folder, tensors)
    if method == "tsv":  # decompositions of large matrices take long
        options["exclude"] = "big"
    seen = []
    for threads in (None, 1, 5):
        page = tmp_path / f"{threads}.html" if threads else None
        merged = merging.merge(
            models, method=method, base=base, output=tmp_path / "out", overwrite=True, threads=threads or 2,
            report=page, **options,
        )  # fmt: skip
        numbers = merged.report and {each.name: each.measure.numbers() for each in merged.report.tensors}
        seen.append((numbers, (tmp_path / "out" / "model.safetensors").read_bytes()))
    assert seen[0][1] == seen[1][1] == seen[2][1]
    assert seen[1][0] == seen[2][0]


def test_extracted_changes_are_measured_before_the_cut(tmp_path: Path) -> None:
    base, (model,) = saved(tmp_path, 1, width=16)
    merged = merging.extract(model, base=base, output=tmp_path / "lora", energy=0.7, report=tmp_path / "r.html")
    assert merged.report is not None
    for each in merged.report.tensors:
        start = flat(base, each.name)
        change = (flat(model, each.name) - start)[None]
        assert_close(each.measure, reference(change, change[0], start, [1.0], 1 << 20))
        assert each.measure.shares in ((1.0,), (None,))
        assert each.discarded == merged.discarded.get(each.name)
    energy = merged.report.total and merged.report.total.discarded
    assert energy is not None and 0 < energy < 0.3


def test_values_that_are_not_finite_are_not_measured(tmp_path: Path) -> None:
    """And named: the others are."""
    base, models = tiny.checkpoint(tmp_path, 2)
    tensors = tiny.load(models[0])
    tensors["lm_head.weight"][0, 0] = torch.inf
    tiny.save(models[0], tensors)
    merged = merging.merge(
        models, method="linear", base=base, allow_nonfinite=True, output=tmp_path / "out", report=tmp_path / "r.html"
    )
    assert merged.report is not None
    assert merged.report.missing == ("lm_head.weight",)
    assert len(merged.report.tensors) == len(tensors) - 1
    assert "lm_head.weight" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_measures_merge_in_any_order_and_travel() -> None:
    """Workers of other processes return them pickled; sums are rounded once, whatever the order."""
    rows = [[1.0, 0.0, 0.0, value, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] for value in (1e16, 1.0, -1e16, 1.0)]
    one, other = Measures(), Measures()
    one.add("w", rows[0])
    other.add("w", rows[1])
    one.merge(pickle.loads(pickle.dumps(other)))
    one.add("w", rows[2])
    one.add("w", rows[3])
    assert one.results()["w"].merged == 2.0
    assert one.results()["w"].elements == 4.0
