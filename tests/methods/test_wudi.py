"""WUDI: the closed form is the minimum of the loss, and descent comes close to it."""

from __future__ import annotations

import torch

import merging
from merging.methods.wudi import interference, minimum
from support import references
from support.changes import F32, F64, PLACES, K, Q, changes, close, dense, merged, written
from support.factors import low, pairs
from support.on_models import MATRICES, side_by_side


def test_wudi_closed_is_the_minimum() -> None:
    models = changes(3, 1, F64, {Q: (12, 20)})
    tau = side_by_side(models, Q)
    best = references.wudi_loss(merged(models, "wudi").view(12, 20), tau)
    assert best < 0.5 * references.wudi_loss(tau.sum(0), tau)
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = 1e-3 * torch.randn(12, 20, generator=random, dtype=F64) * tau.std()
        assert references.wudi_loss(merged(models, "wudi").view(12, 20) + step, tau) > best


def test_wudi_by_adam() -> None:
    """The loss falls from that of the sum, further with more steps; scaled changes scale the result."""
    models = changes(3, 1, F32, PLACES)
    sums = {name: side_by_side(models, name).sum(0) for name in models[0]}
    deltas, losses = dense(models), []
    for steps in (1, 20, 150):
        got = merging.merge_deltas(deltas, method="wudi", mode="adam", steps=steps)
        losses.append([references.wudi_loss(got[name].dense(), side_by_side(models, name)) for name in MATRICES])
        assert close(got["layers.0.bias"].dense(), side_by_side(models, "layers.0.bias").mean(0))
    start = [references.wudi_loss(sums[name], side_by_side(models, name)) for name in MATRICES]
    best = [
        references.wudi_loss(references.wudi(side_by_side(models, name)), side_by_side(models, name))
        for name in MATRICES
    ]
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


def test_minima_by_cholesky_factors_and_by_eigenvalues() -> None:
    """Of full rank, and of a lower one, where eigenvalues are left out."""
    random = torch.Generator().manual_seed(0)
    changes = [torch.randn(90, 80, generator=random, dtype=F64) for _ in range(2)]
    for each in (changes, [change[:, :20] @ change[:20] for change in changes]):
        weights, target = interference(each)
        wanted = target @ torch.linalg.pinv(weights, rtol=1e-6, hermitian=True)
        torch.testing.assert_close(minimum(weights, target), wanted, rtol=1e-9, atol=1e-9)
