"""The loading of a checkpoint by transformers: the tensors in memory, where adapters are trained.

The library renames, stacks, joins and splits tensors while it loads them, by rules that change with its releases. So
its own rules are followed, on a model without memory, and only when an adapter's names do not fit the names on disk.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from merging.errors import FormatError
from merging.maths.shapes import Shapes
from merging.plan.names.element_map import ElementMap
from merging.sources.regions import TensorPart, whole

__all__ = ["CheckpointLoading"]


class CheckpointLoading:
    """The loading of one architecture's checkpoints, by the rules of the installed transformers."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
        self._prefix = model.base_model_prefix
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    @classmethod
    def of(cls, config: dict[str, Any]) -> CheckpointLoading | None:
        """Return the loading of the model that a config describes.

        None where transformers is not installed, is too old to have such rules, or does not know the architecture.
        Raises :class:`~merging.errors.FormatError` for a config that it can make no model of.
        """
        architecture = next(iter(config.get("architectures") or []), None)
        if architecture is None:
            return None
        try:
            import torch
            import transformers
            from transformers import conversion_mapping, core_model_loading  # noqa: F401
        except ImportError:
            return None
        found = getattr(transformers, architecture, None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            return None
        if config.get("model_type") not in transformers.CONFIG_MAPPING:
            return None
        try:
            with torch.device("meta"):
                model = found(transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config))
        except Exception as error:  # it trusts the config, and fails in as many ways as there are models
            reason = f"{type(error).__name__}: {error}"[:300]
            raise FormatError(f"transformers makes no {architecture} of the base's config.json: {reason}") from None
        return cls(model)

    def pieces(self, shapes: Shapes) -> dict[str, list[TensorPart]]:
        """Return the parts that tensors of these names and shapes are in memory.

        Tensors without a place in the model are left out, and tensors whose values change or move in loading.
        """
        found: dict[str, list[TensorPart]] = defaultdict(list)
        sources: dict[str, dict[str, dict[int, ElementMap]]] = defaultdict(lambda: defaultdict(dict))
        for name, shape in shapes.items():
            in_memory, pattern = self._rename(name)
            if in_memory in self._shapes and pattern is None:
                found[name].append(whole(in_memory, shape))
            elif in_memory in self._shapes and pattern is not None:
                sources[in_memory][pattern][self._index(name, pattern)] = ElementMap.of(name, shape)
        for first, collected in sources.items():
            converter = next(each for each in self._converters if next(iter(collected)) in each.source_patterns)
            for target, result in self._convert(converter, first, collected).items():
                if result.shape == self._shapes.get(target):
                    for name, piece in result.pieces.items():
                        found[name].append(replace(piece, of=target))
        return dict(found)

    def _rename(self, name: str) -> tuple[str, str | None]:
        """Return a tensor's name in memory (the first of several), and the pattern of its conversion."""
        from transformers.core_model_loading import rename_source_key

        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._shapes
        )
        if renamed[0] not in self._shapes and name in self._shapes:
            return name, None
        return renamed

    def _index(self, name: str, pattern: str) -> int:
        """Return the number of a tensor among all that one pattern collects."""
        if "*" not in pattern:
            return 0
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self._renamings, [])
        numbered = re.search(pattern.replace("*.", r"(\d+)\."), renamed)
        return int(numbered[1]) if numbered else -1

    def _convert(
        self, converter: Any, first: str, collected: Mapping[str, Mapping[int, ElementMap]]
    ) -> dict[str, ElementMap]:
        """Return the results of a conversion by name in memory; empty for operations that are not followed.

        Sources may be missing, as an adapter need not change each: their places are left empty.
        """
        targets = [first.replace(converter.target_patterns[0], each, 1) for each in converter.target_patterns]
        kinds = [type(operation).__name__ for operation in converter.operations]
        if any("*" in pattern for pattern in collected) != (kinds[0] == "MergeModulelist"):
            return {}
        final = self._shapes[first]
        state = [_stack(collected.get(pattern), "*" in pattern, final) for pattern in converter.source_patterns]
        for kind, operation in zip(kinds, converter.operations, strict=True):
            axis = getattr(operation, "dim", 0)
            if kind == "MergeModulelist" and axis == 0:
                continue  # they were stacked when they were collected
            if kind == "Concatenate" and not getattr(operation, "num_shards_attribute", None):
                state = [_join(state, axis, final[axis])]
            elif kind in ("Chunk", "Split") and state[0] and not getattr(operation, "num_shards_attribute", None):
                size = state[0].shape[axis]
                equal = [-(-size // len(targets))] * len(targets)
                sizes = equal if kind == "Chunk" else [self._shapes[target][axis] for target in targets]
                state = _divide(state[0], axis, sizes)
            elif kind == "Transpose" and state[0]:
                if not (operation.check_dims and state[0].shape == final):
                    state = [state[0].swap_axes(operation.dim0, operation.dim1)]
            else:
                return {}
        return {name: elements for name, elements in zip(targets, state, strict=True) if elements is not None}


def _stack(found: Mapping[int, ElementMap] | None, numbered: bool, final: tuple[int, ...]) -> ElementMap | None:
    """Return the tensors of one pattern as one, stacked by their numbers if they have any."""
    if not found:
        return None
    if not numbered:
        return found[0]
    shape = next(iter(found.values())).shape
    pieces = {
        name: TensorPart(
            piece.of, (slice(number, number + 1), *piece.box), tuple(a + 1 for a in piece.axes), piece.start
        )
        for number, elements in found.items()
        for name, piece in elements.pieces.items()
    }
    odd = any(elements.shape != shape or not 0 <= number < final[0] for number, elements in found.items())
    return None if odd else ElementMap((final[0], *shape), pieces)


def _join(parts: Sequence[ElementMap | None], axis: int, total: int) -> ElementMap | None:
    """Return tensors joined along an axis to this length; missing tensors are of one size."""
    known = [part for part in parts if part]
    if not known:
        return None
    missing = len(parts) - len(known)
    gap = (total - sum(part.shape[axis] for part in known)) // missing if missing else 0
    pieces: dict[str, TensorPart] = {}
    end = 0
    for part in parts:
        if part:
            pieces.update(part.shift(axis, end).pieces)
        end += part.shape[axis] if part else gap
    return ElementMap((*known[0].shape[:axis], end, *known[0].shape[axis + 1 :]), pieces)


def _divide(elements: ElementMap, axis: int, sizes: Sequence[int]) -> list[ElementMap | None]:
    ends = list(accumulate(sizes))
    return [
        elements.crop(axis, end - size, min(end, elements.shape[axis])) for end, size in zip(ends, sizes, strict=True)
    ]
