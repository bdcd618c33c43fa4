"""Compressing a model into a pack, and a pack back into what it was made of."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from merging.api.merge_files import merge
from merging.compression.adapters import adapter_file, pack_adapter
from merging.compression.assembly import Assembly, Losses
from merging.compression.models import model_plan, pack_model
from merging.compression.settings import PackSettings, make_settings
from merging.engine.download import download_model
from merging.engine.resources import pick_device
from merging.errors import InputError, OutputError
from merging.hub.open_model import open_base, open_model
from merging.output.model_card import HUB_ID
from merging.plan.names.targets import adapter_targets
from merging.progress import Progress
from merging.sources import Adapter, Checkpoint
from merging.sources.checkpoint import content_key
from merging.sources.diffusion_loras import WEIGHTS
from merging.sources.packs import PackBase, PackManifest, read_pack
from merging.sources.packs.codings import Raw
from merging.sources.peft import CONFIG_KEY
from merging.storage.output_tensor import OutputTensor
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.writer import TensorWriter

__all__ = ["Compressed", "Decompressed", "compress", "decompress"]


@dataclass(frozen=True, slots=True)
class Compressed:
    """What became of a model, and what it lost.

    ``bits`` is what is coded takes for each number that it stands for. ``error`` is the relative error of all changes
    together (Frobenius norms), ``errors`` that of each.
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
    notices: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller the pack is than the model's files."""
        return self.bytes_before / max(1, self.bytes_after)

    @property
    def worst(self) -> str:
        """The target whose change lost most of itself."""
        return max(self.errors, key=lambda target: self.errors[target], default="")

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path), "ratio": self.ratio, "worst": self.worst}


@dataclass(frozen=True, slots=True)
class Decompressed:
    """What a pack was made into, and where it lies."""

    path: Path
    kind: Literal["adapter", "model"]
    tensors: int
    bytes: int
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path)}


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
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compressed:
    """Write what an adapter holds, or what a full model changed of its ``base``, into one small file.

    ``method`` is ``"ternary"`` (the default for adapters: signs of the ``density`` largest entries of every tensor, at
    one scale: the mean magnitude, which is of least squares, or (``scale="norm"``) so much more that every change
    keeps its norm, or ``alpha`` standard deviations; positions in a Golomb code, or two bitmaps) or
    ``"bands"`` (for models: leading singular directions in the bits that ``bands`` gives them; of embeddings and heads
    the ``density`` largest entries; vectors as they are). A ``base`` given along with an adapter has to have a
    place for all that it changes, and is only noted, so that the pack is refused beside another.

    Raises :class:`~merging.errors.MergingError`, and leaves nothing behind then.
    """
    destination, start = Path(output), time.monotonic()
    opened = open_model(model)
    full = None if base is None else open_base(base, "--base")
    kind: Literal["adapter", "model"] = "adapter" if isinstance(opened, Adapter) else "model"
    settings = make_settings(kind, method, density, coding, alpha, scale, bands)
    _check_pack(destination)
    check_destination(destination, _files(opened, full), 0, overwrite)
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
                losses, manifest, entries, notices = _adapter(opened, full, settings, assembly)
            else:
                losses, manifest, entries = _model(opened, full, settings, assembly, device, progress)
                notices = []
            after = assembly.write(destination.stem, manifest)
        finally:
            assembly.close()
        staged.commit()
    return Compressed(
        path=destination,
        kind=kind,
        method=settings.method,
        settings=settings.summary,
        bytes_before=before,
        bytes_after=after,
        bits=8 * assembly.coded_bytes / max(1, entries),
        error=losses.overall,
        median=losses.median,
        seconds=time.monotonic() - start,
        errors=losses.relative,
        notices=(*notices, *staged.notices),
    )


def _check_pack(destination: Path) -> None:
    if destination.suffix != ".safetensors":
        raise OutputError(f"{destination}: a pack is one file: give it a name that ends in .safetensors")
    if destination.stem == "adapter_model":
        raise OutputError(f"{destination}: is the name of an adapter of PEFT's, which a pack is not: choose another -o")


def _files(*models: Adapter | Checkpoint | None) -> Iterable[Path]:
    return (file for model in models if model for file in (model.path, *model.files))


