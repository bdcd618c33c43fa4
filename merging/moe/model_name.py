"""Names of models in recipes of mixtures: a path, a name on the Hub, or either with a LoRA on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merging.plan.mergekit.models import read_model
from merging.plan.mergekit.reading import Reading
from merging.plan.recipe_document import Keys
from merging.plan.recipe_files import resolve_name

__all__ = ["ModelName", "read_model_name"]


@dataclass(frozen=True, slots=True)
class ModelName:
    """The name of a model, and of a LoRA on it if there is one; each is a path or ``org/name@revision``."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return self.model if self.lora is None else f"{self.model}+{self.lora}"


def read_model_name(reading: Reading, keys: Keys, folder: Path | None) -> ModelName:
    """Read a model's name: ``path``, ``org/name@revision``, ``model+lora``, or a mapping of these.

    Args:
        reading: the document.
        keys: the way to the name.
        folder: the recipe's folder, to which relative paths are relative; None for the working folder.

    Raises:
        OptionError: for other values, and for unknown keys.
    """
    entry = read_model(reading, keys, folder or Path())
    names = [entry] if isinstance(entry, str) else [entry["base"], *entry["models"]]
    if folder is not None:
        for index, name in enumerate(names):
            names[index], notice = resolve_name(name, folder, reading.document.origin(keys))
            reading.notices.extend([notice] if notice else [])
    return ModelName(*names)
