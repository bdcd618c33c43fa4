"""What holds of every method: one table, a row a method or chain, and each row says which laws hold for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import merging
from merging.errors import OptionError
from merging.maths.delta import Delta, Dense, LowRank
from merging.methods import METHODS, chain, links
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import load_recipe
from support.laws import TABLE, Row, Tensors, rows
from support.tiny import fine_tune, identical, load, model, save

seeds = st.integers(0, 2**20)


def merged(
    row: Row,
    tuned: list[Tensors],
    base: Tensors,
    parameters: dict[str, Any] | None = None,
    keys: Sequence[str] | None = None,
) -> Tensors:
    """The row's merge of state dicts."""
    options = row.parameters if parameters is None else parameters
    keys = keys[: row.most] if keys else None
    return merging.merge_state_dicts(tuned[: row.most], method=row.chain, base=base, keys=keys, **options)


def close(one: Tensors, other: Tensors, within: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.allclose(value, other[name], rtol=within, atol=within)
        for name, value in one.items()
    )


def parts(seed: int, count: int = 2, **shape: Any) -> tuple[Tensors, list[Tensors]]:
    base = model(seed, **shape)
    return base, [fine_tune(base, seed + i, 0.5) for i in range(count)]


def factors(seed: int, rank: int = 2) -> list[dict[str, Delta]]:
    """Two adapters of three blocks; the second leaves one matrix alone."""
    random = torch.Generator().manual_seed(seed)
    adapters: list[dict[str, Delta]] = [{}, {}]
    for adapter, layer in itertools.product(adapters, range(3)):
        up, down = torch.randn(6, rank, generator=random), torch.randn(rank, 5, generator=random)
        adapter[f"layers.{layer}.q.weight"] = LowRank(up, down, (6, 5))
        up, down = torch.randn(6, rank, generator=random), torch.randn(rank, 5, generator=random)
        adapter[f"layers.{layer}.c.weight"] = LowRank(up * 2, down, (5, 6), transposed=True)
    del adapters[1]["layers.1.q.weight"]
    return adapters


def changes(row: Row, adapters: list[dict[str, Delta]]) -> Tensors:
    """The row's merge of adapters, written out."""
    out = merging.merge_deltas(adapters[: row.most], method=row.chain, transposed=["*.c.weight"], **row.parameters)
    return {name: delta.dense() for name, delta in out.items()}


def test_every_method_has_a_row() -> None:
    """Methods that need statistics of examples have their laws in tests/methods/test_from_examples.py."""
    alone = {name for name in METHODS if not METHODS[name].load().needs_statistics}
    assert {name for row in TABLE for name in row.chain.split("+")} == alone
    assert alone <= {row.chain for row in TABLE}


@rows
def test_rows_tell_the_truth_about_their_methods(row: Row) -> None:
    """What a row leaves out is refused, or does not hold."""
    method = chain(row.chain, row.parameters)
    assert row.needs_base == (method.merge_space == "delta" or method.rescales)
    assert row.on_changes == ((method.merge_space == "delta" or method.factored) and not method.needs_base)
    if not row.on_changes:
        with pytest.raises(OptionError, match="weights, and these are changes"):
            changes(row, factors(0))
    if row.needs_base:
        with pytest.raises(OptionError, match="give base="):
            merging.merge_state_dicts([model(1), model(2)][: row.most], method=row.chain, **row.parameters)


@rows
@given(seed=seeds)
def test_one_model_is_returned(row: Row, seed: int) -> None:
    base, (one,) = parts(seed, 1)
    if row.least > 1:
        with pytest.raises(OptionError, match=r"merges (at least )?2 models, and 1 was given"):
            merged(row, [one], base)
    elif row.alone is None:
        assert not close(merged(row, [one], base, {}), one)
    else:
        assert close(merged(row, [one], base, row.alone), one)


@rows
def test_equal_models_are_returned(row: Row) -> None:
    """By every mean of models; the others tell that they are none."""
    base, (one,) = parts(1, 1)
    assert close(merged(row, [one, one], base), one) == row.idempotent


@rows
@given(seed=seeds)
def test_order_of_models(row: Row, seed: int) -> None:
    """Models that change places with their weights change nothing."""
    base, tuned = parts(seed)
    forward, backward = merged(row, tuned, base, keys="ab"), merged(row, tuned[::-1], base, row.swapped, keys="ba")
    assert close(forward, backward) != row.ordered


