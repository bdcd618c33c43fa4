"""Opening a model by its name: a name that exists here is local, an address of the Hub is read there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merging.errors import InputError, MergingError
from merging.hub.address import hub_address, local_path, no_such_path
from merging.hub.repository import open_repository
from merging.sources import Adapter, Checkpoint, open_local
from merging.sources.origin import Origin

__all__ = ["open_base", "open_model", "require_full"]


def open_model(name: str | Path, alpha: float | None = None, dequantise: bool = False) -> Checkpoint | Adapter:
    """Open a full model or an adapter: a local folder or file, or an address on the Hub. Only headers are read.

    ``alpha`` is the LoRA alpha of adapters, instead of what they state; ``dequantise`` makes ordinary weights of those
    that are quantised in a simple way. Raises :class:`~merging.errors.InputError` if
    there is nothing, :class:`~merging.errors.FormatError` if what is there cannot be understood exactly.
    """
    address = hub_address(str(name))
    if address is None:
        return _open_there(local_path(str(name)), alpha, dequantise)
    repository = open_repository(address)
    origin = Origin(address.repo, repository.commit, address.path, repository.licence)

    def named(text: str) -> str:
        return text.replace(str(repository.folder), repository.name)

    try:
        model = _open_there(repository.folder / address.path, alpha, dequantise)
    except MergingError as error:
        raise type(error)(named(str(error))) from None
    if isinstance(model, Adapter):
        return replace(model, path=Path(str(origin)), origin=origin, notices=tuple(map(named, model.notices)))
    return replace(model, path=Path(str(origin)), origin=origin)


def open_base(path: str | Path, reader: str, dequantise: bool = False) -> Checkpoint:
    """Open the full model that others were trained from. Raises :class:`~merging.errors.MergingError`.

    ``reader`` names the option or thing that wants the base, for the message about an adapter in its place.
    """
    return require_full(open_model(path, dequantise=dequantise), path, reader)


def require_full(model: Checkpoint | Adapter, path: str | Path, reader: str) -> Checkpoint:
    """Return a model that is to be a base. Raises :class:`~merging.errors.InputError` for an adapter."""
    if isinstance(model, Adapter):
        raise InputError(f"{path}: is an adapter, and {reader} wants the full model that the others were trained from")
    return model


def _open_there(path: Path, alpha: float | None, dequantise: bool) -> Checkpoint | Adapter:
    if not path.exists():
        raise no_such_path(path)
    return open_local(path, alpha, dequantise)
