"""What recycling computes, against dense float64 references, other people's programs and golden figures."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import spearmanr

from merging.maths.delta import LowRank
from merging.maths.linalg import squared_norm
from merging.recycling.bootstrap import Gap, paired_bootstrap
from merging.recycling.controls import CONTROLS, random_norms, random_spectra, shuffle_modules
from merging.recycling.data import Example, overlaps, read_examples, split
from merging.recycling.fold import fold
from merging.recycling.hooks import find_hook_points
from merging.recycling.mixture import CoefficientLayout, Mixture
from merging.recycling.pool_adapters import BASE, FEW_SHOT, Expert
from merging.recycling.problem import Problem, WeightedAdapters, simple_average
from merging.recycling.seeds import batch
from merging.recycling.selection import gains, gradients, spearman
from merging.recycling.similarity import SIMILARITIES, similarity
from merging.recycling.verdict import Evidence, judge
from support.adapters import QUIRKS, peft, reload
from support.recycling_tasks import World, causal, classifier, encoder, seq2seq, texts

pytestmark = QUIRKS


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return causal(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def problem(llama: World) -> Problem:
    return llama.problem()


@pytest.fixture(scope="module")
def experts(llama: World, problem: Problem) -> list[Expert]:
    return llama.experts(problem)


def _delta(out: int, rank: int, inputs: int, seed: int, transposed: bool = False) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, rank, generator=draw), torch.randn(rank, inputs, generator=draw)
    return LowRank(up, down, (inputs, out) if transposed else (out, inputs), transposed)


def _logits(problem: Problem, experts: list[Expert], coefficients: Any, granularity: Any = "expert") -> torch.Tensor:
    mixture = problem.mixture(experts, granularity, "linear")
    values = coefficients if isinstance(coefficients, torch.Tensor) else mixture.full(coefficients)
    with torch.no_grad(), mixture.at(values):
        return problem.model.answers(problem.learn).logits


# --- the mixture ------------------------------------------------------------------------------------------------------


def test_a_module_gives_the_sum_of_what_its_adapters_give() -> None:
    linear = torch.nn.Linear(12, 9)
    network = torch.nn.ModuleDict({"layer": linear})
    experts = [Expert(f"e{i}", {"layer.weight": _delta(9, 2 + i, 12, i)}) for i in range(3)]
    given = torch.randn(7, 12, generator=torch.Generator().manual_seed(9))
    mixture = Mixture(find_hook_points(network), experts, "expert")
    weights = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad(), mixture.at(weights):
        got = linear(given)
    wanted = linear(given).double()
    for weight, expert in zip(weights, experts, strict=True):
        wanted = wanted + weight.double() * given.double() @ expert.deltas["layer.weight"].dense().double().T
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-5)


def test_the_mixture_says_what_peft_says_of_concatenated_adapters(
    llama: World, problem: Problem, experts: list[Expert]
) -> None:
    """PEFT's ``cat`` is exact."""
    folders = sorted(llama.pool.iterdir())[:3]
    model = peft.PeftModel.from_pretrained(reload(llama.base), folders[0], adapter_name="a0")
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    weights = [0.7, 0.2, 1.1]
    model.add_weighted_adapter([folder.name for folder in folders], weights, "mixed", combination_type="cat")
    model.set_adapter("mixed")
    item = problem.learn[0]
    tokens = torch.tensor([item.tokens + item.answer])
    with torch.no_grad():
        wanted = model.eval()(input_ids=tokens).logits[0, len(item.tokens) - 1 : -1]
    mixture = problem.mixture(experts[:3], "expert", "linear")
    with torch.no_grad(), mixture.at(torch.tensor(weights)):
        got = problem.model.answers([item]).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["linear", "leaky"])
def test_coefficients_of_zero_give_the_base_bit_for_bit(
    problem: Problem, experts: list[Expert], activation: Any
) -> None:
    with torch.no_grad():
        base = problem.model.answers(problem.learn).logits
        mixture = problem.mixture(experts, "module", activation)
        with mixture.at(mixture.full(0.0)):
            assert torch.equal(problem.model.answers(problem.learn).logits, base)
        assert torch.equal(problem.model.answers(problem.learn).logits, base)  # and nothing stays attached