@rows
def test_order_of_models_with_the_weights_left_behind(row: Row) -> None:
    """The law above is no accident: weights matter."""
    base, tuned = parts(1)
    same = row.swapped == row.parameters and not row.ordered
    assert close(merged(row, tuned, base), merged(row, tuned[::-1], base)) == same


@rows
@given(seed=seeds, order=st.randoms(use_true_random=False))
def test_order_of_tensors(row: Row, seed: int, order: Any) -> None:
    """Bit for bit."""
    base, tuned = parts(seed)
    names = list(base)
    order.shuffle(names)
    again = merged(row, [{name: each[name] for name in names} for each in tuned], {name: base[name] for name in names})
    assert list(again) == names
    assert identical(again, merged(row, tuned, base))


@rows
@given(seed=seeds)
def test_no_change_stays_none(row: Row, seed: int) -> None:
    """Fine-tunes that are their base merge to it, and zero tensors never to NaN."""
    base = model(seed) | {"zero.weight": torch.zeros(3, 3)}
    assert close(merged(row, [base, base], base), base, 1e-6)


@rows
@given(seed=seeds)
def test_zero_deltas_give_zero(row: Row, seed: int) -> None:
    if not row.on_changes:
        return
    for zero in (lambda d: d.scaled(0.0), LowRank.zero, lambda d: Dense(torch.zeros(d.shape))):
        adapters = [{name: zero(delta) for name, delta in adapter.items()} for adapter in factors(seed)]
        assert all(torch.equal(value, torch.zeros_like(value)) for value in changes(row, adapters).values())


@rows
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_scaled_changes_scale_the_result(row: Row, seed: int, scale: float) -> None:
    if not row.homogeneous:
        return
    adapters = factors(seed)
    scaled = [{name: delta.scaled(scale) for name, delta in adapter.items()} for adapter in adapters]
    want = {name: value * scale for name, value in changes(row, adapters).items()}
    got = changes(row, scaled)
    assert all(torch.allclose(got[name], want[name], rtol=row.within, atol=row.within * scale) for name in want)


@rows
@given(seed=seeds)
def test_factors_and_dense_agree(row: Row, seed: int) -> None:
    if not row.on_changes:
        return
    adapters = factors(seed)
    dense: list[dict[str, Delta]] = [{n: Dense(d.dense()) for n, d in adapter.items()} for adapter in adapters]
    assert not row.dense or close(changes(row, adapters), changes(row, dense), row.within)
    out = merging.merge_deltas(adapters[: row.most], method=row.chain, **row.parameters)
    assert all(isinstance(delta, LowRank) for delta in out.values()) == chain(row.chain, row.parameters).factored


@rows
@given(seed=seeds)
def test_gauge(row: Row, seed: int) -> None:
    """(B, A) and (B G, G^-1 A) are one change."""
    if not row.on_changes:
        return
    random = torch.Generator().manual_seed(seed)

    def turned(delta: Delta) -> Delta:
        assert isinstance(delta, LowRank)
        turn = torch.linalg.qr(torch.randn(delta.rank, delta.rank, generator=random))[0] * 3
        return LowRank(delta.up @ turn, turn.inverse() @ delta.down, delta.shape, delta.transposed)

    adapters = factors(seed)
    other = [{name: turned(delta) for name, delta in adapter.items()} for adapter in adapters]
    assert close(changes(row, adapters), changes(row, other), row.within)


