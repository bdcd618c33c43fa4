"""Packs, as ``merge compress`` writes them: adapters, or the changes of full models, in few bits.

A pack is one safetensors file. Its header describes its tensors ``packed.0``, ``packed.1``... It is read like its
original: an adapter of its own format, or changes of a model under the base's names, decoded when they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from merging.display.tables import Displayed
from merging.errors import FormatError, explain_invalid, option
from merging.sources import diffusion_loras, kohya, peft
from merging.sources.adapter import Adapter
from merging.sources.changes import AddedTensor, Change, FactorsChange
from merging.sources.opening import open_tensors
from merging.sources.packs.codings import Coding, DtypeName, Packed, Raw
from merging.sources.small_files import parse_json
from merging.sources.stored import FileContents, Stored
from merging.sources.tensor_names import add_tensor_names

__all__ = [
    "PACK_KEY",
    "Changed",
    "Described",
    "PackBase",
    "PackManifest",
    "open_pack",
    "payload_name",
    "read_pack",
    "recognizes",
]

PACK_KEY = "merging_pack"
"""The metadata entry with the manifest of a pack."""

VERSION = 1

_PAYLOAD = re.compile(r"packed\.[0-9]+")

_OPENERS: dict[str, Callable[[Path, float | None, FileContents], Adapter]] = {
    "PEFT": peft.open_peft,
    "Kohya": kohya.open_kohya,
    "diffusers": diffusion_loras.open_diffusion,
}


class _StatedChange(Displayed, BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Described(_StatedChange):
    """A tensor of a pack: its name, type, shape and coding."""

    name: str
    kind: DtypeName
    shape: tuple[int, ...]
    coding: Coding


class Changed(_StatedChange):
    """A tensor that a model changed: its kind as in :class:`~merging.sources.changes.Change`, and its shape.

    ``transposed``: it is ``[in, out]``, the transpose of the factors' product.
    """

    kind: Literal["linear", "conv", "experts", "full"]
    shape: tuple[int, ...]
    transposed: bool = False


class PackBase(_StatedChange):
    """The base of a pack's changes: its name, its commit on the Hub, and the key of its content."""

    name: str | None = None
    revision: str | None = None
    key: str | None = None


class PackManifest(_StatedChange):
    """The description of a pack; ``config`` and ``metadata`` come from the original adapter."""

    version: Literal[1] = 1
    method: str
    settings: str
    base: PackBase
    dialect: Literal["PEFT", "Kohya", "diffusers"] | None = None
    config: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    tensors: tuple[Described, ...]
    changes: dict[str, Changed] = {}


@dataclass(frozen=True, slots=True, eq=False)
class PackContents:
    """A pack's tensors under their original names, and its manifest."""

    tensors: dict[str, Stored]
    manifest: PackManifest


def payload_name(number: int) -> str:
    """Return the name of a tensor in the file, from its number."""
    return f"packed.{number}"


def recognizes(opened: FileContents) -> bool:
    """Whether a file has the tensor names of a pack."""
    return any(_PAYLOAD.fullmatch(name) for name in opened[0])


def read_pack(path: Path, opened: FileContents | None = None) -> PackContents:
    """Open the tensors of a pack, without decoding any. Raises :class:`~merging.errors.FormatError`."""
    stored, metadata = opened or open_tensors(path)
    manifest = _manifest(path, metadata)
    tensors: dict[str, Stored] = {}
    try:
        if stored.keys() != {payload_name(number) for number in range(len(manifest.tensors))}:
            raise ValueError(f"describes {len(manifest.tensors)} tensors, and holds others")
        for number, each in enumerate(manifest.tensors):
            if each.name in tensors:
                raise ValueError(f"holds {each.name} twice")
            tensors[each.name] = _tensor(each, stored[payload_name(number)])
    except ValueError as error:
        raise FormatError(f"{path}: is a damaged pack: it {error}: get it again") from None
    return PackContents(tensors, manifest)


