"""The connection to a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from merging.cluster.settings import RayCluster
from merging.errors import InputError, OptionError, option

__all__ = ["connect", "count_workers", "first_sentence", "import_ray"]

_PATIENCE = 10.0
"""Seconds in which a cluster answers."""

_SKIPPED = "RAY_DEDUP_LOGS_SKIP_REGEX"
"""The setting of Ray for messages that it does not print."""


def import_ray() -> Any:
    """Return the package ray. Raises :class:`~merging.errors.OptionError` where it is not installed."""
    try:
        with _without_messages():
            return import_module("ray")
    except ImportError:
        raise OptionError(
            f"{option('engine', 'ray')} needs the package ray: pip install 'merging[ray]', here and on every node of "
            f"the cluster"
        ) from None


@contextmanager
def _without_messages() -> Iterator[None]:
    """Have Ray, if it is imported now, keep the messages about its workers from our standard output."""
    stated = os.environ.get(_SKIPPED)
    os.environ[_SKIPPED] = ".*" if stated is None else stated
    try:
        yield
    finally:
        if stated is None:
            del os.environ[_SKIPPED]


@contextmanager
def connect(cluster: RayCluster) -> Iterator[Any]:
    """Have a connection to a cluster while the body runs, and yield the package ray.

    A connection that the program made itself is used, and stays. Otherwise all workers of the program end with the
    body.

    Raises:
        OptionError: where ray is not installed, and for a cluster without room for one worker.
        InputError: where no cluster answers.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        _probe(cluster.address)
        with warnings.catch_warnings(), _same_signals():
            warnings.simplefilter("ignore")  # of Ray about its own settings
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as error:
        raise InputError(_describe_failure(cluster, error)) from None
    try:
        count_workers(ray, cluster)
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _same_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces: the program cleans up as without Ray."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _describe_failure(cluster: RayCluster, error: Exception) -> str:
    start = f"start one with ray start --head, or give {option('address', 'HOST:PORT')}"
    if cluster.address == "auto" and isinstance(error, ConnectionError):
        return f"{option('engine', 'ray')}: this machine belongs to no Ray cluster: {start}"
    return f"{option('address', cluster.address)}: no Ray cluster answers there ({first_sentence(error)}): {start}"


def _probe(address: str) -> None:
    """Raise OSError if nothing listens at an address: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error of Ray's, which has many lines."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:") or type(error).__name__


def count_workers(ray: Any, cluster: RayCluster) -> int:
    """Return the number of workers that the cluster has room for, at most the number asked for.

    Raises :class:`~merging.errors.OptionError` if there is room for none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed = cluster.resources
    room = sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in needed.items()) for node in nodes)
    if room == 0:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
        there = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in needed) for node in nodes)
        raise OptionError(
            f"{option('engine', 'ray')}: no node of the cluster has room for a worker of {wanted}: its nodes have "
            f"{there or 'nothing'}: set {option('worker_cpus')}, {option('worker_gpus')} or {option('max_memory')}"
        )
    return room if cluster.workers is None else min(room, cluster.workers)
