"""Writers of safetensors with bounded memory: the header first, then any piece at its position, from any thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.errors import OutputError
from merging.maths.lazy_torch import Tensor
from merging.sources.stored import bytes_of
from merging.storage.output_file import CreateFile, LocalFile, OutputFile
from merging.storage.output_tensor import OutputTensor
from merging.storage.placed_files import PlacedFiles, TensorPlace

__all__ = ["ComponentWriter", "TensorWriter", "file_size"]


class TensorWriter:
    """Writes tensors of known names, dtypes and shapes into one file, or into several shards in a folder.

    ``stem`` is the file's name without its ending. Shards are called ``STEM-0000i-of-0000N.safetensors`` and get an
    index. Files take their full size at once, so that a full disk shows before anything is computed. With ``resume``,
    files of the same header and size are written on, and ``resumed`` says whether all were there. ``create`` opens the
    files. Raises :class:`~merging.errors.OutputError` for errors of the disk.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        outs: Sequence[OutputTensor],
        metadata: Mapping[str, str],
        shard_size: int | None,
        resume: bool = False,
        create: CreateFile = LocalFile,
    ) -> None:
        shards = _shards(outs, shard_size)
        self.folder = folder
        self.stem = stem
        self.files: dict[str, list[OutputTensor]] = {}
        self._places: dict[str, tuple[OutputFile, int]] = {}
        self._left = {out.name: out.nbytes for out in outs}
        self._lock = threading.Lock()
        self._opened: list[OutputFile] = []
        self._create = create
        self._paths: dict[str, Path] = {}
        self.resumed = self._resume = resume
        for number, shard in enumerate(shards, 1):
            name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            self.files[name] = shard
            self._open(folder / name, shard, metadata)

    def _open(self, path: Path, outs: Sequence[OutputTensor], metadata: Mapping[str, str]) -> None:
        """Create a file, or open one that a run left which stopped."""
        header, size = _header(outs, metadata)
        try:
            file = self._create(path, header, size, self._resume)
        except OSError as error:
            self.close()
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
        self._opened.append(file)
        self.resumed = self.resumed and file.resumed
        position, path = len(header), path.absolute()
        for out in outs:
            self._places[out.name] = (file, position)
            self._paths[out.name] = path
            position += self._left[out.name]

    def __reduce__(self) -> tuple[Any, ...]:
        return PlacedFiles, (self.places(),)  # in another process

    def places(self) -> dict[str, TensorPlace]:
        """Return the place of each tensor."""
        return {name: TensorPlace(self._paths[name], position) for name, (_, position) in self._places.items()}

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write the elements ``values`` (one axis, contiguous, on the CPU) at position ``start`` of a tensor."""
        file, position = self._places[name]
        data = bytes_of(values)
        try:
            file.write_at(data, position + start * values.itemsize)
        except OSError as error:
            raise OutputError(f"{self.folder}: {name} cannot be written: {error.strerror}") from None
        with self._lock:
            self._left[name] -= len(data)

    def credit(self, written: Mapping[str, int]) -> None:
        """Count bytes of tensors as written, since a run that stopped wrote them."""
        for name, count in written.items():
            self._left[name] -= count

    def sync(self) -> None:
        """Make everything that was written durable."""
        for file in self._opened:
            file.sync()
        os_calls.sync_folder(self.folder)

    def finish(self) -> None:
        """Check that every byte was written, make the files durable and write the index of shards."""
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
            raise AssertionError(f"{unwritten[0]} and {len(unwritten) - 1} more were not written completely")
        try:
            for file in self._opened:
                file.sync()
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written: {error.strerror}") from None
        self.close()
        if len(self.files) > 1:
            self._write_index()

    def _write_index(self) -> None:
        every = [(out, file) for file, outs in self.files.items() for out in outs]
        index = {
            "metadata": {
                "total_parameters": sum(_numel(out) for out, _ in every),
                "total_size": sum(out.nbytes for out, _ in every),
            },
            "weight_map": {out.name: file for out, file in sorted(every, key=lambda pair: pair[0].name)},
        }
        (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        """Close the files; the writer cannot be used afterwards."""
        while self._opened:
            self._opened.pop().close()


class ComponentWriter:
    """Writes the tensors of a model of several components, each component into a folder of its own.

    ``stems`` are the names of the components' weights files, without their endings, by component. The first part of a
    tensor's name is its component, if ``stems`` has it. All other tensors belong to the component "", whose files are
    in ``folder`` itself.
    """

    def __init__(
        self,
        folder: Path,
        stems: Mapping[str, str],
        outs: Sequence[OutputTensor],
        metadata: Mapping[str, str],
        shard_size: int | None,
        resume: bool = False,
        create: CreateFile = LocalFile,
    ) -> None:
        self._writers: dict[str, TensorWriter] = {}
        parts: dict[str, list[OutputTensor]] = {component: [] for component in stems}
        for out in outs:
            component, name = _component(out.name, stems)
            parts[component].append(OutputTensor(name, out.dtype_name, out.shape))
        try:
            for component, stem in stems.items():
                (folder / component).mkdir(parents=True, exist_ok=True)
                self._writers[component] = TensorWriter(
                    folder / component, stem, parts[component], metadata, shard_size, resume=resume, create=create
                )
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        places = {
            f"{component}.{name}" if component else name: place
            for component, writer in self._writers.items()
            for name, place in writer.places().items()
        }
        return PlacedFiles, (places,)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write the elements ``values`` (one axis, contiguous, on the CPU) at position ``start`` of a tensor."""
        component, inner = _component(name, self._writers)
        self._writers[component].write(inner, values, start)

    @property
    def resumed(self) -> bool:
        """Whether all files were there."""
        return all(writer.resumed for writer in self._writers.values())

    def credit(self, written: Mapping[str, int]) -> None:
        """Count bytes of tensors as written, since a run that stopped wrote them."""
        for name, count in written.items():
            component, inner = _component(name, self._writers)
            self._writers[component].credit({inner: count})

    def sync(self) -> None:
        """Make everything that was written durable."""
        for writer in self._writers.values():
            writer.sync()

    def finish(self) -> None:
        """Check that every byte was written, make the files durable and write the indexes of shards."""
        for writer in self._writers.values():
            writer.finish()

    def close(self) -> None:
        """Close the files; the writer cannot be used afterwards."""
        for writer in self._writers.values():
            writer.close()


def _component(name: str, components: Mapping[str, object]) -> tuple[str, str]:
    """Return the component of a tensor, and its name there."""
    first, _, rest = name.partition(".")
    return (first, rest) if first in components else ("", name)


def _numel(out: OutputTensor) -> int:
    count = 1
    for size in out.shape:
        count *= size
    return count


def _shards(outs: Sequence[OutputTensor], most: int | None) -> list[list[OutputTensor]]:
    """Divide the tensors, in order, among files of at most ``most`` bytes (a single tensor may be larger)."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for out in outs:
        nbytes = out.nbytes
        if most is not None and shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(out)
        size += nbytes
    return shards


def file_size(outs: Sequence[OutputTensor], metadata: Mapping[str, str]) -> int:
    """Return the bytes of a file with these tensors and this metadata."""
    return _header(outs, metadata)[1]


def _header(outs: Sequence[OutputTensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the header of a file with these tensors in sequence, and the size of the file.

    The header is padded so that the data starts at a multiple of 8.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for out in outs:
        end = position + out.nbytes
        entries[out.name] = {"dtype": out.dtype_name, "shape": out.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + position