def _manifest(path: Path, metadata: Mapping[str, str]) -> PackManifest:
    try:
        stated = parse_json(metadata[PACK_KEY], f"{path}: the {PACK_KEY} in its header")
        version = stated["version"]
        if version != VERSION:
            raise FormatError(
                f"{path}: is a pack of version {str(version)[:20]}, and {VERSION} is read: update this program"
            )
        return PackManifest.model_validate(stated)
    except (KeyError, TypeError, RecursionError, ValidationError, ValueError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else None
        fault = (
            f"{'.'.join(map(str, reason['loc']))}: {explain_invalid(reason)}"
            if reason
            else f"no {PACK_KEY} that is one"
        )
        raise FormatError(f"{path}: is a damaged pack: its header has {fault[:200]}: get it again") from None


def _tensor(described: Described, stored: Stored) -> Stored:
    name, kind, shape = described.name, described.kind, described.shape
    if any(size < 0 for size in shape) or len(shape) > 16 or prod(filter(None, shape)) >= 1 << 63:
        raise ValueError(f"holds {name[:80]} of the shape {str(shape)[:80]}")
    if isinstance(described.coding, Raw):
        if (stored.dtype_name, stored.shape) != (kind, shape):
            raise ValueError(
                f"holds {name[:80]} as {stored.dtype_name} {list(stored.shape)}, not as {kind} {list(shape)}"
            )
        return stored
    try:
        return Packed(name, kind, shape, stored, described.coding)
    except ValueError as error:
        raise ValueError(f"holds {name[:80]}, which {error}") from None


def open_pack(path: Path, alpha: float | None = None, opened: FileContents | None = None) -> Adapter:
    """Open a pack as an adapter; only the header is read.

    ``alpha`` replaces the adapter's. Raises :class:`~merging.errors.FormatError` for a damaged pack.
    """
    if path.stem == "adapter_model":
        raise FormatError(f"{path}: is a pack, and has the name of an adapter of PEFT's: rename it")
    pack = read_pack(path, opened)
    manifest = pack.manifest
    coding = f"packed by {manifest.method}, {manifest.settings}"
    if manifest.dialect is None:
        if alpha is not None:
            raise FormatError(
                f"{path}: holds what a full model changed, which has no alpha: leave {option('lora_alpha')} out"
            )
        return Adapter(
            path=path,
            changes=_changes(path, pack),
            files=(path,),
            dialect="pack",
            base=manifest.base.name,
            about=coding,
            base_key=manifest.base.key,
            of_model=True,
            packed=True,
        )
    config = {} if manifest.config is None else {peft.CONFIG_KEY: json.dumps(manifest.config)}
    held = pack.tensors, {**manifest.metadata, **config}
    inner = add_tensor_names(_OPENERS[manifest.dialect](path, alpha, held), held)
    about = f"{inner.about}, {coding}" if inner.about else coding
    return replace(inner, about=about, base=inner.base or manifest.base.name, base_key=manifest.base.key, packed=True)


def _changes(path: Path, pack: PackContents) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    tensors = dict(pack.tensors)
    try:
        for target, stated in pack.manifest.changes.items():
            if stated.kind == "full":
                changes[target] = AddedTensor(target, "full", tensors.pop(f"full/{target}"))
            else:
                down, up = tensors.pop(f"down/{target}"), tensors.pop(f"up/{target}")
                changes[target] = FactorsChange(
                    target, stated.kind, down, up, stated.shape, transposed=stated.transposed
                )
    except KeyError as error:
        raise FormatError(f"{path}: is a damaged pack: it lacks {error}") from None
    if tensors:
        raise FormatError(f"{path}: is a damaged pack: {next(iter(tensors))} belongs to no change")
    for target, change in changes.items():
        if not _whole(change, pack.manifest.changes[target].shape):
            raise FormatError(f"{path}: is a damaged pack: the parts of {target} make no tensor of its shape")
    return changes


def _whole(change: Change, shape: tuple[int, ...]) -> bool:
    """Whether a change's parts make a tensor of the shape that the pack states."""
    if not isinstance(change, FactorsChange):
        return change.shape == shape
    up, down = change.up.shape, change.down.shape
    batch = shape[:1] if change.kind == "experts" else ()
    sides = shape[len(batch) :]
    if len(up) != 2 + len(batch) or len(down) != len(up) or len(sides) < 2 or (change.transposed and len(sides) > 2):
        return False
    outputs, inputs = (sides[1], sides[0]) if change.transposed else (sides[0], prod(sides[1:]))
    return up == (*batch, outputs, up[-1]) and down == (*batch, up[-1], inputs)
