"""Compress a model into a pack."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from merging.compression.adapters import adapter_file, pack_adapter
from merging.compression.assembly import Assembly, Losses
from merging.compression.calibration import Calibration, open_calibration
from merging.compression.models import model_plan, pack_model
from merging.compression.settings import PackSettings, make_settings
from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.display.tables import Displayed
from merging.engine.devices import supply_operations
from merging.engine.download import download_model
from merging.engine.resources import pick_device
from merging.errors import InputError, OptionError, OutputError, option
from merging.hub.open_model import open_base, open_model
from merging.maths.lazy_torch import torch
from merging.output.model_card import HUB_ID
from merging.plan.names.targets import adapter_targets
from merging.sources import Adapter, Checkpoint
from merging.sources.checkpoint import content_key
from merging.sources.packs import PackBase, PackManifest
from merging.sources.packs.codings import Raw
from merging.storage.staging import StagedOutput, check_destination
from merging.type_checks import check_types

__all__ = ["Compressed", "compress", "model_files"]


@dataclass(frozen=True, slots=True, repr=False)
class Compressed(Displayed):
    """The result of compressing a model.

    Attributes:
        path: The pack.
        kind: The kind of model that was packed.
        method: ``"ternary"`` or ``"bands"``.
        settings: The settings in words.
        bytes_before: The size of the model's files, in bytes.
        bytes_after: The size of the pack, in bytes.
        bits: Bits of the coded tensors, divided by the numbers that they replace.
        error: The relative error of all changes together (Frobenius norms).
        median: The median of the changes' relative errors.
        seconds: The time that it took.
        errors: The relative error of each change.
        output_error: The relative error of what the change adds to the layers' outputs on the examples of ``stats``,
            in all layers together; None without examples.
        plain_output_error: The same for a pack of this size without ``stats``.
        notices: Remarks.
    """

    path: Path
    kind: Literal["adapter", "model"]
    method: str
    settings: str
    bytes_before: int
    bytes_after: int
    bits: float
    error: float
    median: float
    seconds: float
    errors: dict[str, float] = field(default_factory=dict)
    output_error: float | None = None
    plain_output_error: float | None = None
    notices: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """The size of the model's files divided by the size of the pack."""
        return self.bytes_before / max(1, self.bytes_after)

    @property
    def worst(self) -> str:
        """The target with the largest relative error."""
        return max(self.errors, key=lambda target: self.errors[target], default="")

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path), "ratio": self.ratio, "worst": self.worst}


