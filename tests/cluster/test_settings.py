"""The settings of a cluster, and refusals that need no cluster."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

import merging
from merging.cluster import RayCluster, connect, connection, make_cluster, map_tasks
from merging.engine.evaluation import evaluate_each, make_evaluation_cluster
from merging.engine.transport import open_recorded
from merging.errors import InputError, OptionError
from merging.pool import Pool
from merging.storage.placed_files import PlacedFiles, TensorPlace
from support.commands import ok, refused
from support.tiny import adapters, checkpoint

WITHOUT_RAY = pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed here")


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "head.example:6379", "[::1]:6379"])
def test_addresses(address: str) -> None:
    cluster = make_cluster("ray", address)
    assert cluster is not None and cluster.address == address


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "head"}, r'^address="head": write HOST:PORT, or auto$'),
        ({"workers": 0}, "^workers=0: at least one is needed$"),
        ({"worker_cpus": 0}, "^worker_cpus=0: write a number above 0$"),
        ({"worker_gpus": 1.5}, r"^worker_gpus=1\.5: write a fraction of one GPU, or whole GPUs$"),
        ({"worker_gpus": float("inf")}, "^worker_gpus=inf: write a fraction"),
        ({"tries": 0}, "^tries=0: at least one is needed$"),
        ({"worker_cpus": "4"}, "^worker_cpus should be a number, and is '4'$"),
        ({"workers": 1.5}, r"^workers should be a whole number, and is 1\.5$"),
        ({"address": 5}, "^address should be text, and is 5$"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RayCluster(**settings)


def test_settings_of_an_engine() -> None:
    assert make_cluster("local") is None
    assert make_cluster("ray", workers=3) == RayCluster(workers=3)
    assert make_cluster(RayCluster(workers=3), "head:1") == RayCluster(workers=3, address="head:1")
    assert RayCluster(worker_cpus=4, worker_gpus=0.5, memory=10).resources == {"CPU": 4, "GPU": 0.5, "memory": 10}
    assert [RayCluster(worker_cpus=cpus).threads for cpus in (0.5, 1, 4)] == [1, 1, 4]
    with pytest.raises(OptionError, match=r'^engine="rays": use local or ray \(did you mean \'ray\'\?\)$'):
        make_cluster("rays")
    with pytest.raises(OptionError, match=r'^workers= is a setting of a cluster: add engine="ray"$'):
        make_cluster("local", workers=3)


def test_options_of_the_commands(tmp_path: Path) -> None:
    models = checkpoint(tmp_path, 2)[1]
    words = ["-m", "linear", *models, "-o", tmp_path / "out"]
    assert "--address is a setting of a cluster: add --engine ray" in refused(*words, "--address", "auto")
    cluster = [*words, "--engine", "ray"]
    assert "--stream downloads for one machine: leave it out with a cluster" in refused(*cluster, "--stream")
    assert "--threads 2 is for the threads of this process" in refused(*cluster, "--threads", "2")
    assert "--device cuda:1: the workers of a cluster run on cpu or cuda" in refused(*cluster, "--device", "cuda:1")
    assert "max_memory = 1 MB is too little" in refused(*cluster, "--max-memory", "1MB")
    ok(*words, "--engine", "local")


@WITHOUT_RAY
def test_without_ray_one_command_installs_it(tmp_path: Path) -> None:
    models = checkpoint(tmp_path, 2)[1]
    said = "--engine ray needs the package ray: pip install 'merging[ray]', here and on every node of the cluster"
    assert said in refused("-m", "linear", *models, "-o", tmp_path / "out", "--engine", "ray")
    recipe = merging.Recipe(models=[str(each) for each in models], method="linear")
    with pytest.raises(OptionError, match=r'^engine="ray" needs the package ray: pip install'):
        recipe.run(tmp_path / "out", engine="ray")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["base", "tuned0", "tuned1"]


def test_options_of_commands_that_evaluate_adapters(tmp_path: Path) -> None:
    base, folders = adapters(tmp_path, 2)
    pool = Pool.create(tmp_path / "pool", base)
    examples = tmp_path / "train.jsonl"
    examples.write_text('{"text": "one", "label": 0}\n{"text": "two", "label": 1}\n')
    for words in (
        ("pool", "build", pool.path, *folders),
        ("pool", "smoke", pool.path),
        ("recycle", *folders, "--base", base, "--train", examples, "-o", tmp_path / "out"),
    ):
        assert "--workers is a setting of a cluster: add --engine ray" in refused(*words, "--workers", 2)
        assert "--address head: write HOST:PORT, or auto" in refused(*words, "--engine", "ray", "--address", "head")
        if words[1] != "build":
            said = refused(*words, "--engine", "ray", "--device", "cuda:1")
            assert "--device cuda:1: the workers of a cluster run on cpu or cuda" in said
    with pytest.raises(OptionError, match=r'^engine="rays": use local or ray'):
        pool.smoke(engine="rays")


def test_evaluations_without_a_cluster_take_one_function(tmp_path: Path) -> None:
    made: list[str] = []

    def prepare() -> Callable[[int], int]:
        made.append("once")
        return lambda number: -number

    tasks = ((path, number) for number, path in enumerate([tmp_path / "a", tmp_path / "b"]))
    assert [*evaluate_each(tasks, prepare, None)] == [(tmp_path / "a", 0), (tmp_path / "b", -1)]
    assert made == ["once"]


def test_gpus_of_an_evaluation() -> None:
    gpus = [make_evaluation_cluster(RayCluster(worker_gpus=share), device=device)
            for share, device in ((0, "cpu"), (0, "cuda"), (0.5, "cuda"))]  # fmt: skip
    assert [cluster and cluster.worker_gpus for cluster in gpus] == [0, 1, 0.5]


@WITHOUT_RAY
def test_an_evaluation_needs_ray(tmp_path: Path) -> None:
    base, folders = adapters(tmp_path, 1)
    Pool.create(tmp_path / "pool", base)
    examples = tmp_path / "train.jsonl"
    examples.write_text('{"text": "one", "label": 0}\n{"text": "two", "label": 1}\n')
    for words in (
        ("pool", "build", tmp_path / "pool", *folders),
        ("recycle", *folders, "--base", base, "--train", examples, "-o", tmp_path / "out"),
    ):
        said = refused(*words, "--engine", "ray")
        assert "Error: --engine ray needs the package ray: pip install 'merging[ray]'" in said
        assert "loading" not in said


class Banner(BaseRequestHandler):
    """A server that greets its clients, and waits for what they want."""

    def handle(self) -> None:
        self.request.sendall(b"SSH-2.0-Banner\r\n")
        self.request.recv(100)


def test_another_program_at_the_address_is_noticed() -> None:
    with ThreadingTCPServer(("127.0.0.1", 0), Banner) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            with pytest.raises(OSError, match="another program listens there"):
                connection.probe(f"127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()


def test_resources_in_words() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 4e9}}]
    with pytest.raises(OptionError, match=r"for a worker of 4 CPU, 434\.3 MB of memory: its nodes have 2 CPU, 4\.0 GB"):
        connection.count_workers(SimpleNamespace(nodes=lambda: nodes), RayCluster(worker_cpus=4, memory=434_295_000))


@WITHOUT_RAY
def test_a_connection_needs_ray() -> None:
    with pytest.raises(OptionError, match="needs the package ray"), connect(RayCluster()):
        pass


def test_tasks_without_a_cluster_are_mapped_here() -> None:
    assert [*map_tasks(lambda number: number + 1, [1, 2], None)] == [(1, 2), (2, 3)]


def test_a_worker_checks_that_it_sees_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    status = path.stat()
    state = status.st_size, status.st_mtime_ns
    assert open_recorded(path, state, "head").size == 8
    with pytest.raises(InputError, match="it has another size than on head: all nodes of the cluster need the inputs"):
        open_recorded(path, (9, state[1]), "head")
    with pytest.raises(InputError, match="it has another time of the last change than on head"):
        open_recorded(path, (8, state[1] + 1), "head")
    path.unlink()
    with pytest.raises(InputError, match="does not see this file of head"):
        open_recorded(path, state, "head")


def test_files_of_another_process(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "file"
    path.write_bytes(bytes(16))
    files = PlacedFiles({"a": TensorPlace(path, 8)})
    files.write("a", torch.tensor([3.0]), 1)
    files.sync()
    files.close()
    read = torch.empty(2)
    files.read("a", read, 0)
    assert read.tolist() == [0, 3] and files.take_written() == {"a": 4} and files.take_written() == {}
    files.close()
    path.unlink()
    with pytest.raises(merging.OutputError, match="all nodes of the cluster need the folder of the output"):
        files.write("a", torch.tensor([3.0]))
