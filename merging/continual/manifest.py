"""The record of a store: its method, its base and every step so far. It is read whole and replaced in one move."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from merging import os_calls
from merging.display.tables import Displayed, format_size
from merging.errors import FormatError, InputError, OutputError, either, explain_invalid
from merging.sources.links import refuse_link
from merging.sources.small_files import LIST_LIMIT, read_json
from merging.storage.atomic import replace_file

__all__ = [
    "NAME",
    "SCHEMA",
    "STATES",
    "Manifest",
    "Part",
    "RefusedModel",
    "StepRecord",
    "StoreBase",
    "Unconfirmed",
    "read_manifest",
    "replace_manifest",
    "sha256_of",
    "write_manifest",
]

NAME = "manifest.json"

STATES = "states"

SCHEMA = 1

_CHECKSUM = "checksum"

_PIECE = 1 << 22

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_StateFile = Annotated[str, Field(pattern=r"^states/[0-9]{6,}-[0-9a-f]+/[a-z-]+\.safetensors$")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Unconfirmed(OutputError):
    """A change that is made, but that the disk did not confirm to be durable."""


class _Record(Displayed, BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoreBase(_Record):
    """The model that all others were trained from.

    Attributes:
        path: its folder or file, or its name on the Hub with the commit.
        key: a hash of a few of its values, which are read each time it is opened.
        sha256: the hashes of its files, by their paths within its folder.
    """

    path: str
    key: str
    sha256: dict[str, _Digest]


class Part(_Record):
    """A file of a state, relative to the store."""

    file: _StateFile
    sha256: _Digest
    bytes: NonNegativeInt


class StepRecord(_Record):
    """One model that was added, and the state after it.

    Attributes:
        number: the number of the step, from 1.
        source: the model's path, or its name on the Hub with the commit.
        sha256: the hash of the model's files.
        kind: an adapter or a full model.
        stated_base: the base that an adapter states.
        licence: the licence that the model's card states.
        time: when it was added, UTC.
        parts: the files of the state, by name.
        norm: the norm of the model's change.
        kept: the share of that norm that was added; 1 unless the method projects.
        cosine: the cosine between the model's change and the state after it.
        merged: the norm of the state.
        rank: the largest rank of factors in the state; 0 if all tensors are held in full.
        factored: the number of tensors that are held as factors.
        full: the number of tensors that are held in full.
        discarded: the largest share of a tensor's energy that a capped rank left out in this step.
        notices: notices about the step.
    """

    number: PositiveInt
    source: str
    sha256: _Digest
    kind: Literal["adapter", "model"]
    stated_base: str | None
    licence: str | None = None
    time: str
    parts: Annotated[dict[str, Part], Field(min_length=1)]
    norm: _Finite
    kept: _Finite
    cosine: _Finite
    merged: _Finite
    rank: NonNegativeInt
    factored: NonNegativeInt
    full: NonNegativeInt
    discarded: _Finite
    notices: tuple[str, ...] = ()

    def _display_fields(self) -> dict[str, Any]:
        hidden = ("sha256", "parts")
        return {name: getattr(self, name) for name in type(self).model_fields if name not in hidden}


class RefusedModel(_Record):
    """A model that a watch found and the store refused."""

    source: str
    fingerprint: str
    reason: str
    time: str


class Manifest(_Record):
    """Everything that a store records besides tensors."""

    schema_version: int = SCHEMA
    method: str
    parameters: dict[str, Any] = {}
    max_rank: PositiveInt | None = None
    base: StoreBase
    steps: tuple[StepRecord, ...] = ()
    refused: tuple[RefusedModel, ...] = ()

    def _display_fields(self) -> dict[str, Any]:
        facts = {"method": self.method, "parameters": self.parameters, "max_rank": self.max_rank}
        return {**facts, "base": self.base.path, "steps": len(self.steps), "refused": len(self.refused)}

    @model_validator(mode="after")
    def _in_order(self) -> Manifest:
        if [step.number for step in self.steps] != list(range(1, len(self.steps) + 1)):
            raise ValueError("the steps are not numbered one after the other")
        return self

    def has(self, content: str) -> bool:
        """Whether a model with this content was added."""
        return any(step.sha256 == content for step in self.steps)

    def status(self) -> dict[str, Any]:
        """Return what the store holds, and the record of each model, in plain values."""
        return {
            "method": self.method,
            "parameters": self.parameters,
            "base": self.base.path,
            "max_rank": self.max_rank,
            "holds": self.holds(),
            "steps": [step.model_dump(mode="json") for step in self.steps],
            "refused": [each.model_dump() for each in self.refused],
        }

    def holds(self) -> list[str]:
        """Describe the state after the last step, in lines of text."""
        if not self.steps:
            return ["nothing yet"]
        last = self.steps[-1]
        size = sum(part.bytes for part in last.parts.values())
        lines = [f"a state of {format_size(size)} ({', '.join(last.parts)})"]
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
    """Return the manifest of a store. Raises :class:`~merging.errors.FormatError` if it is missing or damaged."""
    path = store / NAME
    if not os.path.lexists(path):
        create = either(f"merge continual init {store} --base BASE", f'ContinualStore.create("{store}", base=BASE)')
        raise FormatError(f"{store}: is not a store: create one with {create}")
    refuse_link(path)
    refuse_link(store / STATES)
    try:
        values = read_json(path, LIST_LIMIT, halves=True)
    except FormatError as error:
        raise FormatError(f"{error}: it is not the manifest of a store, or is damaged") from None
    try:
        version = values.get("schema_version")
        if not isinstance(version, int):
            raise ValueError("it states no schema_version")
        if version != SCHEMA:
            raise FormatError(f"{path}: has the schema {version!r}, and this version reads {SCHEMA}: use the newer one")
        stated = values.pop(_CHECKSUM, None)
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(each) for each in first["loc"])
        fault = f"{place}: {explain_invalid(first)}" if place else explain_invalid(first)
        raise FormatError(f"{path}: is not the manifest of a store, or is damaged: {fault}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not the manifest of a store, or is damaged: {error}") from None
    if stated is not None and stated != _checksum(values):  # the first stores had none
        relocate = either("merge continual relocate", "relocate()")
        raise FormatError(
            f"{path}: is damaged, or was edited: its checksum is of other content. Put a copy of it back (for a base "
            f"that was moved there is {relocate})"
        )
    return manifest


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def replace_manifest(store: Path, manifest: Manifest) -> None:
    """Replace the manifest: a reader finds the old one or the new one at any instant. Raises OSError.

    The change is durable once the folder is synced.
    """
    values = manifest.model_dump()
    values[_CHECKSUM] = _checksum(values)
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    # odd bytes of a path, which no Unicode text can hold, become JSON's own escapes
    replace_file(store / NAME, text.encode("utf-8", "backslashreplace"))


def write_manifest(store: Path, manifest: Manifest, made: str) -> None:
    """Replace the manifest durably; ``made`` says in words what changes ("step 3 is in").

    Raises :class:`~merging.errors.OutputError` if nothing was changed, and :class:`Unconfirmed` if the change is made
    but may be lost in a power cut.
    """
    try:
        replace_manifest(store, manifest)
    except OSError as error:
        raise OutputError(f"{store}: the manifest cannot be written: {error.strerror}") from None
    try:
        os_calls.sync_folder(store)
    except OSError as error:
        raise Unconfirmed(
            f"{store}: {made}, but the disk does not confirm it ({error.strerror}): after a power cut the store may be "
            f"as it was before"
        ) from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces. Raises :class:`~merging.errors.InputError`."""
    try:
        with os.fdopen(os_calls.open_regular(path), "rb") as stream:
            digest = hashlib.sha256()
            while piece := stream.read(_PIECE):
                digest.update(piece)
            return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
