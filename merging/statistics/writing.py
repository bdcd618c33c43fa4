"""Writing statistics of layers in half precision, so that every Gram matrix stays definite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.maths.layer_statistics import InputGram
from merging.maths.lazy_torch import Tensor, torch
from merging.sources.statistics_file import DIRECTIONS, FISHER, FORMAT, LEADING, REST, SIZES
from merging.storage.output_tensor import OutputTensor
from merging.storage.staging import StagedOutput
from merging.storage.writer import TensorWriter
from merging.version import __version__

__all__ = ["GatheredLayers", "round_gram", "round_trip", "write_statistics"]

_LEADING = 16
"""Directions that are stored in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class GatheredLayers:
    """Statistics of a model's layers, by the names of their weights.

    Attributes:
        grams: the Gram matrices of inputs.
        shared: the layers whose inputs are another layer's, and the name of the other.
        fisher: the diagonal of the Fisher information, divided by its root mean square over the model.
        fisher_size: that root mean square.
        examples: the number of examples.
        tokens: the number of tokens of texts.
    """

    grams: Mapping[str, InputGram]
    shared: Mapping[str, str]
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    fisher_size: float = 0.0
    examples: int = 0
    tokens: int = 0


def round_gram(gram: InputGram) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the leading directions in float32, the others in float16, their sizes, and the rest of the diagonal.

    Rounding of the few largest directions would be larger than the small ones, which a solution depends on. The others
    are scaled to a largest entry of 1; sizes and rest are float32.
    The rest is computed from the rounded directions, so that the diagonal stays exact. The matrix is definite whatever
    the rounding.
    """
    leading, others = gram.directions[:, :_LEADING].float(), gram.directions[:, _LEADING:]
    sizes = others.abs().amax(0).float()
    units = (others / torch.where(sizes > 0, sizes, 1.0).double()).half()
    rounded = torch.cat([leading.double(), units.double() * sizes.double()], 1)
    rest = (gram.diagonal() - rounded.square().sum(1)).clamp(min=0).float()
    return leading, units, sizes, rest


def round_trip(gram: InputGram) -> InputGram:
    """Return a Gram matrix as it is read from a file, float64."""
    leading, units, sizes, rest = (part.double() for part in round_gram(gram))
    return InputGram(torch.cat([leading, units * sizes], 1), rest)


def write_statistics(
    staged: StagedOutput,
    destination: Path,
    layers: GatheredLayers,
    identity: Mapping[str, str],
    facts: Mapping[str, Any],
) -> int:
    """Write statistics to a file that is put in place later, and return the bytes of its tensors.

    ``identity`` names the model: ``model``, ``key`` and ``origin``; ``facts`` describe the examples.

    Raises :class:`~merging.errors.OutputError` for a file that cannot be written.
    """
    outs = []
    for name, gram in layers.grams.items():
        width, count = gram.directions.shape
        leading = min(count, _LEADING)
        outs.append(OutputTensor(f"{LEADING}/{name}", "F32", (width, leading)))
        outs.append(OutputTensor(f"{DIRECTIONS}/{name}", "F16", (width, count - leading)))
        outs.append(OutputTensor(f"{SIZES}/{name}", "F32", (count - leading,)))
        outs.append(OutputTensor(f"{REST}/{name}", "F32", (width,)))
    outs += [OutputTensor(f"{FISHER}/{name}", "BF16", tuple(each.shape)) for name, each in layers.fisher.items()]
    nbytes = sum(out.nbytes for out in outs)
    metadata = {
        "statistics": FORMAT,
        **identity,
        "shared": json.dumps(dict(layers.shared), sort_keys=True),
        "fisher_size": repr(layers.fisher_size),
        "facts": json.dumps(dict(facts), sort_keys=True),
        "merging_version": __version__,
    }
    writer = TensorWriter(staged.folder, destination.stem, outs, metadata, None)
    try:
        for name, gram in layers.grams.items():
            for part, values in zip((LEADING, DIRECTIONS, SIZES, REST), round_gram(gram), strict=True):
                writer.write(f"{part}/{name}", values.contiguous().flatten())
        for name, each in layers.fisher.items():
            writer.write(f"{FISHER}/{name}", each.bfloat16().flatten())
        writer.finish()
    finally:
        writer.close()
    return nbytes
