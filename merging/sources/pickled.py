"""Files of PyTorch (.bin, .pt, .pth): mapped into memory, and no code in them is run."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from merging.errors import FormatError
from merging.sources.stored import DTYPE_NAMES, MappedTensor, Opened, Stored

__all__ = ["open_pickle"]

_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What torch raises for a damaged file, whose parts are handed to functions that expect others."""


def open_pickle(path: Path) -> Opened:
    """The tensors of a PyTorch file, mapped, and for each name that shares another's memory (tied weights) that other.

    Loaded with ``weights_only=True``, which runs no code from the file. Raises :class:`~merging.errors.FormatError`.
    """
    if not path.is_file():  # a device would be read for ever
        raise FormatError(f"{path}: is not a regular file, not a PyTorch file")
    try:
        if not zipfile.is_zipfile(path):
            raise FormatError(
                f"{path}: is no PyTorch zip file (cut short, or written before 2020), and the old format cannot be "
                f"read lazily: load and save it as safetensors first"
            )
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition(".")[0]  # what follows are ways to run it all the same
        raise FormatError(f"{path}: holds more than tensors, and nothing in it is run: {reason}") from None
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{path}: is a damaged PyTorch file: {reason or type(error).__name__}") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FormatError(f"{path}: is a PyTorch file, but not a state dict (names to tensors)")
    size = path.stat().st_size
    tensors: dict[str, Stored] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for position, (name, tensor) in enumerate(state.items()):
        if not isinstance(name, str):
            raise FormatError(f"{path}: is a PyTorch file, but not a state dict: {str(name)[:80]!r} is no name")
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(f"{path}: {name} has the type {tensor.dtype}, which cannot be merged")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise FormatError(f"{path}: {name} is no ordinary tensor, but {tensor.layout} on {tensor.device}")
        if tensor.nbytes > size:  # one number, perhaps, said to be a matrix of ten gigabytes
            raise FormatError(f"{path}: {name} of the shape {tuple(tensor.shape)} is larger than its file")
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first = seen.setdefault(identity, name)
        if first != name and tensor.numel():
            shared[name] = first
        tensors[name] = MappedTensor(tensor, (str(path), position))
    return tensors, shared
