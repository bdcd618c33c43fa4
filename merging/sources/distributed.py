"""Folders of torch.distributed.checkpoint (DCP): a list of tensors (.metadata), and their parts in .distcp files.

The list is a pickle. It is read without importing a class or running code, and the parts are read at their places."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.maths.lazy_torch import Tensor
from merging.sources.open_files import File
from merging.sources.pickled import DAMAGE, read_record
from merging.sources.small_files import LIST_LIMIT, is_there, read_bytes
from merging.sources.stored import FileContents, Stored
from merging.sources.unpickle import Foreign, unpickle

__all__ = ["METADATA", "is_distributed", "open_distributed"]

METADATA = ".metadata"
"""The file that lists the tensors of a folder and the places of their parts."""

_MODELS = ("model", "state_dict", "model_state_dict", "module")
"""Keys of the model's part in the dict that a program saved."""

_OTHERS = ("optim", "lr_scheduler", "scheduler", "dataloader", "train_state")
"""How the keys of other parts begin."""

_REMEDY = "convert it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt`"


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a tensor: the place of its first element, its shape, and its record in a file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    size: int


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of torch.distributed.checkpoint."""
    return is_there(folder / METADATA)


def open_distributed(path: Path) -> FileContents:
    """Open a checkpoint by its list, ``.metadata``: the model's tensors, without the optimizer's.

    Raises :class:`~merging.errors.FormatError` for a list or part that is damaged or not understood.
    """
    try:
        listed = _fields(unpickle(read_bytes(path, LIST_LIMIT), foreign=True), "Metadata")
        parts = _find_parts(listed)
        files: dict[str, File] = {}
        tensors: dict[str, Stored] = {}
        for name, full in _model_names(listed):
            shape = tuple(_fields(listed["state_dict_metadata"][full], "TensorStorageMetadata")["size"])
            tensors[name] = _open_tensor(path.parent, shape, parts[full], files)
    except (*DAMAGE, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FormatError(
            f"{path.parent}: a distributed checkpoint that is not understood ({reason}): {_REMEDY}"
        ) from None
    if not tensors:
        raise FormatError(f"{path.parent}: a distributed checkpoint without tensors of a model")
    return tensors, {}


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """Return the fields of an object of torch's class. Raises ValueError for an object of another class."""
    if not isinstance(value, Foreign) or value.kind.rpartition(".")[2] != kind or not isinstance(value.state, dict):
        raise ValueError(f"its list has another value in the place of {kind}")
    return value.state


def _model_names(listed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of the model's tensors, and their names in the list.

    Where a part of the saved dict is a model by its key, the other parts are not the model's.
    """
    paths = listed.get("planner_data")
    ways: dict[str, Sequence[Any]] = {}
    for full, value in listed["state_dict_metadata"].items():
        if isinstance(value, Foreign) and value.kind.endswith(".TensorStorageMetadata"):
            way = paths.get(full) if isinstance(paths, dict) else None
            ways[full] = way if isinstance(way, tuple) and way else (full,)
    models = {full: next((i for i, key in enumerate(way[:-1]) if key in _MODELS), None) for full, way in ways.items()}
    keyed = any(place is not None for place in models.values())
    for full, way in ways.items():
        place = models[full]
        if place is not None:
            yield ".".join(map(str, way[place + 1 :])), full
        elif not keyed and not str(way[0]).startswith(_OTHERS):
            yield ".".join(map(str, way)), full


def _find_parts(listed: Mapping[str, Any]) -> dict[str, list[_Chunk]]:
    """Return the parts of each tensor in the list, in the order of their places."""
    shapes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for full, value in listed["state_dict_metadata"].items():
        if isinstance(value, Foreign) and value.kind.endswith(".TensorStorageMetadata"):
            for chunk in _fields(value, "TensorStorageMetadata")["chunks"]:
                fields = _fields(chunk, "ChunkStorageMetadata")
                shapes[full, tuple(fields["offsets"])] = tuple(fields["sizes"])
    parts: dict[str, list[_Chunk]] = {}
    for key, value in listed["storage_data"].items():
        index, place = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        found = index["fqn"], tuple(index.get("offset") or ())
        if found in shapes:
            if place.get("transform_descriptors"):
                raise ValueError("its files are compressed")
            part = _Chunk(found[1], shapes.pop(found), place["relative_path"], place["offset"], place["length"])
            parts.setdefault(found[0], []).append(part)
    if shapes:
        raise ValueError(f"it states no place for a part of {next(iter(shapes))[0]}")
    return {full: sorted(each, key=lambda part: part.offsets) for full, each in parts.items()}


def _open_tensor(folder: Path, shape: tuple[int, ...], parts: Sequence[_Chunk], files: dict[str, File]) -> Stored:
    """Return a tensor, which its parts make up along the first axis."""
    rows, opened = 0, []
    for part in parts:
        if 0 in part.shape and 0 not in shape:
            continue
        if part.shape[1:] != shape[1:] or any(part.offsets[1:]) or (part.offsets[:1] or (0,)) != (rows,):
            raise ValueError(f"a tensor of the shape {shape} is cut along other axes than the first")
        if not isinstance(part.file, str) or Path(part.file).name != part.file:
            raise ValueError(f"a part is said to be in {part.file!r:.200}, which is not a plain file name")
        if part.file not in files:
            if not is_there(folder / part.file, None):
                raise FormatError(f"{folder}: its file {part.file} is missing: complete the checkpoint")
            files[part.file] = File(folder / part.file)
        stored = read_record(files[part.file], part.start, part.size)
        if stored.shape != part.shape:
            raise ValueError(f"a part of the shape {part.shape} has the shape {stored.shape} in {part.file}")
        rows += part.shape[0] if shape else 1
        opened.append(stored)
    if rows != (shape[0] if shape else 1):
        raise ValueError(f"the parts of a tensor of the shape {shape} end after {rows} rows")
    return opened[0] if len(opened) == 1 else _JoinedRows(shape, opened)


class _JoinedRows(Stored):
    """A tensor whose rows are in several stored tensors, one after the other."""

    __slots__ = ("_ends", "_parts")

    def __init__(self, shape: tuple[int, ...], parts: Sequence[Stored]) -> None:
        super().__init__(parts[0].dtype_name, shape)
        if any(part.dtype_name != self.dtype_name for part in parts):
            raise ValueError("the parts of a tensor are of different types")
        self._parts = tuple(parts)
        self._ends = tuple(accumulate(part.numel for part in parts))

    def _pieces(self, start: int, count: int) -> Iterator[tuple[Stored, int, int, int]]:
        """Yield the parts that hold a range of elements: each with its first element, their number, and their place."""
        for part, end in zip(self._parts, self._ends, strict=True):
            begin = end - part.numel
            first, behind = max(start, begin), min(start + count, end)
            if first < behind:
                yield part, first - begin, behind - first, first - start

    def read_into(self, buffer: Tensor, start: int = 0) -> None:
        for part, first, count, place in self._pieces(start, len(buffer)):
            part.read_into(buffer[place : place + count], first)

    def advise(self, start: int, count: int) -> None:
        for part, first, length, _ in self._pieces(start, count):
            part.advise(first, length)

    @property
    def made_of(self) -> tuple[Stored, ...]:
        return self._parts

    @property
    def scratch(self) -> int:
        return max(part.scratch for part in self._parts)

    def order(self) -> tuple[str, int]:
        return self._parts[0].order()
