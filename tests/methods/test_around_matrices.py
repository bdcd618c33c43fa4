"""SVC, Pico and Compress-then-Merge: wrappers of matrices, on full changes and on factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import merging
from merging.errors import OptionError
from merging.maths.delta import LowRank
from merging.methods import chain
from support import references
from support.changes import F64, PLACES, Q, changes, close, dense, merged
from support.factors import low, pairs
from support.on_models import MATRICES, side_by_side
from support.references import ties


def ties_of(tau: Tensor) -> Tensor:
    return ties(tau.flatten(1)).view(tau.shape[1:])


CASES: Any = {
    "svc": ("svc", {}, lambda tau: references.svc(tau, tau.sum(0))),
    "svc-inputs": (
        "svc+ties",
        {"align": "inputs", "alpha": 0.5, "scope": "tensor"},
        lambda tau: references.svc(tau, ties_of(tau), 0.5, "inputs"),
    ),
    "svc+tsv": ("svc+tsv", {}, lambda tau: references.svc(tau, references.tsv(tau))),
    "pico": ("pico", {}, lambda tau: references.pico(tau, lambda x: x.sum(0))),
    "pico+ties": ("pico+ties", {"norm": 0.7, "scope": "tensor"}, lambda tau: references.pico(tau, ties_of, 0.7)),
    "ctm+ties": ("ctm+ties", {"scope": "tensor", "steps": 5, "tol": 0.0}, None),
}


def compressed_ties(tau: Tensor) -> Tensor:
    u, v, inside = references.ctm(tau, max(1, min(tau.shape[1:]) // len(tau)))
    return u @ ties_of(inside) @ v.T


@pytest.mark.parametrize("name", CASES)
def test_full_changes(name: str) -> None:
    """Matrices as the reference has them; all other tensors as the method inside merges them."""
    method, options, reference = CASES[name]
    models = changes(3, 4, F64, PLACES)
    plain = {"scope": "tensor"} if "ties" in method else {}
    others = merging.merge_deltas(dense(models), method=method.partition("+")[2] or "task_arithmetic", **plain)
    wanted = [
        (reference or compressed_ties)(side_by_side(models, place)) if place in MATRICES else others[place].dense()
        for place in sorted(PLACES)
    ]
    assert close(merged(models, method, **options), torch.cat([each.flatten() for each in wanted]), 1e-9)


@pytest.mark.parametrize("name", ["svc-inputs", "pico+ties"])
def test_factors_around_a_merge_in_full(name: str) -> None:
    method, options, reference = CASES[name]
    made = [(up.double(), down.double()) for up, down in pairs(12, 20, (2, 3, 1), 3)]
    wanted = reference(torch.stack([up @ down for up, down in made]))
    for transposed in (False, True):
        got = merging.merge_deltas([{Q: low(pair, transposed)} for pair in made], method=method, **options)[Q].dense()
        assert close(got, wanted.T if transposed else wanted, 1e-9)
    got = merging.merge_deltas(
        [{"c.weight": low(pair, shape=(12, 5, 2, 2))} for pair in made], method=method, **options
    )
    assert close(got["c.weight"].dense().flatten(1), wanted, 1e-9)


def test_svc_divides_what_models_share_by_their_number() -> None:
    """Two models that share one direction, and have one each: the sum counts the shared one twice."""
    u, v = (torch.linalg.qr(each[""])[0] for each in changes(2, 1, F64, {"": (9, 3)}))
    one = 3 * u[:, :1] @ v[:, :1].T + 2 * u[:, 1:2] @ v[:, 1:2].T
    two = 3 * u[:, :1] @ v[:, :1].T + 1 * u[:, 2:] @ v[:, 2:].T
    got = u.T @ merged([{Q: one}, {Q: two}], "svc", alpha=1.0).view(9, 9) @ v
    assert torch.allclose(got, torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=F64)), atol=1e-12)


def test_svc_undoes_a_scale() -> None:
    models = changes(3, 1, F64, {Q: (9, 12)})
    assert close(merged(models, "svc", scale=0.4, alpha=1e-9), merged(models, "svc", alpha=1e-9), 1e-6)


def test_pico_keeps_the_mean_size_and_shrinks_what_is_shared() -> None:
    u, v = (torch.linalg.qr(each[""])[0] for each in changes(2, 1, F64, {"": (9, 5)}))
    one = u[:, :1] @ v[:, :1].T + u[:, 1:2] @ v[:, 1:2].T
    two = u[:, :1] @ v[:, 2:3].T + u[:, 3:4] @ v[:, 3:4].T
    got = merged([{Q: one}, {Q: two}], "pico").view(9, 9)
    assert close(got.norm(), torch.tensor(2.0, dtype=F64).sqrt(), 1e-12)
    sizes = (u.T @ got).norm(dim=1)[:4] / torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=F64).sqrt()
    assert close(sizes[0] / sizes[1], torch.tensor((1 / 1.5) / (1 / 1.25), dtype=F64), 1e-12)  # shares 1/2 and 1/4
    with pytest.raises(OptionError, match=r"task_arithmetic\.scale must be left out under pico"):
        merged([{Q: one}, {Q: two}], "pico", scale=0.5)


@pytest.mark.parametrize("method", ["ctm", "ctm+ties", "ctm+dare+ties", "svc+ctm+ties", "pico+ctm+magmax"])
def test_compressed_merges_have_the_rank_of_the_largest_adapter(method: str) -> None:
    adapters: Any = [{Q: low(pair)} for pair in pairs(20, 31, (2, 4, 3))]
    for most, rank in ((None, 4), (2, 2), (50, 9)):
        got = merging.merge_deltas(adapters, method=method, **({"ctm.max_rank": most} if most else {}))[Q]
        assert isinstance(got, LowRank) and got.rank <= rank
        assert chain(method, {"ctm.max_rank": most} if most else {}).merged_rank([2, 4, 3]) == rank
        assert "dare" in method or "ties" in method or got.rank == rank


def test_compression_to_all_ranks_is_core() -> None:
    adapters: Any = [{Q: low((up.double(), down.double()))} for up, down in pairs(20, 31, (2, 4, 3))]
    assert close(merged(adapters, "ctm", max_rank=9), merged(adapters, "task_arithmetic"), 1e-12)


def test_turns_hold_more_of_the_changes() -> None:
    tau = side_by_side(changes(4, 2, F64, {Q: (30, 24)}), Q)

    def held(steps: int) -> float:
        got = chain("ctm", {"max_rank": 5, "beta": 1.0, "steps": steps, "tol": 0.0})
        left, right = got._bases(list(tau), 5)  # type: ignore[attr-defined]
        return float((left.mT @ tau @ right).square().sum())

    assert held(0) < held(1) < held(5) < float(tau.square().sum())