def test_an_adapter_twice_by_mean_is_the_adapter(problem: Problem, experts: list[Expert]) -> None:
    one = WeightedAdapters((experts[0],), torch.ones(1)).scores(problem, problem.valid)
    twice = simple_average([experts[0], experts[0]]).scores(problem, problem.valid)
    torch.testing.assert_close(twice.losses, one.losses, rtol=1e-6, atol=1e-6)


def test_the_order_of_adapters_changes_nothing(problem: Problem, experts: list[Expert]) -> None:
    weights = torch.tensor([0.3, -0.4, 1.0, 0.0, 2.0])
    back = list(reversed(range(5)))
    torch.testing.assert_close(
        _logits(problem, [experts[i] for i in back], weights[back]), _logits(problem, experts, weights),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("granularity", ["expert", "layer", "sublayer", "module", "rank"])
def test_a_coefficient_belongs_to(granularity: Any, problem: Problem, experts: list[Expert]) -> None:
    """Two layers of two modules, one in the attention and one in the MLP; ranks 2, 3, 4, 2, 3."""
    layout = CoefficientLayout([expert.deltas for expert in experts], granularity)
    groups = {"expert": 1, "layer": 2, "sublayer": 4, "module": 4}
    ranks = [expert.rank for expert in experts]
    assert ranks == [2, 3, 4, 2, 3]
    wanted = 4 * sum(ranks) if granularity == "rank" else groups[granularity] * len(experts)
    assert layout.size == wanted
    for name, rows in layout.rows.items():
        assert [int(layout.experts[row]) for row in rows] == [i for i, rank in enumerate(ranks) for _ in range(rank)]
        if granularity in ("module", "rank"):
            assert all(layout.names[row].startswith(name.removesuffix(".weight")) for row in rows)
    if granularity == "sublayer":
        assert {name.split(" ")[1] for name in layout.names} == {"attention", "mlp"}


def test_shares_of_each_group_add_up_to_one(experts: list[Expert]) -> None:
    layout = CoefficientLayout([expert.deltas for expert in experts], "layer")
    values = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    shares = layout.activate(values, "softmax")
    totals = torch.zeros(2).index_add(0, layout.groups, shares)
    torch.testing.assert_close(totals, torch.ones(2))
    torch.testing.assert_close(layout.activate(values, "leaky"), torch.where(values > 0, values, 0.01 * values))


@pytest.mark.parametrize("make", [classifier, encoder, causal, seq2seq])
def test_the_first_gradient_is_the_screen(make: Any, tmp_path: Path) -> None:
    """``<D_i, G>`` of each module, from one backward pass of the base, is what backpropagation gives a coefficient."""
    world = make(tmp_path)
    problem = world.problem(micro_batch=5)
    experts = world.experts(problem)
    mixture = problem.mixture(experts, "module", "linear")
    coefficients = mixture.full(0.0).requires_grad_(True)
    with mixture.at(coefficients):
        loss = problem.model.answers(problem.learn).losses(len(problem.learn)).mean()
    (wanted,) = torch.autograd.grad(loss, coefficients)
    for most in (4 << 30, 1):  # all at once, and one weight at a time
        grads = gradients(problem, most)
        found = [gains(expert, grads) for expert in experts]
        values = zip(wanted, mixture.layout.experts.tolist(), mixture.layout.names, strict=True)
        for value, expert, module in values:
            assert found[expert][f"{module}.weight"] == pytest.approx(float(value), rel=1e-3, abs=1e-6)
    assert not any(weight.requires_grad for weight in problem.model.network.parameters())


def test_the_same_weights_on_deltas() -> None:
    """The row of the specification's golden vectors for weights (.5, -.3, .8): not LoraHub's own sums of factors."""
    a = [[[math.sin(1 + 0.7 * i + 0.3 * r + 0.11 * c * (r + 1)) for c in range(5)] for r in range(2)] for i in range(3)]
    b = [[[math.cos(0.5 + 0.4 * i + 0.23 * p * (q + 1) - 0.2 * q) for q in range(2)] for p in range(6)]
         for i in range(3)]  # fmt: skip
    network = torch.nn.ModuleDict({"layer": torch.nn.Linear(5, 6)})
    experts = [
        Expert(f"e{i}", {"layer.weight": LowRank(torch.tensor(b[i]), torch.tensor(a[i]), (6, 5))}) for i in range(3)
    ]
    mixture = Mixture(find_hook_points(network), experts, "expert")
    merged = mixture.deltas(torch.tensor([0.5, -0.3, 0.8]))["layer.weight"].dense().double()
    figures = [float(merged.norm()), float(merged.sum()), float(merged[0, 0]), float(merged[5, 4])]
    assert figures == pytest.approx([2.455880, 4.406223, 0.735557, -0.051979], abs=2e-6)
    average = mixture.deltas(mixture.full(1 / 3))["layer.weight"].dense().double()
    figures = [float(average.norm()), float(average.sum()), float(average[0, 0]), float(average[5, 4])]
    assert figures == pytest.approx([3.488067, 3.127685, 1.115141, -0.414659], abs=2e-6)


# --- folding ----------------------------------------------------------------------------------------------------------


def test_folding_loses_nothing_at_the_sum_of_ranks_and_says_what_it_loses_below(
    problem: Problem, experts: list[Expert]
) -> None:
    mixture = problem.mixture(experts, "module", "leaky")
    coefficients = torch.randn(mixture.size, generator=torch.Generator().manual_seed(4))
    mixed = WeightedAdapters(tuple(experts), coefficients, granularity="module", activation="leaky")
    values = mixture.layout.activate(coefficients, "leaky")
    dense: dict[str, np.ndarray] = {}
    for value, expert, module in zip(values, mixture.layout.experts.tolist(), mixture.layout.names, strict=True):
        name = f"{module}.weight"
        part = float(value) * experts[expert].deltas[name].dense().double().numpy()
        dense[name] = dense.get(name, 0) + part
    exact = fold(mixed, problem, (), None)
    assert exact.rank == 16  # the next of the ranks that servers take after 2 + 3 + 4 + 2 + 3
    assert exact.kept == 1
    assert dense.keys() == exact.deltas.keys()
    for name, delta in exact.deltas.items():
        np.testing.assert_allclose(delta.dense().double().numpy(), dense[name], atol=1e-5 * np.abs(dense[name]).max())
    cut = fold(mixed, problem, (), 3)
    spectra = {name: np.linalg.svd(matrix, compute_uv=False) ** 2 for name, matrix in dense.items()}
    whole = sum(values.sum() for values in spectra.values())
    assert cut.kept == pytest.approx(sum(values[:3].sum() for values in spectra.values()) / whole, rel=1e-5)
    for name, values in spectra.items():
        assert cut.deltas[name].rank == 3
        assert cut.lost[name] == pytest.approx(values[3:].sum() / values.sum(), rel=1e-4)


def test_the_base_folds_to_nothing(problem: Problem, experts: list[Expert]) -> None:
    names = list(experts[0].deltas)
    folded = fold(WeightedAdapters((), torch.zeros(0)), problem, names, 4)
    assert list(folded.deltas) == names
    assert all(float(squared_norm(delta)) == 0 for delta in folded.deltas.values())


# --- controls ---------------------------------------------------------------------------------------------------------


def _expert(name: str = "some") -> Expert:
    names = {f"layer.{i}.weight": _delta(10, 3, 8, i) for i in range(3)}
    return Expert(name, {**names, "head.weight": _delta(4, 2, 8, 7), "conv.weight": _delta(10, 3, 8, 8, True)})


def _spectrum(delta: LowRank) -> list[float]:
    return np.linalg.svd(delta.dense().double().numpy(), compute_uv=False).tolist()


def test_random_norms_have_the_norms_and_nothing_else() -> None:
    expert = _expert()
    made = random_norms(expert, 3)
    for name, delta in expert.deltas.items():
        other = made.deltas[name]
        assert float(other.dense().norm()) == pytest.approx(float(delta.dense().norm()), rel=1e-5)
        assert other.rank == delta.rank
        cosine = float((other.dense() * delta.dense()).sum()) / float(delta.dense().norm()) ** 2
        assert abs(cosine) < 0.5


def test_random_spectra_have_the_singular_values() -> None:
    expert = _expert()
    made = random_spectra(expert, 3)
    for name, delta in expert.deltas.items():
        assert _spectrum(made.deltas[name]) == pytest.approx(_spectrum(delta), rel=1e-4, abs=1e-4)
        assert not torch.allclose(made.deltas[name].dense(), delta.dense(), atol=0.1)


def test_random_directions_are_uniform() -> None:
    """Of Haar's measure the mean of u u^T is the identity over the dimension; QR's own signs would show in its mean."""
    expert = Expert("e", {"x.weight": _delta(6, 1, 5, 0)})
    ups = torch.stack([random_spectra(expert, seed).deltas["x.weight"].up[:, 0] for seed in range(800)])
    directions = torch.nn.functional.normalize(ups.double(), dim=1)
    assert float(directions.mean(0).abs().max()) < 0.08
    assert float((directions.T @ directions / 800 - torch.eye(6) / 6).abs().max()) < 0.04


def test_shuffled_changes_are_the_same_on_other_modules() -> None:
    expert = _expert()
    made = shuffle_modules(expert, 5)
    layers = [name for name in expert.deltas if name.startswith("layer")]
    before = {id(expert.deltas[name]) for name in layers}
    assert {id(made.deltas[name]) for name in layers} == before
    assert all(made.deltas[name] is not expert.deltas[name] for name in layers)
    for name in ("head.weight", "conv.weight"):  # no other has its shape
        assert _spectrum(made.deltas[name]) == pytest.approx(_spectrum(expert.deltas[name]), rel=1e-4, abs=1e-4)
        assert not torch.equal(made.deltas[name].dense(), expert.deltas[name].dense())
    assert list(made.deltas) == list(expert.deltas)


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_follow_from_seed_and_name(kind: str) -> None:
    control = CONTROLS[kind]

    def values(expert: Expert, seed: int) -> torch.Tensor:
        return torch.cat([delta.dense().flatten() for delta in control.make(expert, seed).deltas.values()])

    assert torch.equal(values(_expert(), 1), values(_expert(), 1))
    assert not torch.equal(values(_expert(), 1), values(_expert(), 2))
    assert not torch.equal(values(_expert(), 1), values(_expert("another"), 1))


# --- likeness ---------------------------------------------------------------------------------------------------------


def _dense_closeness(one: dict[str, LowRank], other: dict[str, LowRank], kind: str) -> float:
    """As the study writes them, on full matrices; what one side lacks is zero."""
    pairs = []
    for name in sorted(one.keys() | other.keys()):
        known = (one.get(name) or other[name]).dense().double()
        pairs.append([d[name].dense().double() if name in d else torch.zeros_like(known) for d in (one, other)])
    if kind == "l2":
        return -math.log(1 + sum(float((a - b).square().sum()) for a, b in pairs))
    if kind == "quasi_fim":
        pairs = [[a.square(), b.square()] for a, b in pairs]
    product = {"clamp": lambda a, b: (a * b).clamp(min=0), "abs": lambda a, b: (a * b).abs()}.get(kind, torch.mul)
    sums = [float(product(a, b).sum()) for a, b in pairs]
    total = sum(max(0.0, value) for value in sums) if kind == "clamp_pm" else sum(sums)
    sizes = [math.sqrt(sum(float(pair[side].square().sum()) for pair in pairs)) for side in (0, 1)]
    ratio = total / (sizes[0] * sizes[1])
    return math.sqrt(ratio) if kind == "quasi_fim" else ratio


@pytest.mark.parametrize("kind", [*SIMILARITIES, "l2"])
def test_closeness_is_that_of_full_matrices(kind: str) -> None:
    one = {"a": _delta(6, 2, 5, 1), "b": _delta(4, 1, 7, 2), "only one": _delta(3, 1, 3, 3)}
    other = {"b": _delta(4, 3, 7, 4), "a": _delta(6, 1, 5, 5), "only other": _delta(2, 1, 3, 6)}
    assert similarity(one, other, kind) == pytest.approx(_dense_closeness(one, other, kind), rel=1e-5)
    assert similarity(one, other, kind) == pytest.approx(similarity(other, one, kind), rel=1e-9)
    if kind != "l2":
        assert similarity(one, one, kind) == pytest.approx(1, rel=1e-6)


def test_rank_correlation_is_scipys() -> None:
    draw = random.Random(1)
    for count in (3, 10, 40):
        one = [float(draw.randint(0, 8)) for _ in range(count)]
        other = [value + draw.randint(0, 8) for value in one]
        assert spearman(one, other) == pytest.approx(float(spearmanr(one, other).statistic), abs=1e-12)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None


# --- what is concluded ------------------------------------------------------------------------------------------------


def test_intervals_are_scipys_up_to_chance() -> None:
    draw = torch.Generator().manual_seed(1)
    mine, other = (torch.rand(200, generator=draw).round().double() for _ in range(2))
    mine = torch.maximum(mine, (torch.rand(200, generator=draw) < 0.2).double())
    found = paired_bootstrap(mine, other, 10_000, 0)
    difference = (mine - other).numpy()
    wanted = scipy_bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    assert found.mean == pytest.approx(difference.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.011)
    assert paired_bootstrap(mine, other, 10_000, 0) == found
    assert paired_bootstrap(mine, mine, 1000, 0) == Gap(0.0, 0.0, 0.0)


UP, EVEN, DOWN = Gap(0.1, 0.05, 0.15), Gap(0.01, -0.02, 0.04), Gap(-0.1, -0.15, -0.05)


@pytest.mark.parametrize("base", [UP, EVEN, DOWN])
@pytest.mark.parametrize("few_shot", [UP, EVEN, DOWN])
@pytest.mark.parametrize("norms", [UP, EVEN, DOWN])
@pytest.mark.parametrize("others", [UP, EVEN])
@pytest.mark.parametrize("tested", [True, False])
def test_transfer_is_said_only_of_what_beats_both(
    base: Gap, few_shot: Gap, norms: Gap, others: Gap, tested: bool
) -> None:
    controls = {name: norms if name == "norms" else others for name in CONTROLS}
    verdict = judge(Evidence(base, few_shot, EVEN, EVEN, controls, tested), "accuracy")
    wanted = tested and base is UP and few_shot is UP and norms is UP and others is UP
    assert verdict.transfer is wanted
    assert verdict.sentence.startswith("Transfer") is wanted
    assert ("ransfer" in verdict.sentence) is wanted
    if tested and base is UP and not wanted:
        assert ("a LoRA trained on the same examples" in verdict.sentence) is (few_shot is not UP)
        assert ("random numbers of the same norms" in verdict.sentence) is (norms is not UP)
    if not tested:
        assert "without test examples" in verdict.sentence


def test_no_verdict_without_every_control() -> None:
    with pytest.raises(ValueError, match="shuffled"):
        judge(Evidence(UP, UP, UP, UP, {"norms": UP, "spectra": UP}), "loss")


def test_what_came_back_instead_is_said() -> None:
    controls = dict.fromkeys(CONTROLS, UP)
    told = judge(Evidence(UP, UP, EVEN, UP, controls, fallback="movie"), "accuracy")
    assert told.transfer
    assert "movie alone came back" in told.sentence
    told = judge(Evidence(UP, EVEN, UP, UP, controls, fallback=FEW_SHOT), "accuracy")
    assert "without any adapter of the pool" in told.sentence and not told.transfer
    assert "the base came back" in judge(Evidence(UP, UP, UP, UP, controls, fallback=BASE), "accuracy").sentence
    assert "best single adapter does as well" in judge(Evidence(UP, UP, EVEN, UP, controls), "accuracy").sentence
    assert "simple average does as well" in judge(Evidence(UP, UP, UP, EVEN, controls), "accuracy").sentence


# --- examples ---------------------------------------------------------------------------------------------------------


def test_leaks_are_counted() -> None:
    some = texts(6, 0)

    def examples(chosen: list[str]) -> tuple[Example, ...]:
        return read_examples([{"text": text, "label": "x"} for text in chosen])

    parts = split(examples(some[:4]), examples(some[3:5]), examples([some[0], some[4], some[5]]), 0)
    assert overlaps(parts) == [
        "1 training examples are also validated on",
        "2 test examples are also tuned or validated on",
    ]
    assert overlaps(split(examples(some[:4]), examples(some[4:5]), examples(some[5:]), 0)) == []


def test_a_fifth_is_kept_for_validation_by_the_seed() -> None:
    given = read_examples([{"text": text, "label": "x"} for text in texts(50, 0)])
    parts = split(given, None, None, 7)
    assert len(parts.valid) == 10
    assert sorted(parts.train + parts.valid, key=lambda each: each.text) == sorted(given, key=lambda each: each.text)
    assert split(given, None, None, 7) == parts
    assert split(given, None, None, 8) != parts


def test_every_example_is_seen_before_any_is_seen_again() -> None:
    seen = [place for step in range(10) for place in batch(step, 3, 10, 0)]
    assert [sorted(seen[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[:10] != seen[10:20]
