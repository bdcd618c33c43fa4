"""Packing the changes of a full model from its base, tensor by tensor."""

from __future__ import annotations

from math import prod
from typing import Literal

from merging.compression.assembly import Assembly, Losses, as_read
from merging.compression.bands import pack_factors, pack_pruned, truncate_to_bands
from merging.compression.settings import PackSettings
from merging.compression.ternary import pack_signs
from merging.display.progress import Progress
from merging.engine.tiles import Tiler
from merging.errors import InputError
from merging.geometry.alignment import align, read_change
from merging.maths.lazy_torch import Tensor, torch
from merging.plan import Item, Plan
from merging.sources import Checkpoint
from merging.sources.packs import Changed, Described
from merging.sources.packs.codings import Bands, Raw, Sparse, Ternary
from merging.sources.tied_weights import is_head

__all__ = ["model_plan", "pack_model"]

_KINDS: dict[str, Literal["linear", "conv", "experts"]] = {"matrix": "linear", "conv": "conv", "experts": "experts"}


def model_plan(model: Checkpoint, base: Checkpoint, progress: Progress | None = None) -> Plan:
    """Return the tensors of a model with those in its base, by the base's names.

    Raises :class:`~merging.errors.InputError` for models that do not hold the same tensors.
    """
    plan = align([model], base=base, progress=progress)
    if plan.untied:
        raise InputError(
            f"{model.path}: has an output head of its own where its base uses the embedding, and a pack holds changes "
            f"of tensors that the base has"
        )
    return plan


def pack_model(
    plan: Plan, settings: PackSettings, assembly: Assembly, device: torch.device, progress: Progress | None = None
) -> tuple[Losses, dict[str, Changed], int]:
    """Code the changes of a plan's tensors into an assembly. Return the losses, the tensors, and their entries.

    Raises :class:`~merging.errors.InputError` for values that are not finite.
    """
    losses, changed, entries, done = Losses(), dict[str, Changed](), 0, 0
    tiler = Tiler(plan, device)
    for item in plan.items:
        name = item.site.name
        delta = read_change(tiler, item, 0).dense().float()
        if not bool(delta.isfinite().all()):
            raise InputError(f"{plan.models[0].path}: {name} holds NaN or infinite values: repair the model first")
        norm = float(delta.double().square().sum())
        if norm:
            changed[name], after = _pack(item, delta, settings, assembly)
            losses.add(name, float((delta.double() - after.to(delta)).square().sum()), norm)
            entries += item.numel
        done += item.read_bytes
        if progress:
            progress(done, plan.read_bytes)
    if not changed:
        raise InputError(f"{plan.models[0].path}: is its base: there is no change to pack")
    return losses, changed, entries


def _pack(item: Item, delta: Tensor, settings: PackSettings, assembly: Assembly) -> tuple[Changed, Tensor]:
    """Code one change. Return how it is stored, and its decoded values."""
    name, shape, kind = item.site.name, item.site.shape, _KINDS.get(item.site.kind)
    if settings.method == "bands" and kind is not None and not is_head(name):
        transposed = kind == "linear" and item.site.axis == 0
        matrix = delta.mT if transposed else delta if kind == "experts" else delta.reshape(shape[0], -1)
        factors = truncate_to_bands(matrix.contiguous(), settings.bands)
        coded = pack_factors(factors.up, factors.down, settings.bands, matrix)
        up, down = (
            _add(assembly, f"{side}/{name}", tuple(factor.shape), *each)
            for side, factor, each in zip(("up", "down"), (factors.up, factors.down), coded, strict=True)
        )
        product = up.to(delta.device) @ down.to(delta.device)
        after = (product.mT if transposed else product).reshape(shape)
        return Changed(kind=kind, shape=shape, transposed=transposed), after
    if item.site.kind == "vector" or prod(shape) == max(shape, default=1):
        assembly.add(Described(name=f"full/{name}", kind="F32", shape=shape, coding=Raw()), delta.cpu())
        return Changed(kind="full", shape=shape), delta
    if settings.method == "ternary":
        _, signs, payload = pack_signs(delta.cpu(), "F32", settings)
        return Changed(kind="full", shape=shape), _add(assembly, f"full/{name}", shape, signs, payload)
    return Changed(kind="full", shape=shape), _add(
        assembly, f"full/{name}", shape, *pack_pruned(delta.cpu(), settings.density)
    )


def _add(
    assembly: Assembly, name: str, shape: tuple[int, ...], coding: Bands | Sparse | Ternary, payload: Tensor
) -> Tensor:
    """Add a coded tensor, and return its decoded values."""
    described = Described(name=name, kind="F32", shape=shape, coding=coding)
    assembly.add(described, payload)
    return as_read(described, payload).read()
