"""Prototypes for routing: a server compares a token's activation with them to choose an adapter, module by module.

The prototypes are exported; the server that runs the model does the routing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merging.display.notices import report_notices
from merging.display.tables import Displayed
from merging.engine.download import download_model
from merging.errors import InputError, OptionError, either, option
from merging.hub.open_model import open_model
from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import factored_svd
from merging.maths.sums import safe_ratio
from merging.plan.checks import check_bases
from merging.plan.names.targets import common_shape
from merging.sources import Adapter
from merging.sources.changes import Change
from merging.storage.output_tensor import OutputTensor
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.writer import TensorWriter
from merging.version import __version__, former_parameters

__all__ = ["Routed", "export_prototypes", "prototype"]

PrototypeKind = Literal["arrow", "spectr"]


@dataclass(frozen=True, slots=True, repr=False)
class Routed(Displayed):
    """The result of an export.

    Attributes:
        path: the file that was written.
        adapters: the names of the adapters, in their order.
        modules: the number of modules that have prototypes.
        notices: remarks on modules without prototypes.
    """

    path: Path
    adapters: tuple[str, ...]
    modules: int
    notices: tuple[str, ...]


@former_parameters({"normalise": "normalize"})
def prototype(delta: LowRank, kind: PrototypeKind, normalize: bool = False) -> Tensor:
    """Return the prototype of a change, float32 ``[k, in]``: it shows which inputs the change acts on.

    ``arrow`` (Ostapenko et al. 2024, arXiv 2405.11157): the leading right singular vector, ``k = 1``. A token's score
    is ``|v . x|``, so the sign means nothing; it is chosen such that the largest entry is positive.
    ``spectr``: the right singular vectors times their singular values, ``k = r``. The score is ``|P x| = |D x|``.

    Args:
        delta: the change of a matrix ``[out, in]``.
        kind: ``arrow`` or ``spectr``.
        normalize: whether a ``spectr`` prototype is divided by the change's Frobenius norm; else larger changes win.
    """
    _, values, vectors = factored_svd(delta.up, delta.down)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    if kind == "arrow":
        return vectors[:1].float() * bool(values[0] > 0)
    norm = float(values.norm())
    return (vectors * values[:, None]).float() * (safe_ratio(1.0, norm) if normalize else 1.0)


@former_parameters({"normalise": "normalize"})
def export_prototypes(
    models: Sequence[str | Path],
    output: str | Path,
    *,
    kind: PrototypeKind = "arrow",
    normalize: bool = False,
    allow_different_bases: bool = False,
    overwrite: bool = False,
) -> Routed:
    """Write the prototypes of adapters into one safetensors file.

    Each module that some adapter changes by low-rank factors has a float32 tensor ``MODULE.prototypes`` of shape
    ``[adapters, k, in]``, with zeros where an adapter does not change it or has a smaller rank. The metadata name the
    ``kind``, the ``adapters`` in their order, and the ``ranks``. Convolutions, experts and full changes are left out,
    with a notice.

    Args:
        models: the adapters, two or more: paths, or names on the Hub.
        output: the file, named ``.safetensors``.
        kind: ``arrow`` or ``spectr`` (see :func:`prototype`).
        normalize: whether ``spectr`` prototypes are divided by the norms of the changes.
        allow_different_bases: whether adapters may state different bases.
        overwrite: whether a file that exists is replaced.

    Returns:
        The path, the adapters, the number of modules, and remarks.

    Raises:
        InputError: for models that are no adapters, and adapters that state different bases.
        OptionError: for options that do not fit together.
    """
    if kind not in ("arrow", "spectr"):
        raise OptionError(f"kind = {kind}: arrow or spectr")
    if normalize and kind == "arrow":
        raise OptionError(f"prototypes of arrow have length 1 already: leave {option('normalize', True)} out")
    if len(models) < 2:
        raise OptionError(f"{len(models)} adapter: there is nothing to choose among, name two or more")
    names = [str(model) for model in models]
    destination = Path(output)
    if destination.suffix != ".safetensors":
        raise OptionError(f"{output}: prototypes are one file: name it .safetensors")
    adapters = [_open_adapter(model) for model in models]
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
        "normalised": str(normalize).lower(),
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
                        found = prototype(_matrix(adapter, name), kind, normalize)
                        stacked[row, : len(found)] = found
                writer.write(out.name, stacked.flatten())
            writer.finish()
        finally:
            writer.close()
        staged.commit()
    report_notices([*notices, *staged.notices])
    return Routed(destination, tuple(names), len(modules), (*notices, *staged.notices))


def _open_adapter(model: str | Path) -> Adapter:
    adapter = open_model(model)
    if not isinstance(adapter, Adapter):
        raise InputError(f"{model}: is a full model, and prototypes are made of adapters")
    for name, change in adapter.changes.items():
        if change.needs_base:
            passthrough = either(
                f"merge --method passthrough {model} --base BASE -o LORA",
                f'merge(["{model}"], method="passthrough", base=BASE, output=LORA)',
            )
            raise InputError(
                f"{model}: {name}: {change.needs_base}, and prototypes are made of adapters alone: "
                f"make a LoRA of it first, with {passthrough}"
            )
    return adapter


def _routable(change: Change) -> bool:
    return change.low_rank and change.kind == "linear" and len(change.shape) == 2


def _modules(adapters: Sequence[Adapter]) -> tuple[list[str], list[str]]:
    """Return the targets that get prototypes, and remarks on the others."""
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
    """Return the factors of the matrix ``[out, in]``, also where the tensor is its transpose."""
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
