"""Full checkpoints: one file, or shards, of safetensors, PyTorch or GGUF, opened from their headers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merging.display.tables import Displayed
from merging.errors import FormatError
from merging.sources.components import MODULES, PIPELINE, components_of
from merging.sources.gguf.files import read_model
from merging.sources.model_config import read_config
from merging.sources.opening import FileOpener, open_tensors
from merging.sources.origin import Origin
from merging.sources.pickled import PYTORCH_ENDINGS
from merging.sources.quantized.quantized_parts import QuantizedParts
from merging.sources.quantized.quantized_weights import dequantize_tensors, refuse_quantized
from merging.sources.small_files import is_there
from merging.sources.stored import Stored
from merging.sources.tied_weights import HEADS, stated_tie, text_config, tied_to
from merging.sources.training_leftovers import refuse_ungathered, strip_wrappers
from merging.sources.weight_files import (
    agree,
    check_absent,
    gguf_shards,
    is_standard,
    refuse_shard,
    shards_of,
    shards_without_index,
    stem_of,
    weights_of,
)

__all__ = [
    "HEADS",
    "Checkpoint",
    "config_layers",
    "content_key",
    "files_key",
    "open_checkpoint",
    "text_config",
]

_LOOKED_AT, _SAMPLE = 1 << 11, 1 << 8
"""The largest number of tensors that a model's key uses, and the number of elements from the middle of each."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Checkpoint(Displayed):
    """A full model: its tensors by their names on disk, and its config.

    Attributes:
        path: The folder, file or Hub address.
        tensors: The tensors by name; in a pipeline names are ``COMPONENT.name``.
        files: The weights files.
        config: The fields of config.json.
        folder: The folder of config and tokenizer, None for a bare file.
        shared: Tensors of a PyTorch file that share memory with another tensor, and the name of the other.
        origin: Its place on the Hub.
        stem: The name of its weights files without the ending.
        components: The models of a pipeline, each in a folder of its own.
        single: The prefixes of stacks that have one block only, where other blocks were taken out.
        quantized: The quantised weights as the files hold them, where ``tensors`` reads them as ordinary numbers.
    """

    path: Path
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    shared: dict[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    stem: str = "model"
    components: dict[str, Checkpoint] = field(default_factory=dict)
    single: tuple[str, ...] = ()
    quantized: QuantizedParts | None = None

    def _display_fields(self) -> dict[str, object]:
        size = sum(stored.numel for stored in self.tensors.values())
        facts = {"path": self.path, "tensors": len(self.tensors), "parameters": size, "files": len(self.files)}
        return {**facts, "layers": self.layers, "components": tuple(self.components)}

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return stated_tie(self.config, self.tensors)

    @property
    def layers(self) -> int | None:
        """The number of blocks that the config states, if any."""
        return config_layers(self.config)

    @property
    def library(self) -> str:
        """The library that loads it, by its name on the Hub."""
        if "_class_name" in self.config or (self.folder and (self.folder / PIPELINE).is_file()):
            return "diffusers"
        listed = self.folder is not None and (self.folder / MODULES).is_file()
        return "sentence-transformers" if listed else "transformers"

    def lookup(self, name: str) -> Stored | None:
        """Return the tensor of this name; for a tied weight that is not stored, the tensor that it is tied to."""
        stored = self.tensors.get(name)
        if stored is None:
            source = tied_to(name, self.tensors, self.tied)
            return None if source is None else self.tensors[source]
        return stored

    def narrow(self, components: Iterable[str]) -> Checkpoint:
        """Return the same model with the tensors of these components only."""
        kept = {name: self.components[name] for name in components}
        return replace(self, tensors=_prefix_names(kept))


def _prefix_names(components: Mapping[str, Checkpoint]) -> dict[str, Stored]:
    return {
        f"{name}.{inner}" if name else inner: stored
        for name, component in components.items()
        for inner, stored in component.tensors.items()
    }


def config_layers(config: dict[str, Any]) -> int | None:
    """Return the number of blocks that a model's config states, None if it states none."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        value = text_config(config).get(key, config.get(key))
        if type(value) is int and value > 0:
            return value
    return None


def open_checkpoint(path: Path, dequantize: bool = False, open_file: FileOpener = open_tensors) -> Checkpoint:
    """Open a model's folder or weights file; headers are read, values are not.

    Args:
        path: A folder, a weights file, or an index of shards.
        dequantize: Whether weights that are quantised in a simple way are read as ordinary numbers.
        open_file: The function that opens each weights file.

    Raises:
        FormatError: A file is damaged or quantised, or an index disagrees with its shards.
        InputError: The folder holds no weights.
    """
    folders = components_of(path) if path.is_dir() else {}
    if folders:
        return _compose(path, {name: _open_one(path / name, dequantize, open_file) for name, folder in folders.items()})
    return _open_one(path, dequantize, open_file)


def _compose(path: Path, components: dict[str, Checkpoint]) -> Checkpoint:
    files = tuple(file for component in components.values() for file in component.files)
    config = components[""].config if "" in components else {}
    return Checkpoint(path, _prefix_names(components), files, config, path, components=components)


def _open_one(path: Path, dequantize: bool, open_file: FileOpener) -> Checkpoint:
    weights = path if path.is_file() else weights_of(path)
    if weights.suffix == ".gguf":
        return _open_gguf(path, weights, dequantize, open_file)
    named = is_standard(weights.name)
    folder = weights.parent if path.is_dir() or (named and is_there(weights.parent / "config.json")) else None
    config = read_config(folder / "config.json") if folder and is_there(folder / "config.json") else {}
    tensors: dict[str, Stored] = {}
    shared: dict[str, str] = {}
    absent: dict[str, Path] = {}
    files = _files_of(weights, path.is_dir())
    for file, expected in files.items():
        pickled = file.suffix in PYTORCH_ENDINGS
        found, extra = open_file(file)
        if expected is not None:
            absent |= dict.fromkeys(agree(weights, file, expected, set(found)), file)
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise FormatError(f"{file}: holds {twice}, which another shard holds too: get them again together")
        tensors.update(found)
        shared.update(extra if pickled else {})
    if not tensors:
        raise FormatError(f"{path}: holds no tensors")
    check_absent(weights, absent, tensors, config)
    refuse_ungathered(path, tensors)
    names = strip_wrappers(tensors)
    tensors = {names[name]: stored for name, stored in tensors.items()}
    shared = {names[name]: names[other] for name, other in shared.items()}
    plain, config_left, quantized = tensors, config, None
    if dequantize:
        plain, config_left, quantized = dequantize_tensors(path, tensors, config)
    refuse_quantized(path, plain, config, dequantize)
    # A PyTorch file repeats tied weights under every name; written once, transformers ties them again.
    untied = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings")) is False
    for name in () if untied else shared:
        del plain[name]
    return Checkpoint(
        path=path,
        tensors=plain,
        files=tuple(files),
        config=config_left,
        folder=folder,
        shared=shared,
        stem=stem_of(weights),
        quantized=quantized if quantized and quantized.weights else None,
    )


def _open_gguf(path: Path, weights: Path, dequantize: bool, open_file: FileOpener) -> Checkpoint:
    """Open a model in GGUF files, with a config made of its metadata."""
    files = gguf_shards(weights)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, stated = open_file(file)
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise FormatError(f"{file}: holds {twice}, which another shard holds too: get them again together")
        tensors |= found
        metadata = metadata or stated
    if not tensors:
        raise FormatError(f"{path}: holds no tensors")
    model = read_model(path, tensors, metadata, dequantize)
    return Checkpoint(path=path, tensors=model.tensors, files=tuple(files), config=model.config)


def _files_of(weights: Path, in_folder: bool) -> Mapping[Path, set[str] | None]:
    """Return the weights files of a model, each with the tensor names that an index lists for it."""
    if weights.suffix == ".json":
        return shards_of(weights, given=not in_folder)
    if not in_folder:
        refuse_shard(weights)
    shards = shards_without_index(weights.parent) if in_folder else []
    return dict.fromkeys(shards if weights in shards else [weights])


def content_key(tensors: Mapping[str, Stored]) -> str:
    """Return a short key of a model's content: names, dtypes, shapes, and a few values, so that 100 GB cost nothing.

    The key does not depend on shards or order. Of very many tensors, values of an evenly spaced part are read.
    """
    digest = hashlib.sha256()
    names = sorted(tensors)
    stride = -(-len(names) // _LOOKED_AT) or 1
    for first in range(0, len(names), stride):
        some = [(name, tensors[name]) for name in names[first : first + stride]]
        lines = [f"{name} {stored.dtype_name} {stored.shape}\n".encode() for name, stored in some]
        stored = some[0][1]
        count = min(_SAMPLE, stored.numel)
        digest.update(lines[0] + stored.read_bytes((stored.numel - count) // 2, count) + b"".join(lines[1:]))
    return digest.hexdigest()[:16]


def files_key(tensors: Mapping[str, Stored]) -> str:
    """Return a short key of the content of files that are not downloaded yet, from their hashes on the Hub."""
    return hashlib.sha256("".join(sorted({stored.source() for stored in tensors.values()})).encode()).hexdigest()[:16]
