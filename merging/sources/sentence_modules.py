"""The modules of sentence-transformers: the folders that modules.json and routers list, and their settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merging.errors import FormatError
from merging.sources.links import check_inside
from merging.sources.small_files import is_there, read_json, read_json_list

__all__ = ["MODULES", "ROUTER", "SENTENCE_FILES", "module_paths", "module_settings"]

MODULES = "modules.json"
"""The file that marks the folder of a sentence-transformers model."""

ROUTER = "router_config.json"
"""The file of a module that sends queries and documents to modules of their own, which are folders in its folder."""

SENTENCE_FILES = (
    MODULES,
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    ROUTER,
    "[0-9]_*/config.json",
    f"[0-9]_*/{ROUTER}",
    "*_[0-9]_*/config.json",
    "[0-9]_*/*_[0-9]_*/config.json",
)
"""Files that make an encoder a model of sentence-transformers."""

_FORMER_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How versions before 6 state the modes of a pooling, and the modes' names since."""


def module_paths(folder: Path) -> list[str]:
    """Return the folders of a model's modules, relative to its own, which is "". Modules in routers are listed too.

    Raises :class:`~merging.errors.FormatError` for lists that cannot be understood.
    """
    return list(dict.fromkeys(path for path, _ in _modules(folder)))


def module_settings(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the kind of each module with its settings, in order. An encoder's config is not among them.

    Raises :class:`~merging.errors.FormatError` as :func:`module_paths` does.
    """
    found = []
    for path, kind in _modules(folder):
        encoder = path == "" or is_there(folder / path / "sentence_bert_config.json")
        stated = {} if encoder else _read_config(folder, path)
        modes = [mode for key, mode in _FORMER_POOLING.items() if stated.get(key) is True]
        settings = {
            key: value for key, value in stated.items() if key == "pooling_mode" or key == "activation_function"
        }
        found.append((kind, settings | ({"pooling_mode": modes[0] if len(modes) == 1 else modes} if modes else {})))
    return found


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the path and the name of the class of each module."""
    index = folder / MODULES
    for module in read_json_list(index):
        path, kind = (module.get(key) for key in ("path", "type")) if isinstance(module, dict) else (None, None)
        if not isinstance(path, str):
            raise FormatError(f"{index}: is not a list of modules with their paths")
        kind = str(kind).rpartition(".")[2]
        yield path, kind
        if kind in ("Router", "Asym"):
            for name, inner in _modules_of_router(folder, path):
                yield (f"{path}/{name}" if path else name), inner


def _modules_of_router(folder: Path, path: str) -> Iterator[tuple[str, str]]:
    """Yield the names of the folders in a router's folder, and the names of their modules' classes."""
    listed = _read_config(folder, path, ROUTER) or _read_config(folder, path)
    types = listed.get("types")
    if not isinstance(types, dict):
        raise FormatError(f"{folder / path / ROUTER}: is not a router's list of modules")
    for name, kind in types.items():
        yield name, str(kind).rpartition(".")[2]


def _read_config(folder: Path, path: str, name: str = "config.json") -> dict[str, Any]:
    """Return the settings in a module's folder, {} if there are none."""
    file = check_inside(folder / path / name, folder)
    return read_json(file) if is_there(file) else {}
