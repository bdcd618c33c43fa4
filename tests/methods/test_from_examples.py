"""Methods that weigh changes by statistics of examples: against references, and the laws that hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.errors import OptionError
from merging.maths.delta import Dense, LowRank, Stack
from merging.maths.layer_statistics import InputGram, solve_right, sum_grams
from merging.maths.site import Site
from merging.methods import chain
from support import references
from support.example_statistics import GivenStatistics, exact_gram

OUT, IN, TOKENS = 7, 9, 30
SITE = Site("layers.0.q.weight", (OUT, IN))
MATRICES: list[Any] = [("regmean", {}), ("esm", {}), ("esm", {"polarize": 2.0, "power": 0.0})]
"""Methods of matrices, with parameters."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(models: int, tokens: int = TOKENS) -> list[Tensor]:
    """Inputs with a few large directions, as real ones have."""
    return [drawn(tokens, IN, seed=i) @ torch.diag(torch.logspace(0, -2, IN)).double() for i in range(models)]


def merge(method: str, stack: Stack, statistics: Sequence[GivenStatistics], site: Site = SITE, **options: Any) -> Any:
    return chain(method, options).merge(stack.with_statistics(statistics), site, {})


def low(models: int = 3, rank: int = 2) -> list[LowRank]:
    return [LowRank(drawn(OUT, rank, seed=i), drawn(rank, IN, seed=9 + i), (OUT, IN)) for i in range(models)]


@pytest.mark.parametrize("keep", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [2, TOKENS], ids=["few", "many"])
def test_regmean_is_the_reference(keep: float, tokens: int) -> None:
    """Few inputs, whose directions are put side by side, and many, whose matrix is solved in full."""
    tau, weights = drawn(3, OUT, IN), (1.0, 0.5, 2.0)
    given = [GivenStatistics(exact_gram(x)) for x in inputs(3, tokens)]
    got = merge("regmean", Stack.of(tau), given, off_diagonal=keep, weights=weights, scale=0.7).dense()
    assert torch.allclose(got, 0.7 * references.regmean(tau, inputs(3, tokens), keep, weights), atol=1e-6)


@pytest.mark.parametrize("polarize", [0.0, 2.0])
@pytest.mark.parametrize("tokens", [2, TOKENS], ids=["few", "many"])
def test_esm_is_the_reference(polarize: float, tokens: int) -> None:
    """Few inputs shift the outputs in as few directions, fewer than a model's share of three."""
    tau, x = drawn(3, OUT, IN), inputs(3, tokens)
    given = [GivenStatistics(exact_gram(each)) for each in x]
    got = merge("esm", Stack.of(tau), given, polarize=polarize, power=0.3, scale=0.7).dense()
    assert torch.allclose(got, 0.7 * references.esm(tau, x, 0.3, polarize), atol=1e-8)


def test_esm_leaves_models_without_weight_out() -> None:
    tau, given = drawn(3, OUT, IN), [GivenStatistics(exact_gram(x)) for x in inputs(3)]
    got = merge("esm", Stack.of(tau), given, weights=(1.0, 0.0, 2.0), polarize=1.0).dense()
    weighted = tau * torch.tensor([1.0, 0.0, 2.0])[:, None, None]
    assert torch.allclose(got, references.esm(weighted[::2], inputs(3)[::2], polarize=1.0), atol=1e-8)


def test_laws_of_esm() -> None:
    """The order does not matter, scaled changes scale, and changes of zero give zero."""
    tau, given = drawn(3, OUT, IN), [GivenStatistics(exact_gram(x)) for x in inputs(3)]
    for polarize in (0.0, 2.0):
        merged = merge("esm", Stack.of(tau), given, polarize=polarize).dense()
        turned = merge("esm", Stack.of(tau.flip(0)), given[::-1], polarize=polarize).dense()
        assert torch.allclose(turned, merged, atol=1e-8)
        scaled = merge("esm", Stack.of(tau * -1e-3), given, polarize=polarize).dense()
        assert torch.allclose(scaled, merged * -1e-3, atol=1e-11)
        assert not merge("esm", Stack.of(tau * 0), given, polarize=polarize).dense().any()
        nothing = [LowRank(each.up * 0, each.down, (OUT, IN)) for each in low()]
        assert not merge("esm", Stack(nothing), given, polarize=polarize).dense().any()
    assert torch.linalg.svdvals(merge("esm", Stack.of(tau[:1]), given[:1], power=0.0).dense()).std() < 1e-8


def test_regmean_makes_the_least_error_on_the_inputs() -> None:
    tau, x = drawn(3, OUT, IN), inputs(3)
    got = merge("regmean", Stack.of(tau), [GivenStatistics(exact_gram(each)) for each in x], off_diagonal=1.0).dense()

    def error(merged: Tensor) -> float:
        return float(sum((each @ (merged - change).T).square().sum() for each, change in zip(x, tau, strict=True)))

    assert all(error(got) < error(got + 0.01 * drawn(OUT, IN, seed=seed)) for seed in range(20))
    assert error(got) < 0.9 * error(tau.mean(0))


@pytest.mark.parametrize(("method", "parameters"), MATRICES, ids=str)
def test_factors_are_merged_as_full_changes(method: str, parameters: dict[str, float]) -> None:
    given = [GivenStatistics(exact_gram(x)) for x in inputs(3)]
    got = merge(method, Stack(low()), given, scale=0.7, **parameters)
    assert isinstance(got, LowRank)
    assert got.rank == 6
    wanted = merge(method, Stack([Dense(each.dense()) for each in low()]), given, scale=0.7, **parameters)
    assert torch.allclose(got.dense(), wanted.dense(), atol=1e-8)


