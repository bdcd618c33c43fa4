"""A pack while it is made: its coded tensors, their losses, and the file that they are written into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import median

from merging.engine.spool import Spool
from merging.maths.delta import Dense
from merging.maths.lazy_torch import Tensor
from merging.maths.sums import safe_ratio
from merging.sources.dtypes import DTYPE_NAMES, DTYPES
from merging.sources.packs import PACK_KEY, Described, PackManifest, payload_name
from merging.sources.packs.codings import Bands, Packed, Raw, Sparse, Ternary
from merging.sources.stored import MappedTensor
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter
from merging.version import __version__

__all__ = ["Assembly", "Losses", "OutputErrors", "as_read"]


def as_read(described: Described, payload: Tensor) -> Packed:
    """Return a coded tensor as a reader of the pack will have it."""
    assert isinstance(described.coding, (Ternary, Sparse, Bands))
    return Packed(described.name, described.kind, described.shape, MappedTensor(payload, ("", 0)), described.coding)


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Squared errors of a layer's outputs on examples, and the squared length of the outputs of its change.

    ``plain`` is the error of rounding without the examples.
    """

    error: float
    plain: float
    norm: float

    def scaled(self, factor: float) -> OutputErrors:
        """Return the same of outputs whose squares are multiplied by a factor."""
        return OutputErrors(self.error * factor, self.plain * factor, self.norm * factor)


@dataclass(slots=True)
class Losses:
    """The squared error and the squared norm of every change, by target; also of some layers' outputs."""

    squares: dict[str, tuple[float, float]] = field(default_factory=dict)
    outputs: dict[str, OutputErrors] = field(default_factory=dict)

    def add(self, target: str, error: float, norm: float) -> None:
        """Add the squared error and the squared norm of a change."""
        self.squares[target] = (max(0.0, error), norm)

    @property
    def relative(self) -> dict[str, float]:
        """The relative error of each change (Frobenius norms)."""
        return {target: sqrt(safe_ratio(error, norm)) for target, (error, norm) in self.squares.items()}

    @property
    def overall(self) -> float:
        """The relative error of all changes together."""
        errors, norms = (sum(each) for each in zip(*self.squares.values(), strict=True)) if self.squares else (0.0, 0.0)
        return sqrt(safe_ratio(errors, norms))

    @property
    def output_errors(self) -> tuple[float | None, float | None]:
        """The relative error of all layers' outputs together, and the error of rounding without the examples."""
        if not self.outputs:
            return None, None
        errors = [(each.error, each.plain, each.norm) for each in self.outputs.values()]
        error, plain, norm = (sum(each) for each in zip(*errors, strict=True))
        return sqrt(safe_ratio(error, norm)), sqrt(safe_ratio(plain, norm))

    @property
    def median(self) -> float:
        """The median of the relative errors."""
        return median(self.relative.values()) if self.squares else 0.0


class Assembly:
    """The coded tensors of a pack, spooled in ``folder`` until all are there and their sizes are known."""

    def __init__(self, folder: Path) -> None:
        self._spool = Spool(folder)
        self._folder = folder
        self._outs: list[OutputTensor] = []
        self.described: list[Described] = []
        self.coded_bytes = 0

    def add(self, described: Described, payload: Tensor) -> None:
        """Add a coded tensor, or one as it is (:class:`~merging.sources.packs.codings.Raw`)."""
        name = payload_name(len(self.described))
        self.described.append(described)
        self._outs.append(OutputTensor(name, DTYPE_NAMES[payload.dtype], tuple(payload.shape)))
        self.coded_bytes += 0 if isinstance(described.coding, Raw) else payload.nbytes
        self._spool.put(name, Dense(payload))

    def write(self, stem: str, manifest: PackManifest, facts: Mapping[str, str] | None = None) -> int:
        """Write the file, with further entries of its header, and return its size in bytes.

        Tensors with the largest elements come first, so that all are aligned.
        """
        outs = sorted(self._outs, key=lambda out: -DTYPES[out.dtype_name].itemsize)
        metadata: Mapping[str, str] = {
            PACK_KEY: manifest.model_dump_json(),
            "merging_version": __version__,
            **(facts or {}),
        }
        writer = TensorWriter(self._folder, stem, outs, metadata, None)
        try:
            for out in outs:
                value = self._spool.take(out.name)
                assert isinstance(value, Dense)
                writer.write(out.name, value.value.reshape(-1))
            writer.finish()
        finally:
            writer.close()
            self._spool.close()
        return (self._folder / f"{stem}.safetensors").stat().st_size

    def close(self) -> None:
        """Free the space of the spooled tensors."""
        self._spool.close()
