"""Whole-model reductions against flat ones: exact, whatever the tiles, their order and the threads."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.maths import order_statistics, reductions
from merging.maths.order_statistics import Rank, floats, has_nan, keys
from merging.maths.radix_selection import OrderStatistics
from merging.maths.reductions import Accumulator, Reduction, State, Sum

INFINITY = float("inf")
TINY = 2.0**-149
SPECIAL = [0.0, -0.0, 1.0, -1.0, TINY, -TINY, 1e-39, -1e-39, 3.4028234663852886e38, -3.4028234663852886e38]
FLOATS = st.sampled_from(SPECIAL) | st.floats(width=32, allow_nan=False)
SHARES = st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.7, 0.99, 1.0]) | st.floats(0, 1)
RANKS = st.builds(Rank, st.sampled_from(["share", "upper", "largest"]), SHARES)


def reduction(kind: Reduction, tiles: Sequence[Tensor], workers: int = 1, passes: list[int] | None = None) -> Tensor:
    """The protocol of the module, with tiles dealt to the workers in turn, and everything copied on the way."""
    state = kind.start()
    for sweep in itertools.count(1):
        forks = [state.fork() for _ in range(workers)]
        for number, tile in enumerate(tiles):
            forks[number % workers].add(tile, number)
        for number, fork in enumerate(forks):
            state.merge(pickle.loads(pickle.dumps(fork)) if number else restored(fork))
        state = restored(state)
        if not state.next():
            if passes is not None:
                passes.append(sweep)
            return state.result()
    raise AssertionError("unreachable")


def restored(accumulator: Accumulator) -> Accumulator:
    """A new accumulator that takes over the state of another one, as JSON has it."""
    state, copy = accumulator.state(), accumulator.fork()
    assert state is not None
    copy.restore(State(json.loads(json.dumps(state.plain)), state.tensors))
    return copy


@st.composite
def tilings(draw: st.DrawFn, elements: st.SearchStrategy[float] = FLOATS) -> tuple[Tensor, list[Tensor]]:
    """Rows of up to three models, and their columns cut into tiles (empty ones too) in some order."""
    models = draw(st.integers(1, 3))
    row = st.lists(elements, min_size=1, max_size=40)
    first = draw(row)
    rows = [first, *(draw(st.lists(elements, min_size=len(first), max_size=len(first))) for _ in range(models - 1))]
    whole = torch.tensor(rows, dtype=torch.float32)
    cuts = sorted(draw(st.lists(st.integers(0, len(first)), max_size=5)))
    edges = list(itertools.pairwise([0, *cuts, len(first)]))
    return whole, [whole[:, a:b] for a, b in draw(st.permutations(edges))]


def index(rank: Rank, count: int) -> int:
    """The definitions, once more."""
    q = rank.q
    place = {"share": int(count * q), "upper": int(count * (1 - q) - 1), "largest": count - max(1, int(q * count))}
    return min(max(place[rank.kind], 0), count - 1)


@settings(deadline=None, max_examples=150)
@given(tilings(), st.lists(RANKS, min_size=1, max_size=4), st.integers(1, 3))
def test_ranks_are_those_of_a_flat_sort(tiling, ranks, workers):
    whole, tiles = tiling
    ordered = torch.sort(whole + 0.0, dim=1).values
    wanted = ordered[:, [index(rank, whole.shape[1]) for rank in ranks]].double()
    found = reduction(OrderStatistics(tuple(ranks)), tiles, workers)
    assert torch.equal(found, wanted)
    assert not (found.signbit() & (found == 0)).any()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=30), RANKS)
def test_ranks_of_doubles(values, rank):
    whole = torch.tensor([values], dtype=torch.float64)
    passes: list[int] = []
    found = reduction(OrderStatistics((rank,), torch.float64), [whole], passes=passes)
    assert torch.equal(found[0], torch.sort(whole + 0.0).values[0, [index(rank, len(values))]])
    assert passes == [1]  # so few values are listed


def test_ranks_of_many_doubles_take_up_to_four_sweeps():
    whole = torch.randn(2, 300_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole[1] = 1 + (whole[1] * 2**-30)  # all in one bin of 16 bits
    kind = OrderStatistics((Rank.share(0.3), Rank.upper(0)), torch.float64)
    passes: list[int] = []
    wanted = whole.sort(1).values[:, [90_000, 299_999]]
    assert torch.equal(reduction(kind, whole.split(77_777, 1), workers=2, passes=passes), wanted)
    assert passes[0] <= kind.sweeps == 4


def test_ranks_of_a_large_tile_with_many_duplicates():
    torch.manual_seed(0)
    whole = torch.stack([torch.randn(200_001), torch.randn(200_001).bfloat16().float(), torch.zeros(200_001)])
    ranks = (Rank.share(0.01), Rank.upper(0.01), Rank.largest(0.2), Rank.share(0), Rank.upper(0), Rank.share(0.0101))
    wanted = torch.sort(whole, dim=1).values[:, [2000, 197_999, 160_001, 0, 200_000, 2020]].double()
    passes: list[int] = []
    assert torch.equal(reduction(OrderStatistics(ranks), [whole], passes=passes), wanted)
    assert torch.equal(reduction(OrderStatistics(ranks), whole.split(997, 1), workers=3), wanted)
    assert passes == [2] == [OrderStatistics(ranks).sweeps]


def test_ranks_of_infinities_and_subnormals():
    whole = torch.tensor([[INFINITY, -INFINITY, TINY, -TINY, 0.0, -0.0, INFINITY]])
    ranks = tuple(Rank.share(place / 7) for place in range(7))
    found = reduction(OrderStatistics(ranks), [whole])[0].tolist()
    assert found == [-INFINITY, -TINY, 0.0, 0.0, TINY, INFINITY, INFINITY]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    whole = torch.randn(2, 101, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(
        reduction(OrderStatistics((Rank.share(0.5),)), [whole])[:, 0], whole.double().sort().values[:, 50]
    )


def test_the_ranks_of_the_papers():
    assert Rank.share(0.95).index(100) == 95
    assert Rank.share(1 - 0.05).index(113_448_705) == 107_776_269  # PCB: the product is rounded as its code does
    assert (Rank.share(0.01).index(1000), Rank.upper(0.01).index(1000)) == (10, 989)
    assert Rank.largest(0.2).index(1001) == 801  # the 200th largest
    assert [Rank.largest(q).index(10) for q in (0.0, 0.05, 0.1, 1.0)] == [9, 9, 9, 0]
    assert [Rank.share(1.0).index(10), Rank.upper(1.0).index(10)] == [9, 0]
    with pytest.raises(ValueError, match=r"between 0 and 1, and 20 was given"):
        Rank.largest(20)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF])
def test_nan_has_no_rank(bits):
    bad = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    assert bad.isnan()
    state = OrderStatistics((Rank.share(0.5),)).start()
    state.add(torch.tensor([[1.0, INFINITY, -INFINITY]]), "fine")
    with pytest.raises(ValueError, match=r"model\.norm holds NaN"):
        state.add(torch.cat([torch.ones(1, 2), bad], 1), "model.norm")


def test_wider_values_and_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"head: torch\.float64 values are wider than"):
        OrderStatistics((Rank.share(0.5),)).start().add(torch.zeros(1, 2, dtype=torch.float64), "head")
    with pytest.raises(ValueError, match=r"not of torch\.int32"):
        OrderStatistics((Rank.share(0.5),), torch.int32)


@pytest.mark.parametrize("change", [lambda whole: whole * 2, lambda whole: whole[:, 1:]])
def test_values_that_change_between_sweeps_are_noticed(change):
    whole = torch.randn(1, 300_000, generator=torch.Generator().manual_seed(0))
    state = OrderStatistics((Rank.share(0.7),)).start()
    state.add(whole, "a")
    assert state.next()
    state.add(change(whole), "a")
    with pytest.raises(ValueError, match="changed between two sweeps"):
        state.next()


SHIFTS = {"representative": slice(None, None, 97), "of low values": slice(0, 900), "of one value": slice(3, 4)}


@pytest.mark.parametrize("sampled", SHIFTS)
@pytest.mark.parametrize("kind", [{}, {"magnitudes": True}, {"positive": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_changes_no_rank(sampled, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 300_000, generator=generator, dtype=dtype)
    whole[0] = whole[0].sort().values
    whole[1] = torch.randn(300_000, generator=generator).bfloat16().relu()  # many equal values
    ranks = (Rank.share(0), Rank.upper(0), Rank.largest(0.2), Rank.share(0.5), Rank.share(0.999), *Rank.band(0.9, 0.01))
    reduced = OrderStatistics(ranks, dtype, **kind)
    state = reduced.start()
    assert state.begin_sample()
    state.add(whole[:, SHIFTS[sampled]], "sample")
    assert state.next()
    sweeps = 1
    for tile in whole.split(70_000, 1):
        state.add(tile, "tile")
    while state.next():
        sweeps += 1
        for tile in whole.split(70_000, 1):
            state.add(tile, "tile")
    assert torch.equal(state.result(), reduction(reduced, [whole]))
    assert sweeps <= 1 + reduced.sweeps


def test_a_sample_saves_a_sweep():
    whole = torch.randn(2, 300_000, generator=torch.Generator().manual_seed(0))
    state = OrderStatistics((Rank.largest(0.2), Rank.share(0.01)), magnitudes=True).start()
    assert state.begin_sample()
    state.add(whole[:, ::31], "sample")
    assert state.next()
    state.add(whole, "all")
    assert not state.next()
    assert torch.equal(state.result(), whole.abs().sort(1).values[:, [240_000, 3_000]].double())


def test_only_positive_values_are_ranked():
    whole = torch.tensor([[-3.0, 0.0, 2.0, -0.0, 1.0, 5.0], [0.0, -1.0, 0.0, 0.0, 0.0, 0.0]])
    found = reduction(OrderStatistics((Rank.share(0), Rank.largest(0.34), Rank.upper(0)), positive=True), [whole])
    assert found[0].tolist() == [1.0, 5.0, 5.0]
    assert found[1].isnan().all()


def test_a_sample_may_be_empty():
    state = OrderStatistics((Rank.share(0.5),)).start()
    assert state.begin_sample()
    assert state.next()
    state.add(torch.tensor([[3.0, 1.0, 2.0]]), "a")
    assert not state.next()
    assert state.result().tolist() == [[2.0]]
    assert not Sum().start().begin_sample()


def test_only_states_of_one_sweep_are_merged():
    state = OrderStatistics((Rank.share(0.5),)).start()
    early = state.fork()
    state.add(torch.ones(1, 3), "a")
    state.next()
    with pytest.raises(ValueError, match="same sweep"):
        state.merge(early)


@settings(deadline=None, max_examples=100)
@given(tilings(FLOATS.filter(math.isfinite)), st.integers(1, 3))
def test_sums_are_exact_and_rounded_once(tiling, workers):
    whole, tiles = tiling
    singles = [tile[:, [i]] for tile in tiles for i in range(tile.shape[1])]
    wanted = [float(sum(map(Fraction, row), Fraction(0))) for row in whole.tolist()]
    assert reduction(Sum(), singles, workers).tolist() == wanted
    assert reduction(Sum(), singles[::-1]).tolist() == wanted
    assert reduction(Sum(), tiles, workers).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e25)


def test_sums_depend_on_neither_order_nor_workers():
    torch.manual_seed(0)
    tiles = [torch.randn(2, 3, 7) * 10.0 ** (number % 30) for number in range(50)]
    one = reduction(Sum(), tiles)
    assert reduction(Sum(), tiles[::-1], workers=3).tolist() == one.tolist()
    flat = torch.cat([tile.flatten(1) for tile in tiles], 1)
    assert one.dtype == torch.float64
    torch.testing.assert_close(one, flat.double().sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("models", [1, 2])
def test_sums_of_a_large_tile_do_not_depend_on_torch_threads(models):
    whole = torch.randn(models, 300_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(reduction(Sum(), [whole]).tolist())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx([math.fsum(row) for row in whole.tolist()], rel=1e-11)


def test_sums_do_not_depend_on_the_layout_of_a_tile():
    whole = torch.randn(2, 300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = reduction(Sum(), [whole]).tolist()
    assert reduction(Sum(), [whole.transpose(1, 2).contiguous().transpose(1, 2)]).tolist() == wanted
    assert reduction(Sum(), [whole.flatten(1).T.contiguous().T]).tolist() == wanted


def test_small_values_are_not_lost_beside_large_ones():
    tiles = [torch.tensor([[value]]) for value in (1e30, 1.0, -1e30, TINY)]
    assert reduction(Sum(), tiles).tolist() == [1.0]
    assert reduction(Sum(), [*tiles, torch.tensor([[-1.0]])]).tolist() == [TINY]


@pytest.mark.parametrize("bad", [INFINITY, -INFINITY, math.nan])
def test_what_has_no_sum_is_refused(bad):
    with pytest.raises(ValueError, match="lm_head holds infinities or NaN"):
        Sum().start().add(torch.tensor([[1.0, 2.0], [1.0, bad]]), "lm_head")


@pytest.mark.parametrize("kind", [Sum(), OrderStatistics((Rank.share(0.5),))])
def test_the_number_of_models_does_not_change(kind):
    state = kind.start()
    state.add(torch.ones(2, 3), "a")
    with pytest.raises(ValueError, match="of 3 models, where there were 2"):
        state.add(torch.ones(3, 3), "b")
    other = kind.start()
    other.add(torch.ones(4, 0), "c")
    with pytest.raises(ValueError, match="of 4 models, where there were 2"):
        state.merge(other)


def test_empty_folds():
    rank = OrderStatistics((Rank.share(0.5), Rank.share(0.1)))
    assert reduction(Sum(), []).shape == (0,)
    assert reduction(Sum(), [torch.ones(3, 0, 4)]).tolist() == [0.0, 0.0, 0.0]
    assert reduction(rank, []).shape == (0, 2)
    assert reduction(rank, [torch.ones(3, 0)]).isnan().tolist() == [[True, True]] * 3
    assert reduction(rank, [torch.ones(3, 0), torch.ones(3)]).tolist() == [[1.0, 1.0]] * 3


def test_gradients_stay_outside():
    whole = torch.ones(2, 3, requires_grad=True)
    assert not reduction(Sum(), [whole]).requires_grad
    assert not reduction(OrderStatistics((Rank.share(0.5),)), [whole]).requires_grad


def test_states_can_be_fed_by_real_threads():
    torch.manual_seed(0)
    tiles = torch.randn(2, 100_000).split(1 << 13, 1)
    kind = OrderStatistics((Rank.share(0.25), Rank.largest(0.25)))
    state = kind.start()
    again = True

    def feed(fork: Accumulator, own: Sequence[Tensor]) -> None:
        for tile in own:
            fork.add(tile, "tile")

    with ThreadPoolExecutor(3) as pool:
        while again:
            forks = [state.fork() for _ in range(3)]
            list(pool.map(feed, forks, [tiles[start::3] for start in range(3)]))
            for each in forks:
                state.merge(each)
            again = state.next()
    assert torch.equal(state.result(), reduction(kind, tiles))


def test_folds_are_values():
    assert Sum() == Sum()
    assert hash(OrderStatistics((Rank.share(0.5),))) == hash(OrderStatistics((Rank.share(0.5),)))
    assert OrderStatistics((Rank.share(0.5),)) != OrderStatistics((Rank.share(0.4),))


@settings(deadline=None)
@given(st.lists(FLOATS, min_size=1), st.sampled_from([torch.float32, torch.float64]))
def test_keys_sort_as_floats_do(values, dtype):
    whole = torch.tensor(values, dtype=dtype)
    numbers = keys(whole)
    assert torch.equal(floats(numbers), whole)
    assert torch.equal(numbers[:, None] < numbers, whole[:, None] < whole)
    assert not has_nan(numbers)
    assert has_nan(keys(torch.cat([whole, torch.tensor([math.nan], dtype=dtype)])))


def test_public_names():
    for module in (reductions, order_statistics):
        assert all(hasattr(module, name) for name in module.__all__)
