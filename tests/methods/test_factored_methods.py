"""OPCM, DO-Merging and its halves against naive references, on full matrices and on factors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, equal

import merging
from merging.maths.delta import Dense, LowRank, Stack
from merging.maths.layers import Stacks
from merging.maths.site import site_of
from merging.methods import chain
from merging.methods.contract.wrapper import unwrap_outer
from merging.methods.opcm import accumulate, projected
from merging.methods.orthogonalize import orthogonalized, overlap
from support import references
from support.changes import (
    EXACT,
    EXPERTS,
    F32,
    F64,
    PLACES,
    K,
    Q,
    changes,
    close,
    dense,
    merged,
    written,
)
from support.references import flatten

weighings = pytest.mark.parametrize("weights", [{}, {"weights": EXACT}], ids=["plain", "weighted"])
variants = pytest.mark.parametrize("variant", ["code", "vision", "es", "paper"])
modes = pytest.mark.parametrize("mode", ["block", "two_sided"])


# ---- OPCM


def one_by_one(models: Any, alpha: float, mode: Any) -> Any:
    """The reference, in float64, where an expert is a matrix of its own."""
    split = [{name: value.double() for name, value in each.items() if name != EXPERTS} for each in models]
    for each, apart in zip(models, split, strict=True):
        apart |= {f"{EXPERTS}.{i}": expert.double() for i, expert in enumerate(each.get(EXPERTS, []))}
    out = references.opcm(split, [n for n, v in split[0].items() if v.dim() == 2 and "layers." in n], alpha, mode)
    own = [out.pop(name) for name in sorted(out) if name.startswith(EXPERTS)]
    return out | ({EXPERTS: torch.stack(own)} if own else {})


def check_opcm(adapters: Any, alpha: float, mode: str, within: float = 1e-5, models: Any = None, **options: Any) -> Any:
    got = merging.merge_deltas(adapters, method="opcm", alpha=alpha, mode=mode, **options)
    wanted = one_by_one(models or written(adapters), alpha, mode)
    assert got.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not close(got[name].dense().double(), value, within)] == []
    return got


@modes
@pytest.mark.parametrize("svd", ["gram", "thin"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_opcm(mode: str, svd: str, dtype: torch.dtype) -> None:
    models, within = changes(6, 8, dtype, PLACES), 1e-5 if dtype == F32 else 1e-9
    for alpha in (0.2, 0.5, 0.9):
        got = check_opcm(dense(models), alpha, mode, within, svd=svd)
    length = flatten(written([got]))[0].norm()
    assert float(length) == pytest.approx(float(flatten(models).norm(dim=1).mean()), rel=1e-6)
    for frozen in (models[0], models[3]):
        frozen[K], frozen[EXPERTS] = 0 * frozen[K], 0 * frozen[EXPERTS]
    check_opcm(dense(models), 0.5, mode, within, svd=svd)
    one = models[1]
    twice = merging.merge_deltas(dense([one, one]), method="opcm", mode=mode, svd=svd)
    factor = float((twice["patch.weight"].dense() / one["patch.weight"]).mean()) / 2
    for name, value in one.items():  # what is projected is not there twice
        times = 1 if "layers." in name and value.dim() > 1 else 2
        assert close(twice[name].dense(), times * factor * value, 1e-5)


@modes
@pytest.mark.parametrize("shape", [(6, 5), (40, 30), (30, 40)])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcm_of_factors(mode: str, shape: Any, transposed: bool) -> None:
    adapters = [{name: low(pair, transposed=transposed) for name in (Q, K)} for pair in pairs(*shape, (2, 2, 2, 2))]
    full = written(adapters)
    del adapters[0][Q]
    full[0][Q] = 0 * full[0][Q]
    for alpha in (0.2, 0.5, 0.9):
        got = check_opcm(adapters, alpha, mode, models=full)
        assert isinstance(got[K], LowRank) and got[K].rank <= 8
        check_opcm(dense(full), alpha, mode)


@modes
@pytest.mark.parametrize("svd", ["gram", "thin"])
def test_opcm_projection(mode: str, svd: str) -> None:
    for (rows, columns), condition in itertools.product([(20, 12), (12, 20), (12, 12)], [1e-1, 1e-4, 1e-8, 1e-12]):
        new, u, v = torch.randn(3, 20, 20, dtype=F64, generator=torch.Generator().manual_seed(rows))
        sigma = condition ** torch.linspace(0, 1, 12, dtype=F64)
        old = torch.linalg.qr(u[:rows, :12])[0] * sigma @ torch.linalg.qr(v[:columns, :12])[0].T
        new = new[:rows, :columns]
        for alpha in (0.0, 0.5, 0.9, 1.0):
            rest = projected(new, old, alpha, mode, 1e-14, svd)
            assert float((rest * old).sum().abs()) < 1e-10 * float(new.norm() * old.norm())
            assert float(projected(old, old, alpha, mode, 1e-14, svd).norm()) < 1e-10 * float(old.norm())
            check_opcm(dense([{Q: old}, {Q: new}]), alpha, mode, svd=svd) if alpha < 1 else None
        assert equal(accumulate([0 * old, new], 0.5, mode, 1e-14, svd), new)


# ---- DO, decouple, orthogonalize


def pairs(rows: int, columns: int, ranks: Any, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Factors ``(up, down)`` of adapters, each of a size of its own."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(torch.randn(rows, r, generator=g), torch.randn(r, columns, generator=g)) for r in ranks]
    return [((i + 1) ** 2 * up.double(), down.double()) for i, (up, down) in enumerate(sizes)]


def low(pair: tuple[Tensor, Tensor], shape: Any = None, transposed: bool = False) -> LowRank:
    plain = (pair[0].shape[0], pair[1].shape[1])
    return LowRank(*pair, shape or (plain[::-1] if transposed else plain), transposed)


@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("ranks", [(2,), (2, 2), (1, 3, 2), (6, 6)])
def test_do(steps: int, ranks: Any) -> None:
    made = pairs(9, 12, ranks)
    made[0][1][:, 3] = 0
    for pair in made:
        pair[1][:, 5] = 0  # columns without change, of one adapter and of all
    adapters: Any = [{Q: low(p), K: low(p, transposed=True), "c.weight": low(p, (9, 3, 2, 2))} for p in made]
    adapters += [{"other": low(made[0])}]  # lacks these modules, and does not count
    wanted = references.do_merging(made, steps, scale=1.5)
    got = merging.merge_deltas(adapters, method="do", steps=steps, scale=1.5)
    assert all(isinstance(delta, LowRank) and delta.rank == sum(ranks) for delta in list(got.values())[:3])
    assert close(got[Q].dense(), wanted, 1e-9) and not got[Q].dense()[:, 5].any()
    assert close(got[K].dense(), wanted.T, 1e-9) and close(got["c.weight"].dense().flatten(1), wanted, 1e-9)
    assert close(got["other"].dense(), 1.5 * low(made[0]).dense(), 1e-12)
    if len(ranks) == 1:
        assert close(wanted, 1.5 * low(made[0]).dense(), 1e-12)
    if steps == 0:
        full = [{Q: low(pair).dense()} for pair in made]
        assert close(merged(full, "do", scale=1.5, steps=0), wanted.flatten(), 1e-12)
        assert close(merged(full, "decouple+linear") * 1.5, wanted.flatten(), 1e-12)
    # a larger adapter changes magnitudes only, and these in proportion
    grown = [
        merged([{Q: low(made[0]).scaled(c)}, *({Q: low(p)} for p in made[1:])], "do", steps=steps) for c in (1, 2, 5)
    ]
    assert close(grown[2] - grown[0], 4 * (grown[1] - grown[0]), 1e-9)
    units = [each.view(9, 12) / each.view(9, 12).norm(dim=0).clamp(min=1e-9) for each in grown]
    assert len(ranks) == 1 or float((units[2] - units[0])[:, [i for i in range(12) if i not in (3, 5)]].norm()) < 1e-9


def test_directions_have_columns_of_length_one() -> None:
    inputs: Any = {Q: -2, "embed_tokens.weight": 1, "patch.weight": (0,), EXPERTS: -2, "h.weight": 1}
    for name, outputs in inputs.items():
        shape = PLACES.get(name, (7, 8))
        site = site_of(name, shape, Stacks.from_names(PLACES), transposed=name == "h.weight")
        stack = Stack([Dense(each[""]) for each in changes(2, 1, F64, {"": shape})])
        for each in unwrap_outer(chain("decouple+ties"), stack, site, {}).stack.deltas:
            norms = each.dense().norm(dim=outputs)
            assert torch.allclose(norms, torch.ones_like(norms), rtol=1e-12)
    made = pairs(9, 12, (2, 3))
    factors = unwrap_outer(
        chain("decouple+linear"), Stack([low(pair) for pair in made]), site_of(Q, (9, 12), Stacks({})), {}
    )
    assert factors.stack.low_rank and close(factors.stack.dense().norm(dim=1), torch.ones(2, 12, dtype=F64), 1e-12)
    magnitudes, directions = references.decoupled(torch.stack([low(pair).dense() for pair in made]))
    wanted = references.ties(directions.flatten(1)) * magnitudes.mean(0).repeat(9)
    assert close(merged([{Q: low(pair)} for pair in made], "decouple+ties"), wanted, 1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 2), (8, 8, 8, 8)])
def test_orthogonalize(gamma: float, ranks: Any) -> None:
    made, overlaps = pairs(15, 20, ranks), []
    downs = [down for _, down in made]
    for steps in (0, 1, 5, 20):
        got, wanted = orthogonalized(downs, steps, gamma), references.orthogonalized(downs, steps, gamma)
        within = 1e-6 if steps == 20 else 1e-9  # where no step helps any more, rounding chooses them
        assert all(close(mine, other, within) for mine, other in zip(got, wanted, strict=True))
        overlaps.append(overlap(got))
    assert overlaps == sorted(overlaps, reverse=True) and overlaps[3] < 0.9 * overlaps[0]
    even = [references.balanced(*pair) for pair in made]
    ups, downs = ([x.T if i == 0 else x for x in side] for i, side in enumerate(zip(*even, strict=True)))
    turned = zip(*(references.orthogonalized(side, 5, gamma) for side in (ups, downs)), strict=True)
    got = merged([{Q: low(pair)} for pair in made], "orthogonalize", steps=5, gamma=gamma)
    assert close(got, sum((up.T @ down).flatten() for up, down in turned), 1e-9)


@pytest.mark.parametrize("method", ["do", "decouple+linear", "orthogonalize", "opcm"])
def test_no_matrix_is_built_of_factors(method: str) -> None:
    """As floats it would take 240 GB."""
    made = [low((up.float(), down.float())) for up, down in pairs(200_000, 300_000, (2, 1, 2))]
    got = merging.merge_deltas([{Q: each} for each in made], method=method)[Q]
    assert isinstance(got, LowRank) and (got.rank, got.shape) == (5, (200_000, 300_000))
    assert got.up.isfinite().all() and got.down.any()
