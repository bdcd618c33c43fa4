"""The connection to a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from merging.cluster.settings import RayCluster
from merging.display.tables import format_size
from merging.errors import InputError, OptionError, option

__all__ = ["connect", "count_workers", "first_sentence", "import_ray", "probe"]

_PATIENCE = 10.0
"""Seconds in which a cluster answers."""

_SETTINGS = b"\4"
"""The type of the first frame of each side of HTTP/2, on which gRPC and so Ray's head are built."""

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)
"""The first bytes of a client of HTTP/2: what all send, and empty settings."""

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
        probe(cluster.address)
        with warnings.catch_warnings(), _same_signals():
            warnings.simplefilter("ignore")  # of Ray about its own settings
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as error:  # Ray raises errors of many kinds, and gRPC's own
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
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _describe_failure(cluster: RayCluster, error: Exception) -> str:
    start = f"start one with ray start --head, or give {option('address', 'HOST:PORT')}"
    if cluster.address == "auto" and isinstance(error, ConnectionError):
        return f"{option('engine', 'ray')}: this machine belongs to no Ray cluster: {start}"
    return f"{option('address', cluster.address)}: no Ray cluster answers there ({first_sentence(error)}): {start}"


def probe(address: str) -> None:
    """Raise OSError if no Ray listens at an address, for which Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host:
        return
    with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.settimeout(_PATIENCE)
        try:
            connection.sendall(_GREETING)
            answer = connection.recv(9)
        except OSError:
            answer = b""
    if answer[3:4] != _SETTINGS:
        raise OSError("another program listens there")


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
        wanted = _describe_resources(needed)
        there = "; ".join(_describe_resources({name: node.get(name, 0) for name in needed}) for node in nodes)
        raise OptionError(
            f"{option('engine', 'ray')}: no node of the cluster has room for a worker of {wanted}: its nodes have "
            f"{there or 'nothing'}: set {option('worker_cpus')}, {option('worker_gpus')} or {option('max_memory')}"
        )
    return room if cluster.workers is None else min(room, cluster.workers)


def _describe_resources(amounts: Mapping[str, float]) -> str:
    """Return the words for resources by Ray's names of them: memory is in bytes, others are numbers of devices."""
    return ", ".join(
        f"{format_size(int(amount))} of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in amounts.items()
    )
