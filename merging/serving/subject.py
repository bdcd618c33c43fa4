"""A model that is to be served, as it is on disk. It is not interpreted, so that rules can find what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from merging.errors import FormatError, InputError, MergingError
from merging.hub.address import Address, hub_address, local_path, no_such_path
from merging.sources import Dialect, dialect_of, diffusion_loras, mlx, peft
from merging.sources.components import PIPELINE, components_of
from merging.sources.links import check_inside
from merging.sources.model_config import read_config
from merging.sources.opening import FileOpener, open_tensors
from merging.sources.peft.adapter_types import PEFT_TYPES
from merging.sources.peft.config import Config
from merging.sources.small_files import is_there, read_json
from merging.sources.stored import Stored
from merging.sources.tied_weights import text_config
from merging.sources.weight_files import (
    agree,
    check_suffix,
    find_weights,
    is_shard,
    is_standard,
    refuse_shard,
    shards_of,
    shards_without_index,
    weights_of,
)

__all__ = ["Subject", "SubjectKind", "open_subject", "open_weights"]

SubjectKind = Literal["adapter", "diffusion adapter", "model", "pack", "pipeline"]

_CONFIG = "adapter_config.json"
_SHARED, _PREFIX = "base_model.", "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An adapter, a model, or a pipeline of several, with its tensors by their names on disk.

    Attributes:
        name: The path or address, as it was given.
        pinned: The path, or the address at the commit that was opened.
        kind: The kind of model.
        tensors: The tensors by their names on disk.
        metadata: The metadata of the files' headers.
        config: The content of adapter_config.json, config.json or model_index.json; None without one.
        files: The names of the files in the folder.
        weights: The file with the tensors, or their index; None for a pipeline, which has several.
        folder: The folder; None for a bare file.
        base: The config of an adapter's base, as far as it is known.
        base_path: The folder of an adapter's base on this machine, if it is known.
        max_rank: The largest rank that servers are started for; None for their own default.
        values: Whether rules may read values.
        remote: Whether the model is on the Hub.
    """

    name: str
    pinned: str
    kind: SubjectKind
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    config: dict[str, Any] | None
    files: frozenset[str]
    weights: Path | None
    folder: Path | None
    base: dict[str, Any] = field(default_factory=dict)
    base_path: Path | None = None
    max_rank: int | None = None
    values: bool = False
    remote: bool = False

    @property
    def stated(self) -> dict[str, Any]:
        """The config, empty where there is none."""
        return self.config or {}

    @cached_property
    def settings(self) -> Config:
        """The config of a PEFT adapter for lookups. All rules share the time limit of its patterns."""
        return Config(self.stated, self.name)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of a model's config about its language model."""
        return text_config(self.stated)

    @cached_property
    def is_mlx(self) -> bool:
        """Whether it is an adapter of MLX, whose factors and config have names of its own."""
        if self.kind != "adapter" or self.weights is None:
            return False
        dialect = dialect_of((dict(self.tensors), dict(self.metadata)))
        return self.weights.name == mlx.WEIGHTS or (dialect is not None and dialect.name == "MLX")

    @property
    def method(self) -> str:
        """PEFT's name of an adapter's type."""
        return str(self.stated.get("peft_type") or "LORA")

    @cached_property
    def modules(self) -> dict[str, dict[str, Stored]]:
        """The tensors of a PEFT adapter by the path of their module in the model and by leaf (``lora_A``)."""
        found: dict[str, dict[str, Stored]] = {}
        leaf = PEFT_TYPES[self.method].leaf if self.method in PEFT_TYPES else None
        for name, stored in self.tensors.items():
            path = name.removeprefix(_PREFIX)
            match = leaf.search(path.replace(".default", "")) if leaf else None
            # Tensors that all modules share are outside of the model's prefix.
            if match and name.startswith(_SHARED) and not name.startswith(_PREFIX):
                continue
            if match and match[2] != ".bias":
                found.setdefault(path[: match.start()], {})[match[1]] = stored
        return found

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module of a LoRA, by its down factor. Stacked experts, with one rank each, are left out."""
        downs = {
            path: parts.get("lora_A", parts.get("lora_embedding_A"))
            for path, parts in self.modules.items()
            if not path.removesuffix(".base_layer").endswith("experts")
        }
        return {path: down.shape[0] for path, down in downs.items() if down is not None and down.shape}


def open_subject(name: str, *, base: str | None = None, max_rank: int | None = None, values: bool = False) -> Subject:
    """Open the model at a path or at an address on the Hub, without interpreting it.

    Args:
        name: The path or address.
        base: The path or address of an adapter's base. By default, the path that the adapter's config states.
        max_rank: The largest rank that servers are started for; None for their own default.
        values: Whether rules may read values.

    Raises:
        merging.errors.MergingError: For files that cannot even be opened.
    """
    location = _locate(name)
    path = location.path
    if not path.exists():
        raise no_such_path(path)
    try:
        folder, weights, config = _find_files(path)
        tensors, metadata = open_weights(weights, location.open_file)
        read = read_config if config is not None and config.name == "config.json" else read_json
        stated = read(config) if config is not None else None
    except MergingError as error:
        raise type(error)(str(error).replace(str(path), name)) from None
    dialect = dialect_of((tensors, metadata)) if tensors else None
    base_path, base_config = _base_of(base, stated or {})
    return Subject(
        name=name,
        pinned=location.pinned,
        kind=_kind(config, dialect),
        tensors=tensors,
        metadata=metadata,
        config=stated,
        files=location.files if location.files is not None else _names(folder),
        weights=weights.get(""),
        folder=folder,
        base=base_config,
        base_path=base_path,
        max_rank=max_rank,
        values=values,
        remote=location.remote,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Location:
    """The place of a model: its path, its pinned name, and for a model on the Hub the files there."""

    path: Path
    pinned: str
    open_file: FileOpener = open_tensors
    files: frozenset[str] | None = None
    remote: bool = False


def _locate(name: str) -> _Location:
    address = hub_address(name)
    if address is None:
        return _Location(path=local_path(name), pinned=name)
    from merging.hub.repository import open_repository

    repository = open_repository(address)
    path = repository.folder / address.path
    folder = path if path.is_dir() else path.parent
    start = str(folder.relative_to(repository.folder)).removeprefix(".")
    start = f"{start}/" if start else ""
    return _Location(
        path=path,
        pinned=str(Address(address.repo, repository.commit, address.path)),
        open_file=repository.open_file,
        files=frozenset(each.removeprefix(start) for each in repository.sizes if each.startswith(start)),
        remote=True,
    )


def _find_files(path: Path) -> tuple[Path | None, dict[str, Path], Path | None]:
    """Return the folder, the weights by component, and the config.

    A standard file in a folder stands for the folder.
    """
    if path.is_file():
        if path.name in (*peft.WEIGHTS, _CONFIG) and is_there(path.parent / _CONFIG):
            return _find_files(path.parent)
        if path.suffix != ".json":
            check_suffix(path)
            refuse_shard(path)
        if is_standard(path.name) and is_there(path.parent / "config.json"):
            return path.parent, {"": path}, path.parent / "config.json"
        return None, {"": path}, None
    if is_there(path / PIPELINE):
        found = {name: find_weights(inner) for name, inner in components_of(path).items()}
        return path, {name: weights for name, weights in found.items() if weights}, path / PIPELINE
    if is_there(path / _CONFIG):
        named = next((path / name for name in (*peft.WEIGHTS, mlx.WEIGHTS) if (path / name).is_file()), None)
        if named is None:
            raise FormatError(f"{path}: has an {_CONFIG}, but neither {peft.WEIGHTS[0]} nor {peft.WEIGHTS[1]}")
        return path, {"": check_inside(named, path)}, path / _CONFIG
    known = next((path / name for name in (*peft.WEIGHTS, *diffusion_loras.WEIGHTS) if (path / name).is_file()), None)
    config = path / "config.json" if is_there(path / "config.json") else None
    return path, {"": check_inside(known, path) if known else weights_of(path)}, config


def open_weights(
    weights: Mapping[str, Path], open_file: FileOpener = open_tensors
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors, prefixed by their components, and the metadata. Shards must match their index."""
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for component, file in weights.items():
        alone = shards_without_index(file.parent) if is_shard(file.name) else [file]
        shards = shards_of(file) if file.suffix == ".json" else dict.fromkeys(alone)
        for shard, promised in shards.items():
            found, noted = open_file(shard)
            if promised is not None:
                agree(file, shard, promised, set(found))
            tensors.update({f"{component}.{name}" if component else name: found[name] for name in found})
            metadata.update(noted)
    return tensors, metadata


