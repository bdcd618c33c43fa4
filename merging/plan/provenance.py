"""The sources of an output: every model of its recipe, by its commit on the Hub, its ETags, or a key of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from merging.display.tables import Displayed, format_size, plural
from merging.errors import FormatError, explain_invalid
from merging.hub.address import Address
from merging.hub.object_folder import ObjectFolder
from merging.hub.open_model import open_model
from merging.hub.repository import open_repository
from merging.plan.checks import key_of
from merging.plan.layer_stack import LayerStack
from merging.plan.recipe import Entry, Recipe
from merging.plan.tokens.settings import PRESETS
from merging.sources import Adapter, Model, tensors_of
from merging.sources.model_files import COMPANIONS
from merging.sources.small_files import LIST_LIMIT, read_bytes
from merging.sources.tokenizers import TOKENIZER_FILES

__all__ = [
    "SourceRecord",
    "describe_change",
    "etags_of",
    "names_of",
    "parse_sources",
    "record_source",
    "record_sources",
]

_CONFIGS = ("config.json", "adapter_config.json", "*/config.json")


@dataclass(frozen=True, slots=True, repr=False)
class SourceRecord(Displayed):
    """A model that an output was made of, as it was then.

    Attributes:
        model: its name in the recipe.
        commit: the commit of a model on the Hub, which names its bytes; the keys are of local models.
        etags: the ETag of each file that is read of a model in an object store, by its path in the model's folder.
        weights: a key of names, types, shapes, and samples of the values of each tensor.
        files: a key of the whole content of configs and tokenizer files.
        tensors: the number of tensors.
        bytes: the size of the tensors in their files.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str
    commit: str | None = None
    weights: str | None = None
    files: str | None = None
    etags: Mapping[str, str] | None = None
    tensors: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are stated, in plain values."""
        return {name: value for name, value in asdict(self).items() if value}


def names_of(entry: Entry) -> Iterator[str]:
    """Yield the names of all models that a recipe reads, and of those in it."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, LayerStack):
        for part in entry.parts:
            yield from names_of(part.model)
    else:
        for inner in (*entry.models, *([entry.base] if entry.base is not None else [])):
            yield from names_of(inner)
        if entry.tokenizer is not None and entry.tokenizer.source not in PRESETS:
            yield entry.tokenizer.source


def record_sources(
    recipe: Recipe, opened: Mapping[str, Model | None], keys: Mapping[int, str] = MappingProxyType({})
) -> tuple[SourceRecord, ...]:
    """Return records of all models that a recipe reads.

    ``opened`` are models that are open already, by name, and ``keys`` the keys of contents that are known, by the
    identity of the model.
    """
    records = []
    for name in dict.fromkeys(names_of(recipe)):
        model = opened.get(name) or open_model(name, recipe.lora_alpha, recipe.dequantise)
        records.append(record_source(name, model, keys.get(id(model))))
    return tuple(records)


def record_source(name: str, model: Model, key: str | None = None) -> SourceRecord:
    """Return the record of one model, whose content has this key if it is known.

    Headers, samples of the values and small files are read.
    """
    tensors = tensors_of(model)
    size = sum(part.nbytes for part in {id(part): part for each in tensors for part in each.made_of}.values())
    etags = etags_of(model)
    if etags:
        return SourceRecord(str(model.origin), etags=etags, tensors=len(tensors), bytes=size)
    if model.origin is not None:
        return SourceRecord(str(model.origin), commit=model.origin.commit, tensors=len(tensors), bytes=size)
    return SourceRecord(
        model=name, weights=key or key_of(model), files=_files_key(_folder_of(model)), tensors=len(tensors), bytes=size
    )


def etags_of(model: Model) -> dict[str, str]:
    """Return the ETags of the files that are read of a model in an object store, by their paths in its folder.

    Weights, config and tokenizer are read. Any other model has no ETags.
    """
    if model.origin is None or not model.origin.in_store:
        return {}
    folder = open_repository(Address(model.origin.repo, model.origin.commit))
    assert isinstance(folder, ObjectFolder)
    weights = {file.relative_to(folder.folder).as_posix() for file in model.files if folder.folder in file.parents}
    patterns = (*_CONFIGS, *TOKENIZER_FILES, *COMPANIONS)
    return {
        name: stored.version
        for name, stored in folder.objects.items()
        if name in weights or any(fnmatch(name, pattern) for pattern in patterns)
    }


def _folder_of(model: Model) -> Path | None:
    if isinstance(model, Adapter):
        return model.path if model.path.is_dir() else None
    return model.folder


def _files_key(folder: Path | None) -> str | None:
    """Return a key of the files that decide the output's config and tokenizer, None without such a file."""
    if folder is None:
        return None
    patterns = (*_CONFIGS, *TOKENIZER_FILES, *COMPANIONS)
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(read_bytes(path, LIST_LIMIT)).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16] if files else None


def parse_sources(text: str, where: str) -> dict[str, SourceRecord]:
    """Return records from the JSON of a header, by the names of their models.

    Raises :class:`~merging.errors.FormatError` for a text that is not a list of records.
    """
    try:
        records = TypeAdapter(list[SourceRecord]).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        problem = ": ".join([*map(str, first["loc"][-1:]), explain_invalid(first)])
        raise FormatError(f"{where}: its list of sources is not understood: {problem}") from None
    return {record.model: record for record in records}


def describe_change(then: SourceRecord, now: SourceRecord) -> str | None:
    """Return the difference of a model from its record as a sentence's end, None if there is none that shows."""
    if then.commit != now.commit:
        return f"is at commit {now.commit}, and was at {then.commit}"
    if then.etags != now.etags:
        old, new = then.etags or {}, now.etags or {}
        name = min(each for each in {*old, *new} if old.get(each) != new.get(each))
        return f"has another {name} than then (ETag {old.get(name, 'none')} then, {new.get(name, 'none')} now)"
    if then.weights != now.weights:
        counts = [f"{plural(each.tensors, 'tensor')}, {format_size(each.bytes)}" for each in (then, now)]
        sizes = "" if counts[0] == counts[1] else f": {counts[0]} then, {counts[1]} now"
        return f"has other weights than then (content {then.weights} then, {now.weights} now){sizes}"
    if then.files != now.files:
        return "has the same weights, but another config or tokenizer than then"
    return None
