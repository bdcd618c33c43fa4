"""Intruder dimensions, found in the base's own basis, against the SVD of the whole matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.geometry import compare
from merging.maths import intruders
from merging.maths.delta import Delta, Dense, LowRank
from merging.maths.intruders import Intruders
from merging.maths.linalg import decompose
from support import tiny

F64 = torch.float64


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_values(out: int, into: int, values: Tensor) -> Tensor:
    """A matrix with these singular values."""
    u, v = (torch.linalg.qr(random(i, side, len(values)))[0] for i, side in enumerate((out, into)))
    return (u * values) @ v.mT


def low_rank(out: int, into: int, rank: int, size: float) -> LowRank:
    return LowRank(size * random(5, out, rank) / out**0.5, random(6, rank, into) / into**0.5, (out, into))


def dense(weight: Tensor, delta: Delta, k: int, threshold: float) -> tuple[Tensor, Tensor, list[int], float]:
    """The definition: similarities, singular values, numbers of the intruders, their share of the energy."""
    u0 = torch.linalg.svd(weight, full_matrices=False)[0]
    u, s, _ = torch.linalg.svd(weight + delta.dense(), full_matrices=False)
    similarity = (u0.mT @ u[:, :k]).abs().amax(0)
    which = [j for j in range(len(similarity)) if similarity[j] < threshold]
    return similarity, s[:k], which, float(s[which].square().sum() / s.square().sum())


def assert_is(found: Intruders, wanted: tuple[Tensor, Tensor, list[int], float], tolerance: float = 1e-9) -> None:
    similarity, values, which, share = wanted
    assert found.similarity == pytest.approx(similarity.tolist(), abs=tolerance)
    assert found.values == pytest.approx(values.tolist(), rel=tolerance)
    assert list(found.which) == which
    assert found.share == pytest.approx(share, abs=tolerance)
    assert found.first == (which[0] + 1 if which else None)


@pytest.mark.parametrize("full", [False, True], ids=["factors", "full"])
@pytest.mark.parametrize(("out", "into"), [(40, 40), (60, 25), (25, 60), (260, 220), (220, 260)])
@pytest.mark.parametrize("size", [0.5, 1.5, 4.0])
def test_fast_is_dense(out: int, into: int, size: float, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, which are decomposed, and larger ones, where the leading vectors are searched for."""
    monkeypatch.setattr(intruders, "_SMALL", 200)
    weight = with_values(out, into, torch.linspace(3, 0.1, min(out, into), dtype=F64))
    delta: Delta = low_rank(out, into, 6, 3 * size)
    delta = Dense(delta.dense()) if full else delta
    found = intruders.intruders(decompose(weight), delta, weight)
    assert_is(found, dense(weight, delta, 10, 0.5))
    assert len(found.values) == 10


def test_large_matrices_are_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the base is, leading vectors are found by products with thin blocks alone."""
    weight = with_values(600, 520, torch.logspace(0, -2, 520, dtype=F64))
    delta = low_rank(600, 520, 6, 1.0)
    base, wanted = decompose(weight), dense(weight, delta, 10, 0.5)
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert wanted[2]
    assert_is(intruders.intruders(base, delta, weight), wanted)


def test_intruders_come_in_and_go() -> None:
    """The larger the change, the more there are, and the higher the threshold."""
    weight = with_values(64, 48, torch.linspace(2, 0.1, 48, dtype=F64))
    base = decompose(weight)
    by_size = [intruders.intruders(base, low_rank(64, 48, 6, size), weight) for size in (0.01, 4.0, 40.0)]
    assert by_size[0].which == ()
    assert by_size[2].which == tuple(range(6))
    assert by_size[2].share > 0.9 > by_size[0].share == 0
    counts = [by_size[1].below(threshold) for threshold in (0.0, 0.3, 0.5, 0.9, 1.1)]
    assert counts == sorted(counts)
    assert (counts[0], counts[2], counts[4]) == (0, len(by_size[1].which), 10)


@pytest.mark.parametrize("k", [1, 3, 25, 60])
def test_any_number_of_leading_vectors(k: int) -> None:
    weight = with_values(40, 25, torch.linspace(2, 0.1, 25, dtype=F64))
    delta = low_rank(40, 25, 4, 6.0)
    found = intruders.intruders(decompose(weight), delta, weight, k=k, threshold=0.7)
    assert_is(found, dense(weight, delta, k, 0.7))


@pytest.mark.parametrize(
    "values", [torch.logspace(0, -9, 240), torch.cat([torch.linspace(2, 1, 40), torch.zeros(200)])]
)
def test_bases_of_ill_condition(values: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values that fall off steeply, or to nothing."""
    monkeypatch.setattr(intruders, "_SMALL", 200)
    weight = with_values(240, 240, values.double())
    delta = low_rank(240, 240, 4, 3.0)
    u0, _, _ = base = decompose(weight)
    found = intruders.intruders(base, delta, weight)
    u, s, _ = torch.linalg.svd(weight + delta.dense())
    # the base's own vectors of no singular value are whatever its decomposition chose
    assert found.similarity == pytest.approx((u0.mT @ u[:, :10]).abs().amax(0).tolist(), abs=1e-7)
    assert found.values == pytest.approx(s[:10].tolist(), rel=1e-9)