def _names(folder: Path | None) -> frozenset[str]:
    """Return the files of a folder and of its components."""
    found = [] if folder is None else [*folder.glob("*"), *folder.glob("*/*")]
    return frozenset(path.relative_to(folder).as_posix() for path in found if folder)


def _kind(config: Path | None, dialect: Dialect | None) -> SubjectKind:
    if config is not None and config.name in (PIPELINE, _CONFIG):
        return "pipeline" if config.name == PIPELINE else "adapter"
    if dialect is None:
        return "model"
    kinds: dict[str, SubjectKind] = {"PEFT": "adapter", "MLX": "adapter", "GGUF": "adapter", "pack": "pack"}
    return kinds.get(dialect.name, "diffusion adapter")


def _base_of(base: str | None, stated: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """Return the base's folder on this machine, if there is one, and its config.

    The config of a base that was given by its address is read on the Hub.
    """
    address = hub_address(base) if base else None
    if address is not None:
        from merging.hub.repository import open_repository

        config = open_repository(address).folder / address.path / "config.json"
        return None, read_config(config) if is_there(config) else {}
    said = base or stated.get("base_model_name_or_path")
    path = local_path(said) if isinstance(said, str) and said else None
    if path is None or not path.is_dir():
        if base:
            raise InputError(f"{base}: there is no such base: name its folder, or ORG/NAME on the Hub")
        return None, {}
    return path, read_config(path / "config.json") if is_there(path / "config.json") else {}
