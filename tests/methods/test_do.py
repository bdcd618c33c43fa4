"""DO-Merging and its halves, decouple and orthogonalize, against their naive references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merging
from merging.maths.delta import Dense, LowRank, Stack
from merging.maths.layers import Stacks
from merging.maths.site import site_of
from merging.methods import chain
from merging.methods.contract.wrapper import unwrap_outer
from merging.methods.orthogonalize import orthogonalize_factors, overlap
from support import references
from support.changes import EXPERTS, F64, PLACES, K, Q, changes, close, merged
from support.factors import growing_pairs, low


@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("ranks", [(2,), (2, 2), (1, 3, 2), (6, 6)])
def test_do(steps: int, ranks: Any) -> None:
    made = growing_pairs(9, 12, ranks)
    made[0][1][:, 3] = 0
    for pair in made:
        pair[1][:, 5] = 0  # columns without change, of one adapter and of all
    adapters: Any = [{Q: low(p), K: low(p, transposed=True), "c.weight": low(p, shape=(9, 3, 2, 2))} for p in made]
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
    made = growing_pairs(9, 12, (2, 3))
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
    made, overlaps = growing_pairs(15, 20, ranks), []
    downs = [down for _, down in made]
    for steps in (0, 1, 5, 20):
        got, wanted = orthogonalize_factors(downs, steps, gamma), references.orthogonalized(downs, steps, gamma)
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
    made = [low((up.float(), down.float())) for up, down in growing_pairs(200_000, 300_000, (2, 1, 2))]
    got = merging.merge_deltas([{Q: each} for each in made], method=method)[Q]
    assert isinstance(got, LowRank) and (got.rank, got.shape) == (5, (200_000, 300_000))
    assert got.up.isfinite().all() and got.down.any()
