"""Prototypes for routing: what a server compares a token's activation with to choose among adapters, module by module.

The prototypes are exported; the routing itself belongs to the server that runs the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from merging.engine.download import download_model
from merging.errors import InputError, OptionError
from merging.hub.open_model import open_model
from merging.maths.delta import LowRank
from merging.maths.linalg import factored_svd
from merging.maths.sums import safe_ratio
from merging.plan.checks import check_bases
from merging.plan.names.targets import common_shape
from merging.sources import Adapter
from merging.sources.changes import Change
from merging.storage.output_tensor import OutputTensor
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.writer import TensorWriter
from merging.version import __version__

__all__ = ["Routed", "export_prototypes", "prototype"]

PrototypeKind = Literal["arrow", "spectr"]


@dataclass(frozen=True, slots=True)
class Routed:
    """What was exported: the file, how many modules and adapters it covers, and what was left out of it."""

    path: Path
    adapters: tuple[str, ...]
    modules: int
    notices: tuple[str, ...]


def prototype(delta: LowRank, kind: PrototypeKind, normalise: bool = False) -> Tensor:
    """What tells which inputs a change acts on, float32 ``[k, in]``; ``delta`` is that of a matrix ``[out, in]``.

    ``arrow`` (Ostapenko et al. 2024, arXiv 2405.11157): the leading right singular vector, ``k = 1``; a token's score
    is ``|v . x|``, so that its sign says nothing, and is chosen here such that its largest entry is positive.
    ``spectr``: the right singular vectors times their singular values, ``k = r``; the score is ``|P x| = |D x|``.
    Larger changes win there, unless ``normalise`` divides by the change's Frobenius norm.
    """
    _, values, vectors = factored_svd(delta.up, delta.down)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    if kind == "arrow":
        return vectors[:1].float() * bool(values[0] > 0)
    norm = float(values.norm())
    return (vectors * values[:, None]).float() * (safe_ratio(1.0, norm) if normalise else 1.0)


def export_prototypes(
    models: Sequence[str | Path],
    output: str | Path,
    *,
    kind: PrototypeKind = "arrow",
    normalise: bool = False,
    allow_different_bases: bool = False,
    overwrite: bool = False,
) -> Routed:
    """Write the prototypes of adapters into one safetensors file.

    Each module that some adapter changes by low-rank factors has a float32 tensor ``MODULE.prototypes`` ``[adapters, k,
    in]``, zeros where an adapter does not change it or has a smaller rank. The metadata name the ``kind``, the
    ``adapters`` in their order, and the ``ranks``. Convolutions, experts and what is changed in full are left out, with
    a notice. Raises :class:`~merging.errors.InputError` for what is no adapter, for adapters that state different bases
    (unless ``allow_different_bases``), and :class:`~merging.errors.OptionError` for a choice that makes no sense.
    """
    if kind not in ("arrow", "spectr"):
        raise OptionError(f"kind = {kind}: arrow or spectr")
    if normalise and kind == "arrow":
        raise OptionError("prototypes of arrow have length 1 already: leave --normalize out")
    if len(models) < 2:
        raise OptionError(f"{len(models)} adapter: there is nothing to choose among, name two or more")
    names = [str(model) for model in models]
    destination = Path(output)
    if destination.suffix != ".safetensors":
        raise OptionError(f"{output}: prototypes are one file: name it .safetensors")
    adapters = [_opened(model) for model in models]
    check_bases(adapters, allow_different_bases)
    modules, notices = _modules(adapters)
    width = {name: _prototype_shape(name, adapters, kind) for name in modules}
    outs = [OutputTensor(f"{_module(name)}.prototypes", "F32", (len(adapters), *width[name])) for name in modules]
    check_destination(
        destination, [file for each in adapters for file in each.files], sum(out.nbytes for out in outs), overwrite
    )
    ranks = [max(change.rank for change in adapter.changes.values()) for adapter in adapters]
    metadata = {
        "kind": kind,
        "adapters": json.dumps(names),
        "ranks": json.dumps(ranks),
        "normalised": str(normalise).lower(),
        "merging_version": __version__,
    }
    for adapter in adapters:
        download_model(adapter)
    with StagedOutput(destination, overwrite, True) as staged:
        writer = TensorWriter(staged.folder, destination.stem, outs, metadata, None)
        try:
            for name, out in zip(modules, outs, strict=True):
                stacked = torch.zeros(out.shape)
                for row, adapter in enumerate(adapters):
                    if name in adapter.changes:
                        found = prototype(_matrix(adapter, name), kind, normalise)
                        stacked[row, : len(found)] = found
                writer.write(out.name, stacked.flatten())
            writer.finish()
        finally:
            writer.close()
        staged.commit()
    return Routed(destination, tuple(names), len(modules), (*notices, *staged.notices))


def _opened(model: str | Path) -> Adapter:
    adapter = open_model(model)
    if not isinstance(adapter, Adapter):
        raise InputError(f"{model}: is a full model, and prototypes are those of adapters")
    for name, change in adapter.changes.items():
        if change.needs_base:
            raise InputError(
                f"{model}: {name}: {change.needs_base}, and prototypes are made of adapters alone: "
                f"make a LoRA of it first, with merge --method passthrough {model} --base BASE -o LORA"
            )
    return adapter


def _routable(change: Change) -> bool:
    return change.low_rank and change.kind == "linear" and len(change.shape) == 2


def _modules(adapters: Sequence[Adapter]) -> tuple[list[str], list[str]]:
    """The targets that prototypes are made of, and what is said of the others."""
    targets = sorted({name for adapter in adapters for name, change in adapter.changes.items() if _routable(change)})
    if not targets:
        raise InputError("no adapter changes a linear layer by low-rank factors: there is nothing to route by")
    notices = []
    for adapter in adapters:
        left = [name for name, change in adapter.changes.items() if not _routable(change)]
        if left:
            notices.append(
                f"{adapter.path}: {left[0]} and {len(left) - 1} others are no linear layers in factors: left out"
            )
    for name in targets:
        common_shape(name, [adapter.changes.get(name) for adapter in adapters], adapters)
    return targets, notices


def _matrix(adapter: Adapter, name: str) -> LowRank:
    """The factors of the matrix ``[out, in]``, also where the tensor is its transpose."""
    change = adapter.changes[name]
    delta = change.read(change.shape, _no_base, torch.float32)
    assert isinstance(delta, LowRank)
    if not (delta.up.isfinite().all() and delta.down.isfinite().all()):
        raise InputError(f"{adapter.path}: {name} holds NaN or infinite values")
    return delta


def _no_base() -> Tensor:
    raise InputError("a change that needs its base has no prototype")


def _prototype_shape(name: str, adapters: Sequence[Adapter], kind: PrototypeKind) -> tuple[int, int]:
    changes = [adapter.changes[name] for adapter in adapters if name in adapter.changes]
    inputs = changes[0].shape[0] if changes[0].is_transposed(changes[0].shape) else changes[0].shape[1]
    most = max(min(change.rank, *change.shape) for change in changes)
    return (1 if kind == "arrow" else most), inputs


def _module(name: str) -> str:
    return name.removesuffix(".weight")
