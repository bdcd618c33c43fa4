"""Pools and recycling on a real Ray cluster: the results of one machine, with workers that die, errors, and Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import merging
from merging.cluster import RayCluster
from merging.engine.evaluation import evaluate_each
from merging.errors import InputError
from merging.pool import Pool
from merging.pool.candidates import candidates_in
from merging.pool.entry import Entry
from merging.sources.open_files import File
from support.adapters import edit_tensors
from support.commands import ok
from support.hub_fixture import Hub
from support.ray_cluster import NEEDS_RAY, Nodes, connect_nodes
from support.recycling_tasks import World, causal, classifier, contents
from support.tiny import checkpoint

pytestmark = NEEDS_RAY


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head and a second node, with one processor each, and a connection to them."""
    with connect_nodes(1, 1) as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Calculate here with the threads of a worker, as rounding depends on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A language model with five adapters: one holds NaN, and one destroys the base."""
    world = causal(tmp_path_factory.mktemp("causal"))
    edit_tensors(world.pool / "a1", lambda tensors: {name: value * float("nan") for name, value in tensors.items()})
    edit_tensors(world.pool / "a3", lambda tensors: {name: value * 30 for name, value in tensors.items()})
    return world


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that this process built."""
    folder = tmp_path_factory.mktemp("pools") / "pool"
    Pool.create(folder, world.base).build(candidates_in(world.pool))
    return folder


def entries(pool: Path) -> list[Entry]:
    """All entries without the time of their audit, which differs."""
    return [replace(entry, time="") for entry in Pool(pool).index.entries()]


def test_a_build(nodes: Nodes, world: World, built: Path, tmp_path: Path) -> None:
    events: list[str] = []
    pool = Pool.create(tmp_path / "pool", world.base)
    pool.build(candidates_in(world.pool), engine="ray", on_event=lambda entry: events.append(entry.name))
    assert entries(tmp_path / "pool") == entries(built)
    assert pool.index.base_norms() == Pool(built).index.base_norms()
    assert events[:5] == [str(path) for path in sorted(world.pool.iterdir())]
    assert {entry.verdict for entry in entries(built)} > {"ok", "rejected"}
    kept = {path.relative_to(built): path.read_bytes() for path in (built / "adapters").rglob("*.*")}
    assert kept == {path.relative_to(pool.path): path.read_bytes() for path in (pool.path / "adapters").rglob("*.*")}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_smoke_test_by_the_command(nodes: Nodes, built: Path, tmp_path: Path, workers: int) -> None:
    said = []
    for words in ((), ("--engine", "ray", "--address", nodes.address, "--workers", workers)):
        pool = shutil.copytree(built, tmp_path / "pool")
        shutil.rmtree(Pool(pool).usable()[0][1])  # which cannot be run
        done = ok("pool", "smoke", pool, "--json", *words)
        said.append((done.stdout, done.stderr, entries(pool)))
        shutil.rmtree(pool)
    assert said[0] == said[1]
    assert "could not be run" in said[0][1]


@pytest.mark.parametrize("select", ["screen", "evaluation", "l2"])
def test_recycling(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str) -> None:
    monkeypatch.setattr("merging.recycling.page.find_spec", lambda name: None)  # pictures take long
    world = classifier(tmp_path)
    arguments = world.arguments(select=select, target_lora="train" if select == "l2" else "none")
    made = merging.recycle(**arguments, output=tmp_path / "here" / "out")
    cluster = RayCluster(address=nodes.address, workers=2)
    there = merging.recycle(**arguments, output=tmp_path / "there" / "out", engine=cluster)
    assert contents(there.path) == contents(made.path)


