"""Slices of a recipe of mergekit as a stack of ours: each a part of a model, or a merge of such parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from merging.plan.mergekit.merges import MergeKeys, MergeSource, Translated, build_merge
from merging.plan.mergekit.methods import MethodSpec
from merging.plan.mergekit.models import Entry, read_model
from merging.plan.mergekit.parameters import Layers, check_names
from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.schema import SLICE, SOURCE
from merging.plan.recipe_document import Keys

__all__ = ["build_slices", "levels_above"]


def build_slices(
    reading: Reading, spec: MethodSpec, base: Entry | None, folder: Path, above: Keys = (), *, named: str = ""
) -> Translated:
    """Return the merge of slices in our schema: a stack, or for one slice the merge of its sources.

    ``above`` leads to the module that has the slices, and ``named`` is the stack of blocks that they are slices of,
    where models have several. Raises :class:`~merging.errors.OptionError`.
    """
    built, start = [], 0
    count = len(reading.items((*above, "slices"), "slices"))
    for index in range(count):
        keys: Keys = (*above, "slices", index)
        part, length = _build_slice(reading, spec, base, folder, keys, start=start, named=named)
        if not length and 0 < index < count - 1:
            reading.note(keys, "this slice has no layers, and is left out")
            continue
        built.append((part, reading.document.origin(keys)))
        start += length
    if len(built) == 1 and "models" in built[0][0].values:
        return built[0][0]
    stack = Translated()
    parts: list[tuple[Any, str, Translated | None]] = []
    for each, origin in built:
        part = each
        if "models" in each.values:
            part = Translated()
            part.put("model", each.values, origin, each)
            if named:
                part.put("layers", named, origin)
        parts.append((part.values, origin, part))
    if reading.lenient:
        stack.put("allow_unmatched", True, reading.document.origin(()))
    stack.put_list("stack", parts, reading.document.origin((*above, "slices")))
    return stack


def _build_slice(
    reading: Reading, spec: MethodSpec, base: Entry | None, folder: Path, keys: Keys, *, start: int, named: str
) -> tuple[Translated, int]:
    """Return a slice, and its number of layers.

    It is layers of a model that are taken as they are or scaled, or else the merge of its sources. ``start`` is the
    number of its first layer in the output.
    """
    values = reading.check_keys(keys, "a slice", SLICE)
    check_names(reading, spec, (*keys, "parameters"), of_model=False)
    if values.get("residual_weight") is not None:
        reading.note((*keys, "residual_weight"), "residual_weight has no effect, as in mergekit")
    sources = [
        _read_source(reading, (*keys, "sources", index), folder, named)
        for index in range(len(reading.items((*keys, "sources"), "sources")))
    ]
    lengths = [last - first for first, last in map(_bounds, sources)]
    if len(sources) > 1 and not lengths[0]:
        raise reading.error((*keys, "sources", 0, "layer_range"), "layer_range has no layers: a merge needs some")
    if uneven := next((index for index, each in enumerate(lengths) if each != lengths[0]), None):
        raise reading.error(
            (*keys, "sources", uneven, "layer_range"),
            f"all sources of a slice have the same number of layers: here {lengths[uneven]}, and {lengths[0]} before",
        )
    base_keys: Keys = ("base_model",)
    if values.get("base_model") is not None:
        base_keys = (*keys, "base_model")
        base = read_model(reading, base_keys, folder)
    own = next((each for each in sources if each.model == base), None) if base is not None else None
    if base is not None and own is None and spec.base != "ignored":
        raise reading.error((*keys, "sources"), "base_model is not among the sources of this slice: add its layers")
    places = MergeKeys((*keys, "sources"), base_keys, levels_above(keys), Layers(lengths[0], start))
    merge = build_merge(reading, spec, sources, None if spec.base == "ignored" else own, places)
    return (_as_part(merge) if spec.name == "passthrough" else merge), lengths[0]


def levels_above(keys: Keys) -> list[Keys]:
    """Return the places of parameters for all models of a slice, a module or the recipe, the nearest first."""
    return [(*keys[:count], "parameters") for count in (4, 2, 0) if count <= len(keys)]


def _as_part(merge: Translated) -> Translated:
    """Return a merge of one model by passthrough as a part of a stack."""
    part = Translated()
    (entry,) = merge.values["models"]
    for key, value in entry.items():
        part.put(key, value, merge.origins["models", 0])
    for name, value in merge.values.get("parameters", {}).items():
        part.put(name, value, merge.origins["parameters", name])
        part.origins.update({keys[1:]: at for keys, at in merge.origins.items() if keys[:2] == ("parameters", name)})
    return part


def _bounds(source: MergeSource) -> tuple[int, int]:
    assert isinstance(source.entry, dict)
    first, last = map(int, source.entry["layers"].rpartition("=")[2].split(":"))
    return first, last


def _read_source(reading: Reading, keys: Keys, folder: Path, named: str) -> MergeSource:
    values = reading.check_keys(keys, "a source", SOURCE)
    if values.get("model") is None:
        raise reading.error(keys, "this source names no model: write - {model: NAME, layer_range: [0, 8]}")
    if values.get("layer_range") is None:
        raise reading.error(keys, "this source has no layer_range: write layer_range: [0, 8] for its first 8 layers")
    model = read_model(reading, (*keys, "model"), folder)
    first, last = _read_range(reading, (*keys, "layer_range"))
    layers = f"{first}:{last}" if first < last else "0:0"  # the tensors around the blocks alone
    return MergeSource(keys, model, {"model": model, "layers": f"{named}={layers}" if named else layers}, first)


def _read_range(reading: Reading, keys: Keys) -> tuple[int, int]:
    """Return the first layer and the layer behind the last. Raises OptionError for anything else."""
    value = reading.value(keys)
    bounds = [_whole(each) for each in value] if isinstance(value, list) else []
    if len(bounds) != 2 or None in bounds:
        raise reading.error(keys, f"layer_range = {value!r:.80}: should be two numbers: [0, 8] is the first 8 layers")
    first, last = (each for each in bounds if each is not None)
    if first < 0 or last < 0:
        raise reading.error(keys, f"layer_range = {value!r:.80}: layers count from 0")
    if first > last:
        raise reading.error(
            keys, f"layer_range = {value!r:.80}: the first layer stands first, the layer behind the last one second"
        )
    return first, last


def _whole(value: Any) -> int | None:
    """Return a whole number as YAML has it, ``8``, ``8.0`` or ``"8"``; None for anything else."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    text = str(value)
    return int(text) if not isinstance(value, bool) and re.fullmatch(r"-?[0-9]{1,6}", text) else None