def test_what_lies_outside_of_a_thin_base() -> None:
    """A tall matrix has fewer left vectors than rows: the rest bounds the cosine to any vector that completes them."""
    weight = with_values(60, 20, torch.linspace(2, 0.1, 20, dtype=F64))
    u0 = torch.linalg.svd(weight, full_matrices=False)[0]
    for delta in (low_rank(60, 20, 3, 9.0), Dense(low_rank(60, 20, 3, 9.0).dense())):
        found = intruders.intruders(decompose(weight), delta, weight)
        u = torch.linalg.svd(weight + delta.dense(), full_matrices=False)[0][:, :10]
        assert found.outside == pytest.approx((u - u0 @ (u0.mT @ u)).norm(dim=0).tolist(), abs=1e-9)


def test_an_unchanged_matrix_has_none() -> None:
    for side in (30, 600):
        weight = with_values(side, side, torch.linspace(2, 0.1, side, dtype=F64))
        for delta in (low_rank(side, side, 3, 0.0), Dense(torch.zeros(side, side))):
            found = intruders.intruders(decompose(weight), delta, weight)
            assert found.which == ()
            assert found.similarity == pytest.approx([1.0] * 10, abs=1e-9)
            assert found.share == 0.0
    nothing = torch.zeros(30, 30, dtype=F64)
    found = intruders.intruders(decompose(nothing), low_rank(30, 30, 3, 0.0), nothing)
    assert (found.which, found.share) == ((), 0.0)
    assert found.below(2.0) == 0


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
def test_in_a_comparison(turned: bool, tmp_path: Path) -> None:
    """Of every changed matrix: outputs are outputs, however they are stored."""
    weight, change = with_values(30, 20, torch.linspace(2, 0.1, 20, dtype=F64)), low_rank(30, 20, 3, 9.0)
    if turned:
        names = ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"]
        shapes: list[Any] = [torch.zeros(30, 90, dtype=F64), weight.mT]
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    else:
        names, shapes, config = ["model.layers.0.mlp.up_proj.weight"], [weight], dict(tiny.CONFIG)
    before = {name: value.contiguous() for name, value in zip(names, shapes, strict=True)}
    dense_change = change.dense().mT if turned else change.dense()
    after = before | {names[-1]: (before[names[-1]] + dense_change).contiguous()}
    base, tuned = tiny.save(tmp_path / "base", before, config), tiny.save(tmp_path / "tuned", after, config)
    found = compare([tuned, base], base=base, intruders=True).intruders
    wanted = dense(weight, change, 10, 0.5)
    assert wanted[2]
    assert_is(found[0].by_tensor[names[-1]], wanted)
    assert (found[0].count, found[0].touched, found[0].matrices) == (len(wanted[2]), 1, 1)
    assert (found[1].count, found[1].matrices, found[1].share) == (0, 0, 0.0)
    assert found[0].first == wanted[2][0] + 1
    assert found[1].first is None
