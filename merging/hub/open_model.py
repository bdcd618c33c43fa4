"""Opening a model by its name: an existing path is local, other names are on the Hub or in an object store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merging.errors import InputError, MergingError
from merging.hub.address import hub_address, local_path, no_such_path, path_of_name
from merging.hub.repository import open_repository
from merging.sources import Adapter, Checkpoint, open_local
from merging.sources.opening import FileOpener, open_tensors
from merging.sources.origin import Origin

__all__ = ["open_base", "open_model", "require_full"]


def open_model(name: str | Path, alpha: float | None = None, dequantize: bool = False) -> Checkpoint | Adapter:
    """Open a full model or an adapter. Only headers are read.

    Args:
        name: A local folder or file, an address on the Hub (``org/name``, ``org/name@revision``, ``hf://...``), or one
            in an object store (``s3://bucket/folder``, ``gs://...``, ``az://...``).
        alpha: The LoRA alpha of an adapter, instead of the stated one.
        dequantize: Whether weights that are quantised in a simple way are read as ordinary numbers.

    Returns:
        The model, whose tensors are read when they are needed.

    Raises:
        InputError: Nothing exists under the name, or the Hub or store cannot be reached.
        FormatError: The model is damaged, or of a format that cannot be understood exactly.
    """
    address = hub_address(str(name))
    if address is None:
        return _open_existing(local_path(str(name)), alpha, dequantize, open_tensors)
    repository = open_repository(address)
    origin = Origin(address.repo, repository.commit, address.path, repository.licence)

    def with_public_name(text: str) -> str:
        return text.replace(str(repository.folder), repository.name)

    try:
        model = _open_existing(repository.folder / address.path, alpha, dequantize, repository.open_file)
    except MergingError as error:
        raise type(error)(with_public_name(str(error))) from None
    if isinstance(model, Adapter):
        return replace(
            model, path=path_of_name(str(origin)), origin=origin, notices=tuple(map(with_public_name, model.notices))
        )
    return replace(model, path=path_of_name(str(origin)), origin=origin)


def open_base(path: str | Path, reader: str, dequantize: bool = False) -> Checkpoint:
    """Open the full model that others were trained from. Raises :class:`~merging.errors.MergingError`.

    ``reader`` names the option or thing that wants the base, for the message about an adapter in its place.
    """
    return require_full(open_model(path, dequantize=dequantize), path, reader)


def require_full(model: Checkpoint | Adapter, path: str | Path, reader: str) -> Checkpoint:
    """Return a model that is to be a base. Raises :class:`~merging.errors.InputError` for an adapter."""
    if isinstance(model, Adapter):
        raise InputError(f"{path}: is an adapter, and {reader} wants the full model that the others were trained from")
    return model


def _open_existing(path: Path, alpha: float | None, dequantize: bool, open_file: FileOpener) -> Checkpoint | Adapter:
    if not path.exists():
        raise no_such_path(path)
    return open_local(path, alpha, dequantize, open_file)
