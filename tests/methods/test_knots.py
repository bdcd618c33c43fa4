"""KnOTS and Core Space: what the method inside is given, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merging
from merging.maths.delta import Stack
from merging.maths.layers import Stacks
from merging.maths.site import site_of
from merging.methods import chain
from merging.methods.contract.wrapper import unwrap_outer
from support import references
from support.changes import F64, PLACES, K, Q, changes, close, dense, merged, written
from support.factors import low, pairs
from support.on_models import MATRICES, core_ties, knots_ties, on_flat, side_by_side
from support.references import ties


@pytest.mark.parametrize("outer", ["knots", "core"])
def test_what_is_no_matrix_passes(outer: str) -> None:
    models = changes(3, 4, F64, PLACES)
    inside, plain = (knots_ties if outer == "knots" else core_ties), on_flat(ties)
    wanted = {
        name: (inside if name in MATRICES else plain)(side_by_side(models, name)).flatten() for name in sorted(PLACES)
    }
    assert close(merged(models, f"{outer}+ties", scope="tensor"), torch.cat(list(wanted.values())), 1e-9)


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
        *sides, projections = references.core(tau) if method == "core+ties" else references.knots(tau)
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
    parts = references.knots(tau)[1] if align == "outputs" else references.knots(tau.mT)[1].mT
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
