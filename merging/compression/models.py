"""Packing the changes of a full model from its base, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal

from merging.compression.assembly import Assembly, Losses, as_read
from merging.compression.bands import FactorCodings, pack_factors, pack_pruned, truncate_to_bands
from merging.compression.calibration import Calibration, choose_codings, damp
from merging.compression.settings import PackSettings
from merging.compression.ternary import pack_signs
from merging.display.progress import Progress
from merging.engine.tiles import Tiler
from merging.errors import InputError
from merging.geometry.alignment import align, read_change
from merging.maths.delta import LowRank
from merging.maths.layer_statistics import InputGram
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
    plan: Plan,
    settings: PackSettings,
    assembly: Assembly,
    *,
    calibration: Calibration | None,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[Losses, dict[str, Changed], int]:
    """Code the changes of a plan's tensors into an assembly. Return the losses, the tensors, and their entries.

    Raises :class:`~merging.errors.InputError` for values that are not finite.
    """
    packer = _Packer(settings=settings, assembly=assembly, calibration=calibration)
    changed, entries, done = dict[str, Changed](), 0, 0
    tiler = Tiler(plan, device)
    for item in plan.items:
        name = item.site.name
        delta = read_change(tiler, item, 0).dense().float()
        if not bool(delta.isfinite().all()):
            raise InputError(f"{plan.models[0].path}: {name} holds NaN or infinite values: repair the model first")
        norm = float(delta.double().square().sum())
        if norm:
            changed[name], after = packer.pack(item, delta)
            packer.losses.add(name, float((delta.double() - after.to(delta)).square().sum()), norm)
            entries += item.numel
        done += item.read_bytes
        if progress:
            progress(done, plan.read_bytes)
    if not changed:
        raise InputError(f"{plan.models[0].path}: is its base: there is no change to pack")
    return packer.losses, changed, entries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Packer:
    """Codes changes into an assembly, and keeps their losses."""

    settings: PackSettings
    assembly: Assembly
    calibration: Calibration | None
    losses: Losses = field(default_factory=Losses)

    def pack(self, item: Item, delta: Tensor) -> tuple[Changed, Tensor]:
        """Code one change. Return how it is stored, and its decoded values."""
        name, shape, kind = item.site.name, item.site.shape, _KINDS.get(item.site.kind)
        if self.settings.method == "bands" and kind is not None and not is_head(name):
            transposed = kind == "linear" and item.site.axis == 0
            matrix = delta.mT if transposed else delta if kind == "experts" else delta.reshape(shape[0], -1)
            gram = self._gram(item)
            factors, coded = self._code_matrix(name, matrix.contiguous(), gram)
            up, down = (
                self._add(f"{side}/{name}", tuple(factor.shape), *each)
                for side, factor, each in zip(("up", "down"), (factors.up, factors.down), coded, strict=True)
            )
            product = up.to(delta.device) @ down.to(delta.device)
            after = (product.mT if transposed else product).reshape(shape)
            return Changed(kind=kind, shape=shape, transposed=transposed), after
        if item.site.kind == "vector" or prod(shape) == max(shape, default=1):
            self.assembly.add(Described(name=f"full/{name}", kind="F32", shape=shape, coding=Raw()), delta.cpu())
            return Changed(kind="full", shape=shape), delta
        coding: Sparse | Ternary
        if self.settings.method == "ternary":
            _, coding, payload = pack_signs(delta.cpu(), "F32", self.settings)
        else:
            coding, payload = pack_pruned(delta.cpu(), self.settings.density)
        return Changed(kind="full", shape=shape), self._add(f"full/{name}", shape, coding, payload)

    def _gram(self, item: Item) -> InputGram | None:
        """Return the Gram matrix of a layer's inputs, if it is a matrix and the examples are used."""
        if self.calibration is None or item.site.kind != "matrix":
            return None
        return self.calibration.find(item.site.name, item.site.shape[item.site.axis])

    def _code_matrix(self, name: str, matrix: Tensor, gram: InputGram | None) -> tuple[LowRank, FactorCodings]:
        """Return factors of a matrix ``[out, in]`` or ``[n, out, in]``, and their codings."""
        bands = self.settings.bands
        factors = truncate_to_bands(matrix, bands)
        coded = pack_factors(factors.up, factors.down, bands, matrix)
        if gram is None:
            return factors, coded
        gram, exact = gram.to(matrix.device), matrix.double()
        damped = damp(gram)
        leading = truncate_to_bands(matrix, bands, damped)
        calibrated = pack_factors(leading.up, leading.down, bands, matrix, damped)

        def energy(up: Tensor, down: Tensor) -> float:
            return gram.energy(exact - (up @ down).to(exact))

        coded, self.losses.outputs[name] = choose_codings(coded, calibrated, energy, gram.energy(exact))
        return factors, coded

    def _add(self, name: str, shape: tuple[int, ...], coding: Bands | Sparse | Ternary, payload: Tensor) -> Tensor:
        """Add a coded tensor, and return its decoded values."""
        described = Described(name=name, kind="F32", shape=shape, coding=coding)
        self.assembly.add(described, payload)
        return as_read(described, payload).read()
