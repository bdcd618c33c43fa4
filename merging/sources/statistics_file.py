"""Files with statistics of a model's layers, gathered from examples: opened from the header, read layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.display.tables import Displayed
from merging.errors import FormatError
from merging.maths.layer_statistics import InputGram, LayerStatistics
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.small_files import parse_json
from merging.sources.stored import Stored, open_safetensors

__all__ = [
    "DIRECTIONS",
    "FISHER",
    "FORMAT",
    "LEADING",
    "REST",
    "SIZES",
    "StatisticsFile",
    "StoredStatistics",
    "open_statistics",
]

FORMAT = "merging statistics 1"
"""The mark of a file with statistics in its header, with the version of the layout."""

LEADING, DIRECTIONS, SIZES, REST, FISHER = "leading", "directions", "sizes", "rest", "fisher"
"""The parts of a layer's statistics; a tensor of the file is called ``PART/NAME``."""

_PARTS = (LEADING, DIRECTIONS, SIZES, REST)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StatisticsFile(Displayed):
    """A file with statistics of one model.

    Attributes:
        path: the file.
        tensors: its tensors by name.
        model: the name of the model when the statistics were gathered.
        key: the key of the model's content.
        origin: the model's address on the Hub with its commit, empty for local models.
        shared: the layers whose inputs are another layer's, and the name of the other.
        fisher_size: the root mean square of the Fisher information over the model; 0 without it.
        facts: the other entries of the header, such as the number of examples.
    """

    path: Path
    tensors: Mapping[str, Stored]
    model: str
    key: str
    origin: str
    shared: Mapping[str, str]
    fisher_size: float
    facts: Mapping[str, Any]

    def _display_fields(self) -> dict[str, object]:
        return {"path": self.path, "model": self.model, "key": self.key, "tensors": len(self.tensors), **self.facts}

    @property
    def has_inputs(self) -> bool:
        """Whether it has Gram matrices of inputs."""
        return any(name.startswith(f"{REST}/") for name in self.tensors)

    @property
    def has_fisher(self) -> bool:
        """Whether it has the diagonal of the Fisher information."""
        return any(name.startswith(f"{FISHER}/") for name in self.tensors)

    def layers(self, part: str) -> dict[str, str]:
        """Return the names of all layers with a part (``rest`` or ``fisher``), and the layer that holds it."""
        own = {name.partition("/")[2]: name.partition("/")[2] for name in self.tensors if name.startswith(f"{part}/")}
        return own if part == FISHER else own | dict(self.shared)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StoredStatistics(LayerStatistics):
    """The statistics of one layer in a file: the names of the layers that hold its parts, None without a part."""

    file: StatisticsFile
    inputs: str | None
    fisher: str | None

    def read_inputs(self) -> InputGram | None:
        if self.inputs is None:
            return None
        parts = [self.file.tensors[f"{part}/{self.inputs}"].read() for part in _PARTS]
        if not all(bool(part.isfinite().all()) for part in parts) or bool((parts[-1] < 0).any()):
            raise FormatError(f"{self.file.path}: the statistics of {self.inputs} are damaged: gather them again")
        leading, directions, sizes, rest = (part.double() for part in parts)
        return InputGram(torch.cat([leading, directions * sizes], 1), rest)

    def read_fisher(self, start: int, count: int) -> Tensor | None:
        if self.fisher is None:
            return None
        stored = self.file.tensors[f"{FISHER}/{self.fisher}"]
        values = torch.empty(count, dtype=stored.dtype)
        stored.read_into(values, start)
        found = values.float()
        if not bool(found.isfinite().all()) or bool((found < 0).any()):
            raise FormatError(
                f"{self.file.path}: the Fisher information of {self.fisher} has NaN, infinities or negative numbers: "
                f"gather it again"
            )
        return found


def open_statistics(path: Path) -> StatisticsFile:
    """Open a file with statistics of a model. Raises :class:`~merging.errors.FormatError` for any other file."""
    tensors, metadata = open_safetensors(path)
    if metadata.get("statistics") != FORMAT:
        raise FormatError(f"{path}: holds no statistics of a model's layers, which merge stats gathers")
    try:
        facts = parse_json(metadata["facts"], str(path))
        shared = {str(name): str(other) for name, other in parse_json(metadata["shared"], str(path)).items()}
        key, model, size = metadata["key"], metadata["model"], float(metadata["fisher_size"])
    except (KeyError, ValueError):
        raise FormatError(f"{path}: its header is damaged: gather the statistics again") from None
    file = StatisticsFile(path, tensors, model, key, metadata.get("origin", ""), shared, size, facts)
    _check_parts(file)
    return file


def _check_parts(file: StatisticsFile) -> None:
    """Check names and shapes. Raises :class:`~merging.errors.FormatError`."""
    for name, holder in file.layers(REST).items():
        parts = [file.tensors.get(f"{part}/{holder}") for part in _PARTS]
        shapes = [part.shape if part is not None and part.floating else () for part in parts]
        leading, directions, sizes, rest = shapes
        if (
            len(directions) != 2
            or len(leading) != 2
            or sizes != directions[1:]
            or not rest == directions[:1] == leading[:1]
        ):
            raise FormatError(f"{file.path}: the statistics of {name} are incomplete: gather them again")
