"""Merges of all kinds of work, for processes that try to disturb them: run as ``python -m support.stress``.

Prints a digest of each output as JSON. Tiles and units are small, so that threads share every tensor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import merging
from merging.api import report_page
from merging.engine import probe, tiles, unit
from merging.engine.pieces import _Piece
from merging.engine.probe import Probe
from merging.engine.tiles import Tiler
from merging.storage.writer import TensorWriter

__all__ = ["CASES", "digests", "make_tiles_small", "poison_buffers"]

TILE, CHUNK = 1 << 10, 1 << 12

CASES: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "linear": lambda at: {"models": _tuned(at), "method": "linear"},
    "ties": lambda at: {"models": _tuned(at), "method": "ties", "base": at / "base", "density": 0.4},
    "dare_ties": lambda at: {"models": _tuned(at), "method": "dare_ties", "base": at / "base", "drop": 0.5},
    "lines+slerp": lambda at: {"models": _tuned(at)[:2], "method": "lines+slerp", "base": at / "base"},
    "model_stock": lambda at: {"models": _tuned(at), "method": "model_stock", "base": at / "base"},
    "tsv": lambda at: {"models": _tuned(at), "method": "tsv", "base": at / "base"},
    "journal": lambda at: {"models": _tuned(at), "method": "pcb", "base": at / "base", "resume": True},
    "adapter of models": lambda at: {
        "models": _tuned(at), "method": "task_arithmetic", "base": at / "base", "kind": "adapter", "rank": 3,
    },
    "extract": lambda at: {
        "models": _tuned(at)[:1], "method": "passthrough", "base": at / "base", "kind": "adapter",
        "rank": {"energy": 0.8},
    },
    "quantized": lambda at: {"models": _tuned(at), "method": "ties", "base": at / "base", "quantize": "fp8-channel"},
    "shards": lambda at: {"models": _tuned(at), "method": "karcher", "shard_size": 20_000, "dtype": "float16"},
    "stages": lambda at: {
        "models": [merging.Recipe(models=_tuned(at)[:2], method="ties", base=at / "base"), _tuned(at)[2]],
        "method": "linear",
    },
    "adapters": lambda at: {"models": _adapters(at), "method": "lines+linear"},
    "adapters in full": lambda at: {"models": _adapters(at), "method": "ties", "rank": 2},
    "baked": lambda at: {"models": _adapters(at), "method": "slerp", "base": at / "loras" / "base", "kind": "model"},
}  # fmt: skip
"""The arguments of each merge, of the models in a folder."""


def _tuned(folder: Path) -> list[Path]:
    return [folder / f"tuned{number}" for number in range(3)]


def _adapters(folder: Path) -> list[Path]:
    return [folder / "loras" / f"adapter{number}" for number in range(2)]


def make_tiles_small() -> None:
    """Cut tensors of a few thousand elements into several units of several tiles."""
    tiles.TILE, tiles.CHUNK, unit.TILE = TILE, CHUNK, TILE  # type: ignore[attr-defined]
    probe._PIECE = 1 << 9


def poison_buffers() -> None:
    """Overwrite shared buffers with NaN as soon as their contents may not be used any more."""
    for reader in (Tiler, Probe):
        _poison_before(reader)

    write, begin = TensorWriter.write, _Piece.begin

    def write_and_poison(self: TensorWriter, name: str, values: Tensor, start: int = 0) -> None:
        write(self, name, values, start)
        _fill(values)

    def poison_and_begin(self: _Piece, first: int, size: int, dtype: torch.dtype) -> None:
        if hasattr(self, "values"):
            _fill(self.values)
        begin(self, first, size, dtype)

    TensorWriter.write = write_and_poison  # type: ignore[method-assign]
    _Piece.begin = poison_and_begin  # type: ignore[method-assign]


def _poison_before(reader: Any) -> None:
    """Overwrite a buffer when it is requested again, and hand out another: the last user has no right to it then."""
    request = reader._buffer

    def poison(self: Any, *arguments: Any, **options: Any) -> Tensor:
        buffer: Tensor = request(self, *arguments, **options)
        for key, whole in self._buffers.items():
            if whole.data_ptr() == buffer.data_ptr():
                _fill(whole)
                other: Tensor = whole.clone()
                self._buffers[key] = other
                return other[: len(buffer)]
        return buffer

    reader._buffer = poison


def _fill(values: Tensor) -> None:
    values.view(torch.uint8).fill_(0xFF)  # NaN in every type of floating point


def digests(folder: Path, threads: int) -> dict[str, str]:
    """Merge all cases, and return a digest of the weights of each."""
    found = {}
    for name, make in CASES.items():
        out = folder / "out"
        options = {**make(folder), "output": out, "report": folder / "r.html"}
        merging.merge(options.pop("models"), overwrite=True, threads=threads, **options)
        digest = hashlib.sha256()
        for file in sorted(out.glob("*.safetensors")):
            digest.update(file.read_bytes())
        found[name] = digest.hexdigest()
    return found


if __name__ == "__main__":
    make_tiles_small()
    report_page.find_spec = lambda name: None  # type: ignore[assignment]  # pictures take longer than these merges
    if sys.argv[3] == "disturbed":
        poison_buffers()
        sys.setswitchinterval(1e-6)
    print(json.dumps(digests(Path(sys.argv[1]), int(sys.argv[2]))))
