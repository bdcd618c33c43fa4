"""What a model or adapter file holds, told from its headers, and from its values if asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.maths.layers import Stacks
from merging.serving.contents import FILES
from merging.serving.subject import Subject, open_subject
from merging.sources import Adapter, Checkpoint
from merging.sources.derived import Derived
from merging.sources.packs.codings import Packed
from merging.sources.small_files import parse_json
from merging.sources.stored import Stored
from merging.sources.tied_weights import WITH_HEAD, embeddings_among, is_head, text_config

__all__ = ["inspect"]

_FLAT = re.compile(r"(lora_[a-z]+[0-9]?|lycoris|oft_unet)_(?:.*_[0-9]+_)?(.+)")
"""A flat name of Kohya's: the component, and what comes behind the last number."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configs call the number of experts in a block."""


def inspect(path: str | Path, *, values: bool = False) -> dict[str, Any]:
    """Facts about what lies at ``path``: kind, base, rank, modules, dtypes, layers, size in bytes, what is odd.

    Quantised weights of the simple kinds are told as the ordinary ones that ``--dequantize`` makes of them
    (``dequantised``: how many; ``quantised``: of what type they are on the disk), tensors of packs as they are read
    (``packed_bytes``: what they take in the file). What came out of a merge says of which (``merged_by``,
    ``merged_from``). ``notices`` are sentences for people. With ``values``, also which tensors hold NaN or infinities
    (``nonfinite``). Raises :class:`~merging.errors.MergingError` for what cannot be understood.
    """
    model = open_model(path, dequantize=True)
    subject = open_subject(str(model.origin or path), None, None, False)
    return _adapter(model, subject, values) if isinstance(model, Adapter) else _checkpoint(model, subject, values)


def _adapter(adapter: Adapter, subject: Subject, values: bool) -> dict[str, Any]:
    changes = [change for change in adapter.changes.values() if not change.optional]
    # what modules share stands in the file once
    shared = {id(t): (f"{change.target} [{i}]", t) for change in changes for i, t in enumerate(change.tensors)}
    tensors = dict(shared.values())
    modules = [change.target.rpartition(".")[0] or change.target for change in changes]
    flat = [_FLAT.fullmatch(module) for module in modules]
    parts = Counter(
        found[1] if found else module.partition(".")[0] for found, module in zip(flat, modules, strict=True)
    )
    ranks = sorted({change.rank for change in changes if change.rank})
    return {
        "path": str(adapter.path),
        "kind": "pack of a model" if adapter.of_model else f"adapter ({adapter.dialect})",
        "about": adapter.about,
        "base": adapter.base,
        **_origin(subject),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "scales": sorted({scale for change in changes if (scale := getattr(change, "scale", None)) is not None}),
        "targets": len(changes),
        "parts": dict(parts) if adapter.dialect in ("Kohya", "diffusers") else {},
        "read_as": dict(Counter("factors" if change.low_rank else "full tensors" for change in changes)),
        "modules": sorted({f[2] if f else m.rpartition(".")[2] for f, m in zip(flat, modules, strict=True)}),
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


def _checkpoint(checkpoint: Checkpoint, subject: Subject, values: bool) -> dict[str, Any]:
    config, tensors = checkpoint.config, checkpoint.tensors
    derived = [stored for stored in tensors.values() if isinstance(stored, Derived)]
    embeddings = embeddings_among(tensors)
    return {
        "path": str(checkpoint.path),
        "kind": "checkpoint",
        "architecture": next(iter(config.get("architectures") or []), None) or subject.stated.get("_class_name"),
        "type": config.get("model_type"),
        "library": checkpoint.library if subject.config is not None else None,
        "components": [name for name in checkpoint.components if name],
        **_origin(subject),
        "files": len(checkpoint.files),
        "format": "safetensors" if checkpoint.files[0].suffix == ".safetensors" else "PyTorch",
        "quantised": dict(Counter(stored.made_of[0].dtype_name for stored in derived)),
        "dequantised": len(derived),
        "experts": next((n for key in _EXPERTS if isinstance(n := text_config(config).get(key), int)), None),
        "parameters": sum(stored.numel for stored in tensors.values()),
        "vocabulary": tensors[embeddings[0]].shape[0] if len(embeddings) == 1 else None,
        "head": _head(checkpoint) if embeddings else None,
        **_common(tensors, Stacks.from_names(tensors), values),
        "bytes": sum({id(part): part.nbytes for stored in tensors.values() for part in stored.made_of}.values()),
        "notices": [
            *(["its weights are quantised, and read with --dequantize alone"] if derived else []),
            *(f"{each.what}: {each.where[0]}" for each in FILES.findings(subject) if each.severity != "ok"),
        ],
    }


def _head(checkpoint: Checkpoint) -> str | None:
    """What maps back to tokens, in a model whose names or config tell."""
    head = next((name for name in checkpoint.tensors if is_head(name)), None)
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    return head or ("tied to the embedding" if checkpoint.tied and architecture.endswith(WITH_HEAD) else None)


def _origin(subject: Subject) -> dict[str, Any]:
    """The method and the models of the merge that it came out of, by the recipe in its header."""
    try:
        recipe = parse_json(subject.metadata.get("merging_recipe", "{}"), "its recipe")
        models = [each if isinstance(each, str) else str(each["model"]) for each in recipe.get("models", [])]
        return {"merged_by": recipe.get("method"), "merged_from": models}
    except (FormatError, KeyError, TypeError):
        return {"merged_by": None, "merged_from": []}


def _common(tensors: dict[str, Stored], stacks: Stacks, values: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tensors": len(tensors),
        "dtypes": dict(Counter(stored.dtype_name for stored in tensors.values()).most_common()),
        "layers": dict(stacks.lengths),
        "bytes": sum(stored.nbytes for stored in tensors.values()),
    }
    if values:
        facts["nonfinite"] = [name for name, stored in tensors.items() if stored.floating and not stored.finite()]
    return facts