@rows
def test_shape_and_type_are_the_bases(row: Row, tmp_path: Path) -> None:
    """Tensor by tensor, in memory and in files; what holds no floats comes from the base."""
    base = model(0) | {"position_ids": torch.arange(4), "flags": torch.tensor([True, False])}
    kinds = itertools.cycle([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    base = {name: value.to(next(kinds)) if value.is_floating_point() else value for name, value in base.items()}
    tuned = [
        {name: v.float() if v.is_floating_point() else v for name, v in fine_tune(base, i).items()} for i in (1, 2)
    ]
    tuned[1]["position_ids"] = torch.arange(4) + 1
    paths = [save(tmp_path / f"{i}", each) for i, each in enumerate(tuned)][: row.most]
    save(tmp_path / "base", base)
    merging.merge(paths, method=row.chain, base=tmp_path / "base", output=tmp_path / "out", **row.parameters)
    for got in (merged(row, tuned, base), load(tmp_path / "out")):
        assert {n: (v.dtype, v.shape) for n, v in got.items()} == {n: (v.dtype, v.shape) for n, v in base.items()}
        assert torch.equal(got["position_ids"], base["position_ids"])
        assert torch.equal(got["flags"], base["flags"])


@rows
def test_same_recipe_same_bytes(row: Row, tmp_path: Path) -> None:
    """With other threads, in the least memory, and for inputs in other shards: the promise of the README."""
    base, tuned = parts(4, dtype=torch.bfloat16)
    for i, each in enumerate([base, *tuned]):
        save(tmp_path / f"{i}", each)
        save(tmp_path / f"sharded{i}", each, shards=i + 2)
    written = []
    for number, (kind, threads, limited) in enumerate([("", 1, 0), ("sharded", 1, 0), ("", 3, 0), ("", 2, 1)]):
        output = tmp_path / f"out{number}"
        options: dict[str, Any] = {"method": row.chain, "base": tmp_path / f"{kind}0"} | row.parameters
        paths = [tmp_path / f"{kind}{i}" for i in (1, 2)][: row.most]
        plan = merging.preview(paths, **options)
        memory = plan.memory(1) if limited else None
        merging.merge(paths, output=output, threads=threads, max_memory=memory, **options)
        written.append((output / "model.safetensors").read_bytes())
    assert written[0] == written[2] == written[3]
    assert identical(load(tmp_path / "out0"), load(tmp_path / "out1")), "only the paths in the header differ"


@rows
@pytest.mark.parametrize("defaults", [False, True])
def test_recipe_saved_and_loaded_is_equal(row: Row, defaults: bool) -> None:
    method = chain(row.chain, {} if defaults else row.parameters)
    recipe = Recipe(
        models=("a", "é: b"),
        method=method,
        base="base",
        dtype="bfloat16",
        shard_size=1000,
        on_mismatch="base",
        layers=7,
    )
    loaded = load_recipe(recipe.to_yaml())
    assert loaded == recipe
    assert loaded.method == method
    assert loaded.to_yaml() == recipe.to_yaml()
    assert [type(link) for link in loaded.method.links()] == links(row.chain)
    assert hash(method) == hash(loaded.method)
    assert repr(method) == repr(loaded.method)


@rows
def test_gradient_reaches_the_coefficients(row: Row) -> None:
    """And is the one that differences tell."""
    base, tuned = parts(5, dtype=torch.float64)

    def loss(**coefficients: Any) -> Tensor:
        out = merged(row, tuned, base, row.parameters | coefficients)
        return torch.stack(
            [(value * torch.linspace(-1, 2, value.numel()).view(value.shape)).sum() for value in out.values()]
        ).sum()

    for name, value in row.gradients.items():
        leaf = value.double().requires_grad_()
        loss(**{name: leaf}).backward()
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, differences(lambda v, name=name: loss(**{name: v}), value.double()), rtol=1e-4)


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient by central differences."""
    steps = torch.eye(at.numel(), dtype=at.dtype).view(-1, *at.shape) * step
    slopes = [(function(at + each) - function(at - each)) / (2 * step) for each in steps]
    return torch.stack(slopes).view(at.shape)


@rows
def test_methods_are_values(row: Row) -> None:
    """Equal if made alike, different with other parameters, and never changed."""
    one, again = chain(row.chain, row.parameters), chain(row.chain, row.parameters)
    assert one == again
    assert one is not again
    assert (one == chain(row.chain, row.swapped)) == (row.swapped == row.parameters)
    with pytest.raises(ValueError, match="frozen"):
        one.then = again  # type: ignore[attr-defined]
    assert one.chain == "+".join(cls.name for cls in links(row.chain))


@rows
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_cpu_and_gpu_agree(row: Row) -> None:
    """To rounding, on tensors that stay where they are."""
    base, tuned = parts(6, width=32, vocab=300)
    there = [{name: value.cuda() for name, value in each.items()} for each in (base, *tuned)]
    got = merged(row, there[1:], there[0])
    assert all(value.is_cuda for value in got.values())
    assert close({name: value.cpu() for name, value in got.items()}, merged(row, tuned, base), 1e-4)
    if row.on_changes:
        adapters = factors(6)
        moved = [{n: d.to("cuda") for n, d in each.items()} for each in adapters]
        assert close({n: v.cpu() for n, v in changes(row, moved).items()}, changes(row, adapters), 1e-4)
