"""What a model or adapter file holds, told from its headers, and from its values if asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merging.layers import Stacks
from merging.sources import Adapter, Checkpoint, open_model
from merging.sources.derived import Derived
from merging.sources.packs.codings import Packed
from merging.sources.stored import Stored

__all__ = ["inspect"]


def inspect(path: str | Path, *, values: bool = False) -> dict[str, Any]:
    """Facts about what lies at ``path``: kind, base, rank, modules, dtypes, layers, size in bytes.

    Quantised weights of the simple kinds are told as the ordinary ones that ``--dequantise`` makes of them
    (``dequantised``: how many), tensors of packs as what they are read as (``packed_bytes``: what they take in the
    file). With ``values``, also which tensors hold NaN or infinities (``nonfinite``). Raises
    :class:`~merging.errors.MergingError` for what cannot be understood.
    """
    model = open_model(path, dequantise=True)
    return _adapter(model, values) if isinstance(model, Adapter) else _checkpoint(model, values)


def _adapter(adapter: Adapter, values: bool) -> dict[str, Any]:
    changes = [change for change in adapter.changes.values() if not change.optional]
    # what modules share stands in the file once
    shared = {id(t): (f"{change.target} [{i}]", t) for change in changes for i, t in enumerate(change.tensors)}
    tensors = dict(shared.values())
    modules = sorted({".".join(change.target.split(".")[:-1]).rpartition(".")[2] for change in changes})
    ranks = sorted({change.rank for change in changes if change.rank})
    return {
        "path": str(adapter.path),
        "kind": "pack of a model" if adapter.of_model else f"adapter ({adapter.dialect})",
        "about": adapter.about,
        "base": adapter.base,
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "scales": sorted({scale for change in changes if (scale := getattr(change, "scale", None)) is not None}),
        "targets": len(changes),
        "read_as": dict(Counter("factors" if change.low_rank else "full tensors" for change in changes)),
        "modules": modules,
        "needs_base": sorted({change.needs_base for change in changes if change.needs_base}),
        **_common(tensors, Stacks.from_names(adapter.changes, complete=False), values),
        "packed_bytes": _packed_bytes(tensors.values()),
        "notices": list(adapter.notices),
    }


def _packed_bytes(tensors: Iterable[Stored]) -> int | None:
    """What the tensors of a pack take in its file, None where they are none of a pack."""
    tensors = list(tensors)
    if not any(isinstance(stored, Packed) for stored in tensors):
        return None
    return sum(part.nbytes for stored in tensors for part in stored.made_of)


def _checkpoint(checkpoint: Checkpoint, values: bool) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "kind": "checkpoint",
        "architecture": next(iter(checkpoint.config.get("architectures") or []), None),
        "components": [name for name in checkpoint.components if name],
        "files": len(checkpoint.files),
        "dequantised": sum(isinstance(stored, Derived) for stored in checkpoint.tensors.values()),
        "parameters": sum(t.numel for t in checkpoint.tensors.values()),
        **_common(checkpoint.tensors, Stacks.from_names(checkpoint.tensors), values),
    }


def _common(tensors: dict[str, Stored], stacks: Stacks, values: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tensors": len(tensors),
        "dtypes": dict(Counter(stored.kind for stored in tensors.values()).most_common()),
        "layers": dict(stacks.lengths),
        "bytes": sum(stored.nbytes for stored in tensors.values()),
    }
    if values:
        facts["nonfinite"] = [name for name, stored in tensors.items() if stored.floating and not stored.finite()]
    return facts
