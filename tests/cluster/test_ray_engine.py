"""Merges on a real Ray cluster: the bytes of one machine, with workers and nodes that die, errors, and Ctrl-C."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

import merging
from merging.cluster import RayCluster, WorkerLost, map_tasks
from merging.engine.crews import ThreadCrew
from merging.errors import InputError, OptionError
from merging.plan.items import TILE
from support.commands import ok
from support.hub_fixture import Hub
from support.ray_cluster import NEEDS_RAY, Nodes, connect_nodes, node_words
from support.tiny import adapters, checkpoint, identical, load, save

pytestmark = NEEDS_RAY


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head and a second node, with two processors each, and a connection to them."""
    with connect_nodes(2, 2) as started:
        yield started


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with two tiles in the largest tensors, adapters, and recipes with stages."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint(folder, 3, layers=3, width=48, vocab=12_000)  # more than a tile
    adapters(folder / "lora", 3)
    stage = {"models": ["tuned0", "tuned1"], "method": "ties", "base": "base"}
    outer = {"models": [stage, "tuned2"], "method": "karcher"}
    (folder / "aside.yml").write_text(json.dumps(outer))
    stage["method"] = "task_arithmetic"
    (folder / "lazy.yml").write_text(json.dumps(outer))
    return folder


KINDS = {
    "linear": "-m linear tuned0 tuned1 tuned2",
    "shards": "-m task_arithmetic --base base tuned0 tuned1 --shard-size 100000",
    "half": "-m linear tuned0 tuned1 --dtype bfloat16",
    "statistics": "-m ties --density 0.3 --base base tuned0 tuned1 tuned2",
    "random": "-m dare+ties --drop 0.5 --density 0.5 --base base tuned0 tuned1",
    "decompositions": "-m tsv --base base tuned0 tuned1",
    "set aside": "-m lines+tsv --base base tuned0 tuned1",
    "kept factors": "-m orthogonalize+ties --steps 3 lora/adapter0 lora/adapter1 lora/adapter2",
    "adapters": "-m linear lora/adapter0 lora/adapter1",
    "ranks": "-m linear lora/adapter0 lora/adapter1 lora/adapter2 --energy 0.9",
    "extracted": "extract tuned0 --base base --size 20kB",
    "baked": "bake lora/adapter0 --base lora/base",
    "stages aside": "run aside.yml",
    "lazy stages": "run lazy.yml",
    "codes": "-m linear tuned0 tuned1 --quantize fp8-channel",
    "gguf": "-m linear lora/adapter0 lora/adapter1 --format gguf --base lora/base",
}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_one_machine(
    nodes: Nodes, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr("merging.engine.tiles.CHUNK", TILE)  # several units a tensor
    words = KINDS[kind].split()
    ok(*words, "-o", tmp_path / "0" / "out")
    wanted = contents(tmp_path / "0" / "out")
    monkeypatch.setattr(ThreadCrew, "go_through", None)
    for workers in (1, 2, 4):
        out = tmp_path / str(workers) / "out"
        ok(*words, "-o", out, "--engine", "ray", "--address", nodes.address, "--workers", workers)
        assert contents(out) == wanted
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["statistics", "set aside", "ranks", "baked"])
def test_reports_have_the_numbers_of_one_machine(
    nodes: Nodes, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr("merging.engine.tiles.CHUNK", TILE)
    words = [*KINDS[kind].split(), "--overwrite", "--json", "-o", tmp_path / "out", "--report", tmp_path / "r.html"]
    here, there = (
        json.loads(ok(*words, *more).stdout)["report"]
        for more in ((), ("--engine", "ray", "--address", nodes.address, "--workers", 2))
    )
    assert here["tensors"] == there["tensors"] and len(here["tensors"]) > 1
    assert {"reading", "measuring"} <= there["seconds_of_threads"].keys()


@contextmanager
def kill_workers(nodes: Nodes, count: int, killed: Path) -> Iterator[None]:
    """Kill workers by SIGKILL while the body runs, and write ``killed`` when it is done."""
    stop, chance = threading.Event(), random.Random(0)

    def kill() -> None:
        done = 0
        while done < count and not stop.wait(0.3):
            done += nodes.kill_worker(chance)
        killed.write_text(str(done))

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", ["set aside", "ranks", "codes"])
def test_other_machines_make_their_part_durable(
    nodes: Nodes, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(models)
    words = KINDS[kind].split()
    ok(*words, "-o", tmp_path / "wanted" / "out")
    monkeypatch.setattr("merging.engine.cluster_crew.machine_id", lambda: "another machine")
    ok(*words, "-o", tmp_path / "out", "--engine", "ray", "--address", nodes.address)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted" / "out")


@pytest.mark.parametrize("kind", ["statistics", "set aside", "ranks"])
def test_workers_of_several_threads(
    nodes: Nodes, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr("merging.engine.tiles.CHUNK", TILE)
    words = KINDS[kind].split()
    ok(*words, "-o", tmp_path / "wanted" / "out")
    ok(*words, "-o", tmp_path / "out", "--engine", "ray", "--address", nodes.address, "--worker-cpus", 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted" / "out")


def slow_method(seconds: float) -> Any:
    """A method that takes time: the mean, after a while."""

    @merging.method("slow_mean", needs="element")
    def slow_mean(deltas: Tensor) -> Tensor:
        """Mean of the changes."""
        time.sleep(seconds)
        return deltas.mean(0)

    return slow_mean()


def merge_slowly(models: Path, output: Path, seconds: float, **options: Any) -> Any:
    return merging.merge(
        [models / "tuned0", models / "tuned1"],
        method=slow_method(seconds),
        base=models / "base",
        output=output,
        **options,
    )


def test_ten_killed_workers(nodes: Nodes, models: Path, tmp_path: Path) -> None:
    merge_slowly(models, tmp_path / "wanted", 0)
    killed = tmp_path / "killed"

    @merging.method("waiting", needs="element")
    def waiting(deltas: Tensor) -> Tensor:
        """Mean of the changes, when all workers that are to be killed have been."""
        while not killed.exists():
            time.sleep(0.05)
        return deltas.mean(0)

    with kill_workers(nodes, 10, killed):
        merging.merge(
            [models / "tuned0", models / "tuned1"],
            method=waiting(),
            base=models / "base",
            output=tmp_path / "out",
            engine=RayCluster(address=nodes.address, tries=11),
        )
    assert killed.read_text() == "10"
    ours, theirs = load(tmp_path / "out"), load(tmp_path / "wanted")
    assert identical(ours, theirs)


def test_codes_are_whole_when_a_worker_dies(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.engine.tiles.CHUNK", TILE)
    _, inputs = checkpoint(tmp_path, 2, layers=1, width=640)  # a matrix of two units, and a code that is in both
    died = tmp_path / "died"

    @merging.method("dying", needs="element")
    def dying(deltas: Tensor, site: Any) -> Tensor:
        """Mean of the changes; the first worker at the large matrix dies."""
        if "mlp.up_proj" in site.name:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)  # units apart from each other would be on two workers
        return deltas.mean(0)

    options = {"method": dying(), "base": tmp_path / "base", "quantize": "fp8-channel"}
    merging.merge(inputs, output=tmp_path / "out", engine=RayCluster(address=nodes.address), **options)
    assert died.exists()
    merging.merge(inputs, output=tmp_path / "wanted", **options)
    assert identical(load(tmp_path / "out"), load(tmp_path / "wanted"))


def test_a_node_that_dies(nodes: Nodes, models: Path, tmp_path: Path) -> None:
    merge_slowly(models, tmp_path / "wanted", 0)
    raylet = nodes.start("--address", nodes.address, *node_words(4))
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        if not seen:
            raylet.kill()
        seen.append(done)

    cluster = RayCluster(address=nodes.address, workers=8)
    merge_slowly(models, tmp_path / "out", 0.3, engine=cluster, progress=progress)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_a_fatal_tensor_is_named(nodes: Nodes, models: Path, tmp_path: Path) -> None:
    @merging.method("fatal", needs="element", models=(2, None))
    def fatal(deltas: Tensor, site: Any) -> Tensor:
        """Mean of the changes, but for one tensor."""
        if "layers.1" in site.name and "norm" in site.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return deltas.mean(0)

    with pytest.raises(
        InputError,
        match=r"^model.layers.1.input_layernorm.weight: its worker died 2 times \(The .*task\): leave .*exclude",
    ):
        merging.merge(
            [models / "tuned0", models / "tuned1"],
            method=fatal(),
            base=models / "base",
            output=tmp_path / "out",
            engine=RayCluster(address=nodes.address, tries=2),
        )
    assert not any(tmp_path.iterdir())


def test_an_error_is_the_same_as_on_one_machine(nodes: Nodes, models: Path, tmp_path: Path) -> None:
    broken = load(models / "tuned0")
    broken["model.norm.weight"][3] = float("nan")
    save(tmp_path / "broken", broken)
    said = []
    for engine in ("local", "ray"):
        with pytest.raises(InputError, match="holds NaN") as error:
            merging.merge(
                [tmp_path / "broken", models / "tuned1"], method="linear", output=tmp_path / "out", engine=engine
            )
        said.append(str(error.value))
    assert said[0] == said[1]
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_ctrl_c_stops_the_workers_and_leaves_nothing(nodes: Nodes, models: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        merge_slowly(models, tmp_path / "out", 3, engine="ray", progress=interrupt)
    until = time.monotonic() + 10
    while nodes.workers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not nodes.workers()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "then"), [("ray", "local"), ("local", "ray")])
def test_a_merge_that_stopped_is_gone_on_with(
    nodes: Nodes, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, then: str
) -> None:
    monkeypatch.setattr("merging.engine.journal._PERIOD", 0.01)
    options = {"base": models / "base", "method": "lines+tsv", "resume": True, "overwrite": True}
    options["report"] = tmp_path / "page.html"
    inputs = [models / "tuned0", models / "tuned1"]
    wanted = merging.merge(inputs, output=tmp_path / "wanted", **options).report

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 0.8 * total:
            time.sleep(0.3)
            raise Stop

    with pytest.raises(Stop):
        merging.merge(inputs, output=tmp_path / "out", engine=first, progress=stop, **options)
    (left,) = tmp_path.glob(".out.*.partial")
    entries = [json.loads(line) for line in (left / "journal" / "merge.jsonl").read_text().splitlines()]
    assert any(entry["spooled"] for entry in entries) and any(entry["units"] for entry in entries)
    found = merging.merge(inputs, output=tmp_path / "out", engine=then, **options).report
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert found is not None and wanted is not None and found.to_dict()["tensors"] == wanted.to_dict()["tensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "page.html", "wanted"]


def test_the_command_with_models_of_the_hub(nodes: Nodes, models: Path, tmp_path: Path, hub: Hub) -> None:
    """In a process of its own, which connects by itself, and whose workers know nothing of the Hub."""
    for name in ("tuned0", "tuned1"):
        files = {file.name: file for file in (models / name).iterdir()}
        hub.put(f"org/{name}", files)
    words = ["-m", "linear", "org/tuned0", "org/tuned1", "-o", str(tmp_path / "out"), "--json", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "merging", *words, "--engine", "ray", "--address", nodes.address],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == len(load(tmp_path / "out"))
    assert done.stderr == ""
    merging.merge([models / "tuned0", models / "tuned1"], method="linear", output=tmp_path / "wanted")
    assert identical(load(tmp_path / "out"), load(tmp_path / "wanted"))


def test_tasks_are_mapped(nodes: Nodes) -> None:
    factor = 3
    found = dict(map_tasks(lambda number: factor * number, range(20), RayCluster(address=nodes.address)))
    assert found == {number: 3 * number for number in range(20)}


def test_an_error_of_a_task(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> int:
        raise InputError(f"{number} is wrong")

    with pytest.raises(InputError, match=r"^7 is wrong$"):
        next(map_tasks(fail, [7], RayCluster()))
    with pytest.raises(ZeroDivisionError):
        next(map_tasks(lambda number: number / 0, [7], RayCluster()))
    monkeypatch.setitem(sys.modules, "here_alone", here_alone := ModuleType("here_alone"))
    exec("def double(number):\n    return 2 * number", vars(here_alone))
    with pytest.raises(InputError, match=r"^a worker of the cluster cannot import here_alone: install it"):
        next(map_tasks(vars(here_alone)["double"], [7], RayCluster()))
    with pytest.raises(WorkerLost, match="its worker died 2 times"):
        next(map_tasks(lambda number: os.kill(os.getpid(), signal.SIGKILL), [7], RayCluster(tries=2)))


def test_no_room(nodes: Nodes, models: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no node of the cluster has room for a worker of 64 CPU"):
        merging.merge([models / "tuned0"], method="linear", output=tmp_path / "out", engine=RayCluster(worker_cpus=64))
