"""The names of the files in one model's folder, and the detection of foreign files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from merging.errors import FormatError
from merging.sources.pickled import PYTORCH_ENDINGS
from merging.sources.sentence_modules import MODULES, SENTENCE_FILES, module_paths
from merging.sources.small_files import read_json
from merging.sources.tokenizers import TOKENIZER_FILES
from merging.sources.weight_files import is_standard

__all__ = ["COMPANIONS", "IN_PIPELINES", "MODULES", "PIPELINE", "foreign_names"]

PIPELINE = "model_index.json"
"""The file that marks the folder of a diffusers pipeline."""

COMPANIONS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    *SENTENCE_FILES,
    PIPELINE,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that make a folder of weights a model. Code is never copied, since it would run in the name of the merge."""

IN_PIPELINES = ("scheduler_config.json", "config.json", "*_config.json")

_BESIDE = (
    *TOKENIZER_FILES,
    *COMPANIONS,
    *IN_PIPELINES,
    "README.md",
    ".gitattributes",
    "modeling_*.py",
    "configuration_*.py",
    "tokenization_*.py",
    "recycling.json",  # the report of a recycled adapter
    "recycling.html",
    "search.json",  # the report of a search, and its recipe
    "search.html",
    "recipe.yml",
)
"""Files that may be next to a model's weights, as libraries and this program write them."""

_WEIGHTS = (".safetensors", *PYTORCH_ENDINGS)

_INDEX = re.compile(r".+\.(safetensors|bin)(\.index)?(\.[\w-]+)?(\.index)?\.json")

_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")

_TEMPLATES = "additional_chat_templates"


def foreign_names(folder: Path) -> list[str]:
    """Return the names in a folder that do not belong to one model, of weights and their companions.

    If a folder has the files of several models or adapters, all weights but the first one's are foreign. In a folder
    without weights everything is foreign.
    """
    parts = _components(folder)
    foreign, weights = _sort_files(folder)
    inside = [path for path in folder.iterdir() if path.is_dir()]
    for path in inside:  # the folders in a router's folder follow it
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or name not in parts:
            foreign += [] if name == _TEMPLATES and _holds_templates(path) else [f"{name}/"]
            continue
        odd, more = _sort_files(path)
        inside += [each for each in path.iterdir() if each.is_dir()]
        foreign += [f"{name}/{each}" for each in odd]
        weights = weights or more
    if not weights:
        return sorted(path.name for path in folder.iterdir())
    return sorted(foreign)


def _sort_files(folder: Path) -> tuple[list[str], bool]:
    """Return the foreign files of a folder, and whether it holds weights that are not foreign."""
    foreign = []
    models: dict[str, list[str]] = {}
    for path in sorted(path for path in folder.iterdir() if not path.is_dir()):
        if not path.is_file():
            foreign.append(path.name)
        elif path.suffix in _WEIGHTS and not any(fnmatch(path.name, pattern) for pattern in _BESIDE):
            models.setdefault(_model_of(path), []).append(path.name)
        elif not _INDEX.fullmatch(path.name) and not any(fnmatch(path.name, pattern) for pattern in _BESIDE):
            foreign.append(path.name)
    kept = "" if "" in models else next(iter(models), None)
    return foreign + [name for model, names in models.items() if model != kept for name in names], bool(models)


def _model_of(weights: Path) -> str:
    """Return the part of a weights file's name that distinguishes models; "" for a standard name."""
    stem = _SHARD.sub("", weights.stem)
    return "" if is_standard(f"{stem}{weights.suffix}") else stem


def _components(folder: Path) -> set[str]:
    """Return the folders that a model's list of components or modules names."""
    return {name for name in _component_names(folder) if isinstance(name, str)}


def _component_names(folder: Path) -> Iterator[object]:
    try:
        if (folder / PIPELINE).is_file():
            yield from (name for name, made_of in read_json(folder / PIPELINE).items() if isinstance(made_of, list))
        if (folder / MODULES).is_file():
            yield from module_paths(folder)
    except FormatError:
        return


def _holds_templates(folder: Path) -> bool:
    return all(path.suffix == ".jinja" and path.is_file() for path in folder.iterdir())