def test_a_search(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.searches.page.find_spec", lambda name: None)  # pictures take long
    world = classifier(tmp_path)
    models = [world.pool / "a0", world.pool / "a2"]
    found = []
    for name, engine in (("here", "local"), ("there", RayCluster(address=nodes.address, workers=2))):
        given = {"base": world.base, "data": world.train, "test": world.test, "strategy": "shrink", "resamples": 200}
        found.append(merging.search(models, **given, budget=14, output=tmp_path / name / "out", engine=engine))
    here, there = found
    assert there.winner == here.winner
    assert there.report.rows == here.report.rows
    assert [(row.name, row.score) for row in there.report.trials] == [(r.name, r.score) for r in here.report.trials]
    assert not (tmp_path / "there" / ".out.search").exists()


@pytest.mark.parametrize("options", [{}, {"window": 2}])
def test_a_scored_soup(nodes: Nodes, tmp_path: Path, options: dict[str, int]) -> None:
    _, models = checkpoint(tmp_path, 4)
    script = tmp_path / "score.py"
    script.write_text("import pathlib, sys\nfiles = pathlib.Path(sys.argv[1]).glob('*.safetensors')\n"
                      "print(sum(sum(file.read_bytes()) for file in files) % 1000)")  # fmt: skip
    score = f"{sys.executable} {script}"
    said: list[list[str]] = []
    for name, engine in (("here", "local"), ("there", "ray")):
        lines: list[str] = []
        merging.soup(models, output=tmp_path / name, score=score, engine=engine, on_event=lines.append, **options)
        said.append(lines)
    assert said[0] == said[1] and len(said[0]) >= 3
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_killed_workers_leave_no_soup(nodes: Nodes, tmp_path: Path) -> None:
    _, models = checkpoint(tmp_path, 3)

    def kill(model: Path) -> float:
        if model.name == "out":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    with pytest.raises(InputError, match=r"^tuned1, tuned2: its worker died 2 times"):
        merging.soup(models, output=tmp_path / "out", score=kill, engine=RayCluster(tries=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned0", "tuned1", "tuned2"]


@dataclass(frozen=True)
class Key:
    """A name in the place of an adapter."""

    name: str


def numbered(count: int) -> Iterator[tuple[Key, int]]:
    return ((Key(f"adapter {number}"), number) for number in range(count))


def test_the_function_is_made_once_a_worker_and_the_order_is_that_of_the_tasks(nodes: Nodes, tmp_path: Path) -> None:
    threads = torch.get_num_threads()

    def prepare() -> Callable[[int], tuple[int, int]]:
        (tmp_path / f"made {os.getpid()}").touch(exist_ok=False)

        def evaluate(number: int) -> tuple[int, int]:
            time.sleep(0.3 if number % 4 == 0 else 0)  # later tasks end earlier
            return number, torch.get_num_threads()

        return evaluate

    results = [*evaluate_each(numbered(12), prepare, RayCluster(workers=2))]
    assert results == [(Key(f"adapter {number}"), (number, 1)) for number in range(12)]
    assert 1 <= len([*tmp_path.iterdir()]) <= 2 and not (tmp_path / f"made {os.getpid()}").exists()
    assert torch.get_num_threads() == threads


def test_no_more_tasks_than_the_workers_need_are_opened(nodes: Nodes) -> None:
    opened: list[int] = []

    def tasks() -> Iterator[tuple[Key, int]]:
        for key, number in numbered(50):
            opened.append(number)
            yield key, number

    with closing(evaluate_each(tasks(), lambda: abs, RayCluster(workers=2))) as results:
        next(results)
    assert len(opened) <= 4


def test_workers_that_die(nodes: Nodes, tmp_path: Path) -> None:
    def prepare() -> Callable[[int], int]:
        def evaluate(number: int) -> int:
            died = tmp_path / str(number)
            if number == 3 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        return evaluate

    assert [result for _, result in evaluate_each(numbered(8), prepare, RayCluster())] == [*range(8)]
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_fatal_adapter_is_named(nodes: Nodes) -> None:
    def evaluate(number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    said = r"^adapter 1: its worker died 2 times \(The .*\): leave it out, or give the workers more memory$"
    with pytest.raises(InputError, match=said):
        [*evaluate_each(numbered(3), lambda: evaluate, RayCluster(tries=2))]


def test_files_that_workers_do_not_see(nodes: Nodes, built: Path, tmp_path: Path) -> None:
    """A worker opens a file in another state than the program, as one with a folder of its own would."""
    pool, file = shutil.copytree(built, tmp_path / "pool"), tmp_path / "base" / "config.json"
    file.parent.mkdir()
    file.write_text("{}")

    def tasks() -> Iterator[tuple[Key, int]]:
        file.unlink()  # when the base is packed already
        yield Key("adapter"), 1

    with pytest.raises(InputError, match=r"config.json: .* does not see this file of .*under the same paths"):
        [*evaluate_each(tasks(), lambda: abs, RayCluster(), models=[str(file.parent)])]
    (weights, *_) = sorted((pool / "adapters").glob("*/*.safetensors"))

    def open_and_touch() -> Iterator[tuple[Key, File]]:
        opened = File(weights)
        os.utime(weights, (1, 1))
        yield Key("adapter"), opened

    with pytest.raises(InputError, match="it has another time of the last change than on"):
        [*evaluate_each(open_and_touch(), lambda: abs, RayCluster())]


def test_an_error_of_the_base_ends_the_test(nodes: Nodes, built: Path, tmp_path: Path) -> None:
    pool = Pool(shutil.copytree(built, tmp_path / "pool"))
    base = shutil.copytree(pool.base, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    pool.index.note(base=str(base))
    said = []
    for engine in ("local", "ray"):
        with pytest.raises(InputError, match="cannot be loaded by transformers") as error:
            pool.smoke(engine=engine)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not any(entry.smoke_tested for entry in pool.index.entries())


def test_ctrl_c_keeps_the_results_so_far(nodes: Nodes, built: Path, tmp_path: Path) -> None:
    pool, done = Pool(shutil.copytree(built, tmp_path / "pool")), list[str]()

    def interrupt(entry: Entry) -> None:
        done.append(entry.name)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pool.smoke(engine="ray", on_event=interrupt)
    until = time.monotonic() + 10
    while nodes.workers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not nodes.workers()
    assert [entry.name for entry in pool.index.entries() if entry.smoke_tested] == done
    pool.smoke(engine="ray")
    Pool(shutil.copytree(built, tmp_path / "wanted")).smoke()
    assert entries(pool.path) == entries(tmp_path / "wanted")


def test_the_command_with_adapters_of_the_hub(nodes: Nodes, world: World, tmp_path: Path, hub: Hub) -> None:
    """In a process of its own, which connects by itself, and whose workers know nothing of the Hub."""
    hub.put("org/adapter", {file.name: file for file in (world.pool / "a0").iterdir() if file.suffix != ".md"})
    words = ["pool", "build", "pool", "--base", str(world.base), "org/adapter", "--json", "--allow-unknown-license"]
    done = subprocess.run(
        [sys.executable, "-m", "merging", *words, "--engine", "ray", "--address", nodes.address],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["audited"] == 1
    (entry,) = Pool(tmp_path / "pool").index.entries()
    assert entry.norm and entry.verdict in ("ok", "repaired", "quarantined") and entry.folder
