"""The settings of a Ray cluster: where it is, and the share of it that a worker takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from merging.errors import OptionError, nearest, option
from merging.type_checks import check_fields

__all__ = ["ENGINES", "RayCluster", "make_cluster"]

ENGINES = ("local", "ray")
"""The names of engines: threads of this process, or a Ray cluster."""

_ADDRESS = re.compile(r"auto|[^\s/:]+:\d+|\[[0-9a-fA-F:]+\]:\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """A Ray cluster, and its use.

    Attributes:
        address: ``HOST:PORT`` of the head, or ``auto`` for the cluster that this machine belongs to.
        workers: the most workers at a time; by default as many as there is room for.
        worker_cpus: the processors of one worker. It merges with as many threads, at least one.
        worker_gpus: the GPUs of one worker; a fraction if several workers share one.
        memory: the bytes of memory that one worker takes, as Ray reserves them; None to reserve none.
        tries: the number of deaths of its worker after which a task fails.
    """

    address: str = "auto"
    workers: int | None = None
    worker_cpus: float = 1
    worker_gpus: float = 0
    memory: int | None = None
    tries: int = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if not _ADDRESS.fullmatch(self.address):
            raise OptionError(f"{option('address', self.address)}: write HOST:PORT, or auto")
        for name, count in (("workers", self.workers), ("tries", self.tries), ("memory", self.memory)):
            if count is not None and count < 1:
                raise OptionError(f"{option(name, count)}: at least one is needed")
        if not isfinite(self.worker_cpus) or self.worker_cpus <= 0:
            raise OptionError(f"{option('worker_cpus', self.worker_cpus)}: write a number above 0")
        if (
            not isfinite(self.worker_gpus)
            or self.worker_gpus < 0
            or (self.worker_gpus > 1 and self.worker_gpus != int(self.worker_gpus))
        ):
            raise OptionError(f"{option('worker_gpus', self.worker_gpus)}: write a fraction of one GPU, or whole GPUs")

    @property
    def threads(self) -> int:
        """The threads of one worker."""
        return max(1, int(self.worker_cpus))

    @property
    def resources(self) -> dict[str, float]:
        """The resources of one worker, by Ray's names of them."""
        found: dict[str, float] = {"CPU": self.worker_cpus}
        if self.worker_gpus:
            found["GPU"] = self.worker_gpus
        if self.memory:
            found["memory"] = self.memory
        return found


def make_cluster(engine: str | RayCluster, address: str | None = None, **settings: float | None) -> RayCluster | None:
    """Return the cluster of an engine's options; None for the engine ``local``.

    Args:
        engine: ``local``, ``ray``, or a cluster with its settings.
        address: the address of the cluster, if ``engine`` does not state it.
        **settings: fields of :class:`RayCluster`, or None where the default holds.

    Raises:
        OptionError: for another engine, and for settings of a cluster without one.
    """
    stated: dict[str, Any] = {
        name: value for name, value in {"address": address, **settings}.items() if value is not None
    }
    if isinstance(engine, RayCluster):
        return replace(engine, **stated)
    if engine not in ENGINES:
        raise OptionError(f"{option('engine', str(engine))}: use local or ray{nearest(str(engine), ENGINES)}")
    if engine == "ray":
        return RayCluster(**stated)
    if stated:
        raise OptionError(f"{option(next(iter(stated)))} is a setting of a cluster: add {option('engine', 'ray')}")
    return None
