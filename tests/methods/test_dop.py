"""DOP: each step is the minimum of its loss, on matrices of full and of low rank."""

from __future__ import annotations

import pytest
import torch

from merging.methods.dop import compromise
from support.changes import F64, Q, changes, close, merged
from support.references import dop_loss


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_a_step_is_the_minimum_of_its_loss(alpha: float) -> None:
    held, change = (each[Q] for each in changes(2, 1, F64, {Q: (7, 11)}))
    at = compromise(held, change, alpha).requires_grad_()
    (gradient,) = torch.autograd.grad(dop_loss(at, held, change, alpha), at)
    start = held.clone().requires_grad_()
    (before,) = torch.autograd.grad(dop_loss(start, held, change, alpha), start)
    assert float(gradient.norm()) < 1e-10 * float(before.norm())


def test_models_that_act_elsewhere_are_both_kept() -> None:
    u, v = (torch.linalg.qr(each[""])[0] for each in changes(2, 1, F64, {"": (9, 4)}))
    one, two = u[:, :2] @ v[:, :2].T, 0.1 * u[:, 2:] @ v[:, 2:].T
    assert close(merged([{Q: one}, {Q: two}], "dop"), (one + two).flatten(), 1e-9)


@pytest.mark.parametrize(("alpha", "kept"), [(0.0, 1), (1.0, 0)])
def test_the_ends_of_alpha_are_the_models(alpha: float, kept: int) -> None:
    models = changes(2, 1, F64, {Q: (8, 8)})
    assert close(merged(models, "dop", alpha=alpha), models[kept][Q].flatten(), 1e-9)
