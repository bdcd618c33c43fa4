"""The record of a store: what it merges, onto what, and every step so far. Read whole, replaced in one move."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from merging import platform
from merging.errors import FormatError, InputError, OutputError

__all__ = [
    "NAME",
    "SCHEMA",
    "Base",
    "Manifest",
    "Part",
    "Refused",
    "StepRecord",
    "read_manifest",
    "sha256_of",
    "write_manifest",
]

NAME = "manifest.json"

SCHEMA = 1

_PIECE = 1 << 22


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Record):
    """The model that all others were trained from: where it lies, and what tells it from any other."""

    path: str
    key: str
    sha256: dict[str, str]


class Part(_Record):
    """A file of a state, relative to the store."""

    file: str
    sha256: str
    bytes: int


class StepRecord(_Record):
    """One model that was added.

    ``norm`` is that of its change, ``kept`` the share of that norm which was added (1 but for projections), ``cosine``
    that of its change to the merge then, ``merged`` the norm of what is held then, ``rank`` that of its factors (0
    where all is held in full) and ``discarded`` the largest share of a tensor's energy that a capped rank left out.
    """

    number: int
    source: str
    sha256: str
    kind: Literal["adapter", "model"]
    stated_base: str | None
    time: str
    parts: dict[str, Part]
    norm: float
    kept: float
    cosine: float
    merged: float
    rank: int
    factored: int
    full: int
    discarded: float


class Refused(_Record):
    """What a watcher found and the store refused."""

    source: str
    fingerprint: str
    reason: str
    time: str


class Manifest(_Record):
    """All that a store knows besides tensors."""

    schema_version: int = SCHEMA
    method: str
    parameters: dict[str, Any] = {}
    max_rank: int | None = None
    base: Base
    steps: tuple[StepRecord, ...] = ()
    refused: tuple[Refused, ...] = ()

    def status(self) -> dict[str, Any]:
        """What the store holds and what each model brought, in plain values."""
        return {
            "method": self.method,
            "parameters": self.parameters,
            "base": self.base.path,
            "max_rank": self.max_rank,
            "holds": self.holds(),
            "steps": [step.model_dump() for step in self.steps],
            "refused": [each.model_dump() for each in self.refused],
        }

    def holds(self) -> list[str]:
        """What is held after the last step, in words."""
        if not self.steps:
            return ["nothing yet"]
        last = self.steps[-1]
        size = sum(part.bytes for part in last.parts.values())
        lines = [f"{size / 1e6:.1f} MB in {', '.join(last.parts)}"]
        if last.factored:
            capped = f", capped at {self.max_rank}" if self.max_rank else ""
            lines.append(
                f"{last.factored} tensors as factors of rank {last.rank}{capped}; one is held in full as soon as its "
                f"factors would take more room"
            )
        if last.full:
            lines.append(f"{last.full} tensors in full")
        return lines


def read_manifest(store: Path) -> Manifest:
    """The manifest of a store. Raises :class:`~merging.errors.FormatError` for what is none."""
    path = store / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.get("schema_version")
        if version != SCHEMA:
            raise FormatError(f"{path}: has the schema {version!r}, and this version reads {SCHEMA}: use the newer one")
        return Manifest.model_validate(values)
    except FileNotFoundError:
        raise FormatError(f"{store}: is no store: make one with merge continual init {store} --base BASE") from None
    except (ValueError, AttributeError, ValidationError) as error:
        raise FormatError(f"{path}: is no manifest of a store: {str(error).splitlines()[0]}") from None


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Put a manifest in place of the old one, durably: at any instant a reader finds one or the other."""
    text = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False) + "\n"
    new = store / f".{NAME}.new"
    try:
        with new.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            platform.sync(stream.fileno())
        new.replace(store / NAME)
        platform.sync_folder(store)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise OutputError(f"{store}: the manifest cannot be written: {error.strerror}") from None


def sha256_of(path: Path) -> str:
    """The hash of a file, read in pieces. Raises :class:`~merging.errors.InputError`."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while piece := stream.read(_PIECE):
                digest.update(piece)
            return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
