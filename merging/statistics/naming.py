"""The names of a model's tensors on the disk, which are others than in memory for many architectures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merging.maths.layer_statistics import InputGram
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.shapes import Shapes
from merging.plan.names.conversion import CheckpointLoading
from merging.sources.regions import TensorPart
from merging.statistics.layers import find_layers
from merging.statistics.writing import GatheredLayers

__all__ = ["name_as_stored"]


def name_as_stored(gathered: GatheredLayers, network: Any, shapes: Shapes) -> GatheredLayers:
    """Return the statistics by the names of tensors on the disk, from their names in a network.

    Tensors that are joined in memory have the same inputs, and so has a tensor on the disk that is divided in memory.

    Args:
        gathered: the statistics.
        network: the model of transformers that was run.
        shapes: the shapes of the tensors on the disk by name.
    """
    pieces = CheckpointLoading(network).pieces(shapes)
    names = _names_by_layer(network, pieces)
    grams: dict[str, InputGram] = {}
    shared: dict[str, str] = {}
    for layer, gram in gathered.grams.items():
        first, *others = names.get(layer, [layer])
        grams[first] = gram
        shared |= dict.fromkeys(others, first)
    for layer, leader in gathered.shared.items():
        first = names.get(leader, [leader])[0]
        shared |= dict.fromkeys(names.get(layer, [layer]), first)
    shared = {name: first for name, first in shared.items() if name not in grams}
    fisher = {name: _assemble(shapes[name], parts, gathered.fisher) for name, parts in pieces.items()}
    return replace(
        gathered, grams=grams, shared=shared, fisher={name: each for name, each in fisher.items() if each is not None}
    )


def _names_by_layer(network: Any, pieces: Mapping[str, list[TensorPart]]) -> dict[str, list[str]]:
    """Return the names on the disk of the tensors with a layer's inputs, by the layer's name in the network."""
    layers = {layer.name: layer for layer in find_layers(network)}
    found: dict[str, list[str]] = defaultdict(list)
    for name, parts in pieces.items():
        for part in parts:
            layer = layers.get(part.of)
            if layer is not None and part.axes == (0, 1) and part.box[layer.axis] == slice(0, layer.width):
                found[part.of].append(name)
    return found


def _assemble(shape: tuple[int, ...], parts: list[TensorPart], values: Mapping[str, Tensor]) -> Tensor | None:
    """Return the values of a tensor on the disk, from the tensors in memory that hold its parts; None without any."""
    if not all(part.of in values for part in parts):
        return None
    found = torch.empty(shape)
    for part in parts:
        lengths = [part.box[axis].stop - part.box[axis].start for axis in part.axes]
        place = tuple(slice(start, start + length) for start, length in zip(part.start, lengths, strict=True))
        others = [axis for axis in range(len(part.box)) if axis not in part.axes]  # one expert of a stack
        found[place] = values[part.of][part.box].permute(*others, *part.axes).reshape(lengths)
    return found