def _adapter(
    adapter: Adapter, base: Checkpoint | None, settings: PackSettings, assembly: Assembly
) -> tuple[Losses, PackManifest, int, list[str]]:
    file = adapter_file(adapter)
    losses, notices = pack_adapter(file, settings, assembly)
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
    return losses, manifest, sum(prod(each.shape) for each in coded), notices


def _model(
    model: Checkpoint,
    base: Checkpoint | None,
    settings: PackSettings,
    assembly: Assembly,
    device: str,
    progress: Progress | None,
) -> tuple[Losses, PackManifest, int]:
    if base is None:
        raise InputError(f"{model.path}: of a full model what it changed is packed: give its base with --base")
    plan = model_plan(model, base)
    losses, changed, entries = pack_model(plan, settings, assembly, pick_device(device), progress)
    tensors = tuple(assembly.described)
    return (
        losses,
        PackManifest(
            method=settings.method, settings=settings.summary, base=_base(base), tensors=tensors, changes=changed
        ),
        entries,
    )


def _base(base: Checkpoint) -> PackBase:
    """What a base is called where others can find it, and what is in it."""
    stated = base.config.get("_name_or_path")
    named = stated if isinstance(stated, str) and HUB_ID.fullmatch(stated) and not Path(stated).exists() else None
    key = content_key(base.tensors)
    if base.origin is not None:
        return PackBase(name=base.origin.repo, revision=base.origin.commit, key=key)
    return PackBase(name=named, key=key)


def decompress(
    pack: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    allow_different_bases: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Decompressed:
    """Write what a pack holds as an ordinary adapter, in the format that it was in, or as a full model.

    An adapter is a folder, or a bare file where ``output`` ends in ``.safetensors``; its tensors are just those that
    the pack is read as. A full model is its ``base`` with the changes added, which has the content that the pack notes
    unless ``allow_different_bases``. Raises :class:`~merging.errors.MergingError`, and leaves nothing behind then.
    """
    destination, opened = Path(output), open_model(pack)
    if not isinstance(opened, Adapter) or not opened.packed:
        raise InputError(f"{pack}: is no pack: it can be used as it is")
    if opened.of_model:
        if base is None:
            known = f" ({opened.base})" if opened.base else ""
            raise InputError(f"{pack}: holds what a full model changed: give its base{known} with --base")
        made = merge(
            [pack],
            method="task_arithmetic",
            base=str(base),
            output=destination,
            allow_different_bases=allow_different_bases,
            overwrite=overwrite,
            progress=progress,
        )
        return Decompressed(made.path, "model", made.tensors, made.bytes, made.notices)
    if base is not None:
        raise InputError(f"{pack}: holds an adapter, which is unpacked without a base: leave --base out")
    download_model(opened, progress)
    return _unpacked_adapter(opened, destination, overwrite)


def _unpacked_adapter(adapter: Adapter, destination: Path, overwrite: bool) -> Decompressed:
    pack = read_pack(adapter.files[0])
    manifest, single = pack.manifest, destination.suffix == ".safetensors"
    config = None if manifest.config is None else json.dumps(manifest.config, indent=2)
    if config is None and manifest.dialect == "PEFT" and not single:
        raise OutputError(
            f"{destination}: the pack has no config of PEFT's to go into a folder: use -o FILE.safetensors"
        )
    stems = {"PEFT": "adapter_model", "diffusers": Path(WEIGHTS[0]).stem}
    stem = destination.stem if single else stems.get(str(manifest.dialect), destination.name)
    metadata = manifest.metadata | ({CONFIG_KEY: config} if config and single else {})
    outs = [OutputTensor(name, stored.dtype_name, stored.shape) for name, stored in pack.tensors.items()]
    nbytes = sum(out.nbytes for out in outs)
    check_destination(destination, _files(adapter), nbytes, overwrite)
    with StagedOutput(destination, overwrite, single) as staged:
        writer = TensorWriter(staged.folder, stem, outs, metadata, None)
        try:
            for name, stored in pack.tensors.items():
                writer.write(name, stored.read().reshape(-1))
            writer.finish()
        finally:
            writer.close()
        if config and not single:
            (staged.folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        staged.commit()
    return Decompressed(destination, "adapter", len(outs), nbytes, tuple(staged.notices))