@pytest.mark.parametrize(("method", "parameters"), MATRICES, ids=str)
def test_transposed_weights(method: str, parameters: dict[str, float]) -> None:
    """GPT-2's weights are stored as inputs by outputs; factors of them state it."""
    given, site = [GivenStatistics(exact_gram(x)) for x in inputs(3)], Site("h.0.c_attn.weight", (IN, OUT), axis=0)
    tau = drawn(3, OUT, IN)
    wanted = merge(method, Stack.of(tau), given, **parameters).dense()
    got = merge(method, Stack.of(tau.mT.contiguous()), given, site, **parameters)
    assert torch.allclose(got.dense(), wanted.T, atol=1e-10)
    turned = [LowRank(each.up, each.down, (IN, OUT), transposed=True) for each in low()]
    plain = merge(method, Stack(low()), given, **parameters).dense()
    assert torch.allclose(merge(method, Stack(turned), given, site, **parameters).dense(), plain.T, atol=1e-10)


def test_an_input_that_no_example_has_takes_the_mean() -> None:
    x = inputs(3)
    for each in x:
        each[:, 4] = 0
    tau = drawn(3, OUT, IN)
    got = merge("regmean", Stack.of(tau), [GivenStatistics(exact_gram(each)) for each in x]).dense()
    assert torch.allclose(got[:, 4], tau[:, :, 4].mean(0), atol=1e-6)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_laws(method: str) -> None:
    """One model is itself; the order does not matter; scaled changes scale; equal statistics give the mean."""
    tau = drawn(3, OUT, IN)
    given = [GivenStatistics(exact_gram(x), drawn(OUT, IN, seed=i).square().float()) for i, x in enumerate(inputs(3))]
    merged = merge(method, Stack.of(tau), given).dense()
    assert torch.allclose(merge(method, Stack.of(tau[:1]), given[:1]).dense(), tau[0], atol=1e-5)
    assert torch.allclose(merge(method, Stack.of(tau.flip(0)), given[::-1]).dense(), merged, atol=1e-8)
    assert torch.allclose(merge(method, Stack.of(tau * -3), given).dense(), merged * -3, atol=1e-8)
    assert torch.allclose(merge(method, Stack.of(tau), [given[0]] * 3).dense(), tau.mean(0), atol=1e-5)
    half = merge(method, Stack.of(tau), given, weights=(1.0, 1.0, 0.0)).dense()
    assert torch.allclose(half, merge(method, Stack.of(tau[:2]), given[:2]).dense(), atol=2e-5)


def test_fisher_is_the_reference() -> None:
    tau = drawn(3, OUT, IN)
    importance = torch.stack([drawn(OUT, IN, seed=i).square().float() for i in range(3)])
    given = [GivenStatistics(fisher=each) for each in importance]
    wanted = references.fisher(tau.flatten(1), importance.flatten(1)).view(OUT, IN)
    assert torch.allclose(merge("fisher", Stack.of(tau), given).dense(), wanted, atol=1e-4)
    block = Site("layers.0.q.weight", (2, IN), start=3 * IN)
    part = merge("fisher", Stack.of(tau[:, 3:5]), given, block).dense()
    assert torch.allclose(part, wanted[3:5], atol=1e-4)


def test_tensors_without_statistics_take_the_mean() -> None:
    tau, given = drawn(2, OUT, IN), [GivenStatistics(exact_gram(inputs(1)[0])), GivenStatistics()]
    for method in ("regmean", "esm", "fisher"):
        assert torch.allclose(merge(method, Stack.of(tau), given).dense(), tau.mean(0))
    vector = Site("norm.weight", (IN,), kind="vector")
    full = [GivenStatistics(exact_gram(x)) for x in inputs(2)]
    assert torch.allclose(merge("regmean", Stack.of(tau[:, 0]), full, vector).dense(), tau[:, 0].mean(0))


def test_wrappers_pass_statistics_on() -> None:
    given = [GivenStatistics(exact_gram(x)) for x in inputs(3)]
    for method in ("regmean", "esm"):
        assert merge(f"decouple+{method}", Stack(low()), given).dense().isfinite().all()
        assert merge(f"dare+{method}", Stack.of(drawn(3, OUT, IN)), given, drop=0.0).dense().isfinite().all()


def test_refused() -> None:
    with pytest.raises(OptionError, match="regmean needs statistics of examples"):
        chain("regmean").merge(Stack.of(drawn(2, OUT, IN)), SITE, {})
    with pytest.raises(OptionError, match="knots expresses changes in a shared basis: use regmean without knots"):
        chain("knots+regmean").check(2)
    with pytest.raises(OptionError, match="weights of fisher are all 0"):
        chain("fisher", {"weights": 0.0}).check(2)
    with pytest.raises(OptionError, match=r"regmean\.weights"):
        chain("regmean", {"weights": (1.0, -1.0)})


@pytest.mark.parametrize("count", [3, 40], ids=["by directions", "in full"])
def test_a_gram_matrix_is_solved_either_way(count: int) -> None:
    gram = sum_grams([InputGram(drawn(IN, count), drawn(IN).square() + 0.1), InputGram(drawn(IN, 2), drawn(IN) ** 2)])
    rows = drawn(4, IN)
    assert torch.allclose(gram.apply(rows), rows @ gram.dense())
    assert torch.allclose(solve_right(rows, gram) @ gram.dense(), rows, atol=1e-8)
    root = gram.root(rows)
    assert torch.allclose(root @ root.T, rows @ gram.dense() @ rows.T)
    shrunk = gram.shrink(0.9, 0.5).dense()
    wanted = 0.9 * gram.dense() + 0.1 * torch.diag(gram.dense().diag()) + 0.5 * torch.eye(IN)
    assert torch.allclose(shrunk, wanted)