@check_types("progress")
def compress(
    model: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    method: Literal["ternary", "bands"] | None = None,
    density: float | None = None,
    coding: Literal["golomb", "bitmap"] | None = None,
    alpha: float | None = None,
    scale: Literal["least-squares", "norm"] | None = None,
    bands: str | None = None,
    stats: str | Path | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> Compressed:
    """Compress an adapter, or the changes of a full model from its base, into one small file.

    Args:
        model: The adapter or full model: a path or an address on the Hub.
        output: The file to write. Its suffix is ``.safetensors``.
        base: The base of a full model. With an adapter it is optional: its tensors must fit the adapter, and it is
            noted in the pack, so that merges with another base are refused.
        method: ``"ternary"`` (the default for adapters) keeps the signs of the largest entries of every tensor, at one
            scale. ``"bands"`` (the default for models) keeps leading singular directions in few bits; of embeddings
            and heads it keeps the largest entries, and vectors as they are.
        density: The share of entries that are kept; 0.2 by default.
        coding: The positions' code (ternary): ``"golomb"``, the default, or ``"bitmap"``.
        alpha: The scale in standard deviations (ternary), instead of ``scale``.
        scale: ``"least-squares"``, the default, is the mean magnitude of the kept entries. ``"norm"`` increases it so
            that every change keeps its norm (ternary).
        bands: Counts of directions and their bits (bands), such as ``"20@8,180@4,*@2"``.
        stats: A file with statistics of the model on a few examples (bands), from
            :func:`~merging.collect_statistics`: the layers' outputs on these are kept as well as the bits allow.
        device: The device that computes.
        overwrite: Whether an existing output is replaced.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.

    Returns:
        The path, sizes and errors of the pack.

    Raises:
        merging.errors.MergingError: For models that cannot be packed, and for wrong options. Nothing is written then.

    Example:
        >>> import merging
        >>> pack = merging.compress("a", "a-packed.safetensors")
        >>> f"{pack.ratio:.0f} times smaller"
        '18 times smaller'
    """
    destination, start = Path(output), time.monotonic()
    progress = resolve_progress(progress, "compressing")
    opened = open_model(model)
    full = None if base is None else open_base(base, option("base"))
    kind: Literal["adapter", "model"] = "adapter" if isinstance(opened, Adapter) else "model"
    settings = make_settings(kind, method=method, density=density, coding=coding, alpha=alpha, scale=scale, bands=bands)
    calibration = None
    if stats is not None:
        if settings.method != "bands":
            raise OptionError(
                f"{option('stats')} is for packs by bands: use {option('method', 'bands')}, or leave it out"
            )
        calibration = open_calibration(stats, opened)
        settings = replace(settings, summary=f"{settings.summary}, {calibration.summary}")
    _check_pack(destination)
    read = (*model_files(opened, full), *([calibration.file.path] if calibration else []))
    check_destination(destination, read, 0, overwrite)
    if isinstance(opened, Adapter) and full is not None:
        adapter_targets([opened], full)
    download_model(opened, progress)
    if full is not None:
        download_model(full, progress)
    before = sum(path.stat().st_size for path in opened.files)
    with StagedOutput(destination, overwrite, True) as staged:
        assembly = Assembly(staged.folder)
        try:
            if isinstance(opened, Adapter):
                contents = _pack_adapter(opened, full, settings, assembly, calibration)
            else:
                contents = _pack_model(
                    opened, full, settings, assembly, calibration=calibration, device=device, progress=progress
                )
            remarks = calibration.notices() if calibration else []
            facts = calibration.header if calibration else {}
            after = assembly.write(destination.stem, contents.manifest, facts)
        finally:
            assembly.close()
        staged.commit()
    notices = (*contents.notices, *remarks, *staged.notices)
    output_error, plain_output_error = contents.losses.output_errors
    report_notices(notices)
    return Compressed(
        path=destination,
        kind=kind,
        method=settings.method,
        settings=settings.summary,
        bytes_before=before,
        bytes_after=after,
        bits=8 * assembly.coded_bytes / max(1, contents.entries),
        error=contents.losses.overall,
        median=contents.losses.median,
        seconds=time.monotonic() - start,
        errors=contents.losses.relative,
        output_error=output_error,
        plain_output_error=plain_output_error,
        notices=notices,
    )


def _check_pack(destination: Path) -> None:
    if destination.suffix != ".safetensors":
        raise OutputError(f"{destination}: a pack is one file: give it a name that ends in .safetensors")
    if destination.stem == "adapter_model":
        raise OutputError(
            f"{destination}: is the name of an adapter of PEFT's, which a pack is not: choose another "
            f"{option('output')}"
        )


def model_files(*models: Adapter | Checkpoint | None) -> Iterable[Path]:
    """Return the paths and the files of models."""
    return (file for model in models if model for file in (model.path, *model.files))


@dataclass(frozen=True, slots=True)
class _PackContents:
    """The losses, the manifest and the number of coded entries of a pack, with remarks."""

    losses: Losses
    manifest: PackManifest
    entries: int
    notices: tuple[str, ...] = ()


def _pack_adapter(
    adapter: Adapter,
    base: Checkpoint | None,
    settings: PackSettings,
    assembly: Assembly,
    calibration: Calibration | None,
) -> _PackContents:
    file = adapter_file(adapter)
    losses, notices = pack_adapter(file, settings, assembly, calibration)
    noted = PackBase(name=adapter.base, revision=adapter.config.get("revision"))
    if base is not None:
        noted = noted.model_copy(update=_base(base).model_dump(exclude_none=True))
    manifest = PackManifest(
        method=settings.method,
        settings=settings.summary,
        base=noted,
        dialect=file.dialect.name,
        config=adapter.config if file.dialect.name == "PEFT" and adapter.config else None,
        metadata=file.metadata,
        tensors=tuple(assembly.described),
    )
    coded = [each for each in assembly.described if not isinstance(each.coding, Raw)]
    return _PackContents(losses, manifest, sum(prod(each.shape) for each in coded), tuple(notices))


def _pack_model(
    model: Checkpoint,
    base: Checkpoint | None,
    settings: PackSettings,
    assembly: Assembly,
    *,
    calibration: Calibration | None,
    device: str | torch.device,
    progress: Progress | None,
) -> _PackContents:
    if base is None:
        raise InputError(
            f"{model.path}: only the changes of a full model are packed: give its base with {option('base')}"
        )
    plan = model_plan(model, base)
    where = pick_device(device)
    with supply_operations(where):
        losses, changed, entries = pack_model(
            plan, settings, assembly, calibration=calibration, device=where, progress=progress
        )
    manifest = PackManifest(
        method=settings.method,
        settings=settings.summary,
        base=_base(base),
        tensors=tuple(assembly.described),
        changes=changed,
    )
    return _PackContents(losses, manifest, entries)


def _base(base: Checkpoint) -> PackBase:
    """Return a base's public name and the key of its content."""
    stated = base.config.get("_name_or_path")
    named = stated if isinstance(stated, str) and HUB_ID.fullmatch(stated) and not Path(stated).exists() else None
    key = content_key(base.tensors)
    if base.origin is not None:
        return PackBase(name=base.origin.repo, revision=base.origin.commit, key=key)
    return PackBase(name=named, key=key)
