"""Folders that hold several models: diffusers pipelines, and sentence-transformers' modules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.links import check_inside
from merging.sources.model_files import PIPELINE
from merging.sources.sentence_modules import MODULES, module_paths
from merging.sources.small_files import is_there, read_json
from merging.sources.weight_files import find_weights, is_plain_name

__all__ = ["MODULES", "PIPELINE", "components_of"]


def components_of(folder: Path) -> dict[str, Path]:
    """Return the folders with weights that make up a model, by component; empty for an ordinary folder.

    The component "" is in the folder itself. Raises :class:`~merging.errors.FormatError` for a list of components that
    cannot be understood.
    """
    if is_there(folder / PIPELINE):
        listed = read_json(folder / PIPELINE)
        names: Iterable[Any] = (name for name, made_of in listed.items() if isinstance(made_of, list) and any(made_of))
        found = _with_weights(folder, folder / PIPELINE, names)
        if not found:
            raise FormatError(f"{folder / PIPELINE}: none of its components has weights here: complete the download")
        return found
    if is_there(folder / MODULES):
        found = _with_weights(folder, folder / MODULES, module_paths(folder))
        return found if found.keys() != {""} else {}
    return {}


def _with_weights(folder: Path, index: Path, names: Iterable[Any]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in names:
        plain = isinstance(name, str) and all(map(is_plain_name, name.split("/")[:2])) and name.count("/") < 2
        if name != "" and not plain:  # the folder itself may be a component
            raise FormatError(f"{index}: {str(name)[:200]!r} is not a plain name of a folder")
        if (folder / name).is_dir() and find_weights(check_inside(folder / name, folder)) is not None:
            found[name] = folder / name
    return found
