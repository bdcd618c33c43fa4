"""Weights files in memory: read, written unchecked, and harmed so that the file stays valid and its sense does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzzing.mutation import STRANGE, text_harmed

__all__ = ["BITS", "Weights", "harmed"]

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F16": 16,
    "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Every type of the format, and the bits of an element."""

_MOST = 20_000
"""Elements of a tensor that is made up."""


@dataclass(slots=True)
class Weights:
    """A safetensors file: dtype, shape and bytes of each tensor, and the metadata."""

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, data: bytes) -> Weights:
        """What a valid file holds."""
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = entry["dtype"], tuple(entry["shape"]), data[start + first : start + last]
        return cls(tensors, metadata)

    def header(self) -> dict[str, Any]:
        """Its header."""
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        end = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
            end += len(data)
        return header

    def data(self) -> bytes:
        """What lies behind the header."""
        return b"".join(data for _, _, data in self.tensors.values())

    def file(self) -> bytes:
        """The file."""
        return joined(json.dumps(self.header()).encode(), self.data())

    def pickled(self, path: Path) -> None:
        """The same as a file of PyTorch, as far as it has the types."""
        torch.save({name: _tensor(*entry) for name, entry in self.tensors.items()}, path)


def joined(header: bytes, data: bytes) -> bytes:
    """A file of a header as text and its data."""
    return len(header).to_bytes(8, "little") + header + data


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    kinds = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
        "I64": torch.int64,
    }
    kind = kinds.get(dtype, torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def harmed(random: Random, weights: Weights, names: Sequence[str] = ()) -> Weights:
    """Valid weights with one to three changes in names, shapes, types and values. ``names`` are pieces for names."""
    tensors = dict(weights.tensors)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not tensors:
            break
        name = random.choice(list(tensors))
        dtype, shape, data = tensors[name]
        kind = random.randrange(14)
        if kind == 0:
            del tensors[name]
        elif kind < 3:
            renamed = _renamed(random, name, [*tensors, *names])
            tensors[renamed] = tensors.pop(name)
        elif kind == 3:
            tensors[_renamed(random, name, [*tensors, *names])] = tensors[name]
        elif kind == 4:
            other = random.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif kind < 9:
            tensors[name] = _filled(random, dtype, _reshaped(random, shape))
        elif kind < 11:
            tensors[name] = _filled(random, random.choice(list(BITS)), shape)
        elif kind == 11:
            one = [n for n, (_, other, _) in tensors.items() if other == shape]
            size, at = random.choice((0, 1, 3, 7)), random.randrange(len(shape) + 1)
            for each in one:  # all of a kind at once: they still belong together
                tensors[each] = _filled(random, dtype, (*shape[:at], size, *shape[at + 1 :]))
        elif kind == 12:
            tensors[name] = dtype, shape, random.choice((b"\xff", b"\x7f", b"\0", b"\x80", b"\x01")) * len(data)
        else:
            tensors[name] = dtype, shape, random.randbytes(len(data))
    items = list(tensors.items())
    if random.random() < 0.1:
        random.shuffle(items)
    return Weights(dict(items), dict(weights.metadata))


def _renamed(random: Random, name: str, names: Sequence[str]) -> str:
    parts, kind = name.split("."), random.randrange(7)
    place = random.randrange(len(parts))
    if kind == 0:
        parts[place] = random.choice((*STRANGE, "0", "1", "99", "-1", "00", "weight", "bias", "default"))
    elif kind == 1:
        del parts[place]
    elif kind == 2:
        parts.insert(place, random.choice(parts))
    elif kind < 5:
        other = random.choice(names).split(".")
        cut = random.randrange(1, len(other) + 1)
        return ".".join([*parts[: place + 1], *other[-cut:]] if kind == 3 else [*other[:-cut], *parts[-place - 1 :]])
    elif kind == 5:
        return random.choice(names)
    else:
        return text_harmed(random, name)
    return ".".join(parts)


def _reshaped(random: Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes, kind = list(shape), random.randrange(9)
    at = random.randrange(len(sizes)) if sizes else 0
    if kind == 0 or not sizes:
        sizes.insert(random.randrange(len(sizes) + 1), random.choice((0, 1, 2, 3)))
    elif kind == 1:
        del sizes[at]
    elif kind == 2:
        random.shuffle(sizes)
    elif kind == 3:
        sizes[at] = random.choice((0, 1, 2, 3, 5, 64, 1000))
    elif kind == 4:
        sizes[at] = max(0, sizes[at] + random.choice((-1, 1)))
    elif kind == 5:
        sizes[at] *= random.choice((2, 3))
    elif kind == 6:
        sizes = [prod(sizes)]
    elif kind == 7:
        sizes = [*sizes, *([1] * random.choice((1, 3, 30)))]
    else:
        sizes = [0, *([random.choice((1, 2**31, 2**40))] * random.choice((1, 2)))]
    while prod(sizes) > _MOST:
        sizes[sizes.index(max(sizes))] = 3
    return tuple(sizes)


def _filled(random: Random, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bytes]:
    bits = BITS[dtype] * prod(shape)
    if bits % 8:
        dtype, bits = "U8", 8 * prod(shape)
    data = bytes(bits // 8)
    if data and random.random() < 0.7:
        data = (random.randbytes(min(len(data), 512)) * (len(data) // 512 + 1))[: len(data)]
        # numbers that are ordinary ones: the high byte of each is that of something near 1
        step = BITS[dtype] // 8
        if dtype in ("F32", "BF16", "F16", "F64"):
            high = bytes([0x3F if dtype != "F16" else 0x38]) * (len(data) // step)
            changed = bytearray(data)
            changed[step - 1 :: step] = high
            data = bytes(changed)
    return dtype, shape, data
