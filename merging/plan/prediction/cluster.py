"""A cluster that a merge is predicted for, as people write it: ``nodes=8,gpus=1,disk=2GB/s,net=25Gb/s,price=2.5``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from merging.errors import OptionError, nearest
from merging.plan.sizes import parse_size

__all__ = ["Cluster", "parse_cluster"]

EXAMPLE = "nodes=8,gpus=1,disk=2GB/s,net=25Gb/s,price=2.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines that share the work of a merge; None for the value of the calibrated machine, or for no limit.

    Attributes:
        nodes: the number of machines.
        cores: the processor cores of a node.
        gpus: the GPUs of a node; with any, they compute instead of the cores.
        memory: the memory of a node in bytes.
        disk: the bytes a second that a node reads from its storage, and writes to it.
        net: the bytes a second of a node's network, through which several nodes read and write.
        storage: the bytes a second that all nodes together get from shared storage.
        price: the price of a node for an hour, in any currency.
    """

    nodes: int = 1
    cores: int | None = None
    gpus: int = 0
    memory: int | None = None
    disk: float | None = None
    net: float | None = None
    storage: float | None = None
    price: float | None = None

    def rate(self, disk: float) -> float:
        """Return the bytes a second that each node gets of its storage; ``disk`` is the rate where none is stated."""
        limits = [self.disk or disk]
        if self.nodes > 1 and self.net is not None:
            limits.append(self.net)
        if self.storage is not None:
            limits.append(self.storage / self.nodes)
        return min(limits)


def parse_cluster(text: str) -> Cluster:
    """Return the cluster of a text such as ``nodes=8,disk=2GB/s``.

    Raises:
        OptionError: for a key that is unknown or given twice, and a value without its unit.
    """
    values: dict[str, Any] = {}
    known = [field.name for field in fields(Cluster)]
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (each.strip() for each in part.partition("="))
        if key not in known:
            hint = nearest(key, known) or f": the keys are {', '.join(known)}"
            raise OptionError(f"cluster: there is no key {key!r}{hint}")
        if not equals or not value:
            raise OptionError(f"cluster: {key} has no value: write {_FORMS[key][1]}")
        if key in values:
            raise OptionError(f"cluster: {key} is given twice: leave one of them out")
        parse, example = _FORMS[key]
        found = parse(value)
        if found is None:
            raise OptionError(f"cluster: {key} = {value!r}: write {example}")
        values[key] = found
    if not values:
        raise OptionError(f"cluster: {text!r} describes no machines: write {EXAMPLE}")
    return Cluster(**values)


def _count(text: str, least: int = 1) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= least else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None


def _size(text: str) -> int | None:
    """Return bytes; a number without a unit is none, as nobody has a node with 64 bytes of memory."""
    try:
        return parse_size(text) if re.search(r"[bB]$", text) else None
    except OptionError:
        return None


def _bandwidth(text: str) -> float | None:
    """Return bytes a second, of ``2GB/s`` in bytes or ``25Gb/s`` in bits."""
    found = re.fullmatch(r"([0-9.]+\s*[KMGTkmgt]?)(B|b|bit)(/s|ps)", text)
    size = _size(f"{found[1]}B") if found else None
    if found is None or size is None:
        return None
    return size / (1 if found[2] == "B" else 8)


_FORMS: dict[str, tuple[Callable[[str], float | int | None], str]] = {
    "nodes": (_count, "a number of machines, as nodes=8"),
    "cores": (_count, "a number of processor cores, as cores=32"),
    "gpus": (lambda text: _count(text, 0), "a number of GPUs of a node, as gpus=1"),
    "memory": (_size, "the memory of a node, as memory=64GB"),
    "disk": (_bandwidth, "bytes a second, as disk=2GB/s"),
    "net": (_bandwidth, "bits or bytes a second, as net=25Gb/s or net=3GB/s"),
    "storage": (_bandwidth, "bytes a second of all nodes together, as storage=20GB/s"),
    "price": (_number, "the price of a node for an hour, as price=2.5"),
}
"""How the value of each key is read, and how it is written."""
