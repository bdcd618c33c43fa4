"""A real Ray cluster on this machine: a head and nodes by ``ray start``, with few resources, each a process of ours."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from merging.cluster import RayCluster, connect

__all__ = ["NEEDS_RAY", "Nodes", "connect_nodes", "node_words", "start_nodes"]

NEEDS_RAY = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray, as .ci/run cluster installs it"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
"""The marks of tests on a real cluster."""

_STARTED = 60.0
"""Seconds that a node has to start."""


@dataclass
class Nodes:
    """The processes of a cluster, the head first."""

    address: str
    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *words: str) -> psutil.Process:
        """Start a node, and return its raylet when it is there."""
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
        log = (self.folder / f"node{len(self.started)}.log").open("wb")
        words = (str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *words)
        node = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.started.append(node)
        until = time.monotonic() + _STARTED
        while time.monotonic() < until and node.poll() is None:
            for process in psutil.Process(node.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if process.name() == "raylet" and b"runtime started" in Path(log.name).read_bytes():
                        return process
            time.sleep(0.1)
        raise AssertionError(Path(log.name).read_text())

    def workers(self) -> list[psutil.Process]:
        """Return the processes of all nodes that apply a function to a task now."""
        found = []
        for node in self.started:
            with suppress(psutil.Error):
                for process in psutil.Process(node.pid).children(recursive=True):
                    with suppress(psutil.Error):
                        if process.cmdline()[:1] == ["ray::_apply"]:
                            found.append(process)
        return found

    def kill_worker(self, chance: random.Random) -> bool:
        """Kill a worker by SIGKILL, if one works now."""
        workers = self.workers()
        if not workers:
            return False
        with suppress(psutil.NoSuchProcess):
            chance.choice(workers).kill()
            return True
        return False

    def stop(self) -> None:
        """End all nodes."""
        for node in reversed(self.started):
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
        for node in self.started:
            self._outlast(node)

    @staticmethod
    def _outlast(node: subprocess.Popen[bytes]) -> None:
        try:
            node.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)


def node_words(cpus: int) -> tuple[str, ...]:
    """Return the limits of a node."""
    return "--num-cpus", str(cpus), "--num-gpus", "0", "--memory", "4000000000", "--object-store-memory", "100000000"


@contextmanager
def start_nodes(*cpus: int) -> Iterator[Nodes]:
    """Run a head and further nodes with these numbers of processors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the names of its sockets must be short
    nodes = Nodes(f"127.0.0.1:{port}", folder)
    head = ("--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", str(folder / "r"))
    try:
        for number, count in enumerate(cpus):
            nodes.start(*(head if number == 0 else ("--address", nodes.address)), *node_words(count))
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connect_nodes(*cpus: int) -> Iterator[Nodes]:
    """Run nodes with these numbers of processors, and keep a connection to them, which merges use."""
    with start_nodes(*cpus) as started, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with connect(RayCluster(address=started.address)):
            yield started
