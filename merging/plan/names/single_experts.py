"""Experts of gpt-oss as linear layers, as one training program makes them, matched with a base that stacks them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from merging.sources.changes import Change
from merging.sources.regions import TensorPart, whole

__all__ = ["match_single_experts"]

_LAYER = re.compile(r"(?P<path>.+\.experts\.(?:gate_up|down))_projs\.(?P<number>[0-9]{1,6})\.weight")


def match_single_experts(
    changes: Mapping[str, Change], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[TensorPart]] | None:
    """Return the part that each target is of the tensors of these ``shapes``; None where one has no place there.

    ``experts.gate_up_projs.3``, as Unsloth names it, is ``gate_up_proj[3]`` transposed.
    """
    pieces: dict[str, list[TensorPart]] = {}
    for target, change in changes.items():
        expert = _LAYER.fullmatch(target)
        name = f"{expert['path']}_proj" if expert else target
        shape = shapes.get(name, ())
        if expert and len(shape) == 3 and int(expert["number"]) < shape[0]:
            number, (_, inputs, outputs) = int(expert["number"]), shape
            box = (slice(number, number + 1), slice(0, inputs), slice(0, outputs))
            pieces[target], shape = [TensorPart(name, box, (2, 1), (0, 0))], (outputs, inputs)
        elif not expert and name in shapes:
            pieces[target] = [whole(name, shape)]
        else:
            return None
        if change.shape != shape:
            return None
    return pieces
