"""Adapters: their changes, statements and names, whatever their format.

The module of a format reads names and config, and makes an :class:`Adapter` of :mod:`merging.sources.changes`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.display.tables import Displayed
from merging.errors import InputError, option
from merging.sources.changes import Change
from merging.sources.origin import Origin

__all__ = ["Adapter", "TensorNames"]


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names in a file for one change.

    Attributes:
        stem: The path of the module.
        names: The names of the lower and the upper factor of a LoRA, or of the only tensor of another change; empty for
            a change of several tensors.
        alpha: Whether the file states an alpha next to them.
    """

    stem: str
    names: tuple[str, ...]
    alpha: bool = False

    @property
    def leaves(self) -> tuple[str, ...]:
        """The parts of the names after the path of the module."""
        return tuple(name[len(self.stem) + 1 :] for name in self.names)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Adapter(Displayed):
    """An adapter: its changes by target, its statements about the base, and notices for the user.

    Attributes:
        path: The folder, file or Hub address.
        changes: The changes, by the names of their targets.
        files: The weights files.
        dialect: The name of its format.
        base: The name of the base that it states.
        config: The fields of its config.
        notices: Remarks for the user.
        about: The type of its changes, in a few words.
        origin: Its place on the Hub.
        base_key: The key of the base's content, if known.
        of_model: Whether a full model made these changes, so that merges of it make models.
        tensor_names: The names in its file, by target.
        configured: Whether the file's header has a config of diffusers for each component.
        packed: Whether it was read from a pack.
    """

    path: Path
    changes: dict[str, Change]
    files: tuple[Path, ...]
    dialect: str
    base: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    about: str = ""
    origin: Origin | None = None
    base_key: str | None = None
    of_model: bool = False
    tensor_names: Mapping[str, TensorNames] = field(default_factory=dict)
    configured: bool = False
    packed: bool = False

    def _display_fields(self) -> dict[str, object]:
        ranks = sorted({change.rank for change in self.changes.values() if change.rank})
        facts = {"path": self.path, "dialect": self.dialect, "about": self.about, "base": self.base}
        return {**facts, "ranks": ranks, "changes": len(self.changes), "notices": self.notices}

    @property
    def names_modules(self) -> bool:
        """Whether its targets are named as the modules of transformers."""
        return self.dialect.startswith(("PEFT", "MLX", "GGUF"))

    def require_base(self, known: Collection[str] = ()) -> None:
        """Check that no change needs the base. Raises :class:`~merging.errors.InputError`.

        Targets in ``known`` pass: another tensor replaces the base's tensor for them.
        """
        for target, change in self.changes.items():
            if change.needs_base and target not in known:
                raise InputError(
                    f"{self.path}: {change.target}: {change.needs_base}: give the base with {option('base')}"
                )
