"""The config of a model whose blocks were taken out, repeated or put together: counts, and settings by block."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from merging.errors import InputError

__all__ = ["Blocks", "stack_config"]

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "num_encoder_layers")
"""The names of the number of blocks; of an encoder where the model has a decoder too."""

_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")

_NO_LAYERS = re.compile(
    r"token|_factor|section|^architectures$|^conv_|^image_|^patch_|^labels?|id2label|label2id|_ids?$(?<!layer_ids)"
    r"|pos_att|features|stage"
)
"""Lists that are as long as the model only by chance."""

_FIRST = {
    "first_k_dense_replace": "mlp_layer_types",
    "max_window_layers": "layer_types",
    "moe_layer_start_index": "",
    "num_dense_layers": "",
}
"""Counts of the blocks at the beginning that differ from the others, and the list that states the same by block."""

_LAST = {"num_kv_shared_layers": ""}
"""The same at the end."""

_PERIODS = {
    "attn_layer_period": "layers_block_type",
    "cross_attention_frequency": "",
    "decoder_sparse_step": "mlp_layer_types",
    "expert_layer_period": "",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "layer_group_size": "layer_types",
    "moe_layer_freq": "mlp_layer_types",
    "moe_layer_interval": "",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
}
"""Settings by which blocks at regular distances differ from the others, and the list that states the same by block."""

_IMPLIED_TYPES: dict[str, Callable[[int, Mapping[str, Any]], str]] = {
    "gemma2": lambda i, config: "full_attention" if i % 2 else "sliding_attention",
    "gemma3_text": lambda i, config: _every(i, config.get("sliding_window_pattern") or 6),
    "cohere2": lambda i, config: _every(i, config.get("sliding_window_pattern") or 4),
    "gpt_oss": lambda i, config: "full_attention" if i % 2 else "sliding_attention",
    "modernbert": lambda i, config: (
        "sliding_attention" if i % (config.get("global_attn_every_n_layers") or 3) else "full_attention"
    ),
    "qwen3_next": lambda i, config: (
        "linear_attention" if (i + 1) % (config.get("full_attention_interval") or 4) else "full_attention"
    ),
}
"""The types of blocks of models whose config need not state them, by the model's type."""


def _every(index: int, period: int) -> str:
    return "sliding_attention" if (index + 1) % period else "full_attention"


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a model, in their order.

    Attributes:
        name: the name of the model, for errors.
        config: the fields of its config.json.
        prefix: the names' beginning, such as ``model.layers``.
        taken: the indices of the blocks that are taken.
        total: the number of blocks that the model has.
    """

    name: str
    config: Mapping[str, Any]
    prefix: str
    taken: Sequence[int]
    total: int


def stack_config(parts: Sequence[Blocks], others: Mapping[str, int]) -> dict[str, Any]:
    """Return the config of the first part's model with the blocks of all parts.

    Args:
        parts: the blocks, from below.
        others: the numbers of blocks of the first model's other stacks, by their prefix.

    Raises:
        InputError: for a setting that cannot say what these blocks need.
    """
    first = parts[0]
    config = deepcopy(dict(first.config))
    if not config:
        return config
    path = _section(config, first.prefix)
    section = _at(config, path)
    sections = [_at(dict(part.config), path) for part in parts]
    total = sum(len(part.taken) for part in parts)
    _state_types(config, path, parts)
    if section.get("hidden_size_per_layer_input"):
        raise InputError(
            f"{first.name}: has one table of embeddings for all of its blocks (hidden_size_per_layer_input), which "
            f"cannot be taken apart: its blocks are not stacked"
        )
    _forget_stages(section, first)
    for key, value in list(section.items()):
        adjusted = _adjust(key, value, parts, sections)
        if adjusted is not value:
            section[key] = adjusted
    _check_periods(section, parts)
    _count(section, first, total, others)
    return config


def _section(config: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    """Return the keys of the part of a config that describes a stack."""
    words = prefix.lower()
    nested = [key for key, value in config.items() if isinstance(value, dict) and key.endswith("_config")]
    for named in ("vision", "visual", "audio"):
        if named in words:
            wanted = "vision" if named == "visual" else named
            return next(((key,) for key in nested if wanted in key), ())
    if "text_config" in nested and not any(key in config for key in _COUNTS):
        return ("text_config",)
    return ()


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        config = config.get(key) or {}
    return config  # type: ignore[return-value]


def _state_types(config: dict[str, Any], path: tuple[str, ...], parts: Sequence[Blocks]) -> None:
    """Write out the types of blocks that the model's type implies, as another order needs them block by block."""
    section = _at(config, path)
    implied = _IMPLIED_TYPES.get(section.get("model_type") or config.get("model_type") or "")
    if implied is not None and section.get("layer_types") is None:
        section["layer_types"] = [implied(index, section) for index in range(parts[0].total)]


def _forget_stages(section: dict[str, Any], first: Blocks) -> None:
    """Leave out the names of a backbone's outputs, which follow from the number of blocks where it has only the last.

    Raises :class:`~merging.errors.InputError` for other outputs.
    """
    names = section.pop("stage_names", None)
    if names is None:
        return
    outputs = section.pop("out_features", None) or names[-1:]
    section.pop("out_indices", None)
    if outputs != names[-1:]:
        raise InputError(
            f"{first.name}: has outputs after {', '.join(outputs)} (out_features): its blocks stay in place"
        )


def _adjust(key: str, value: Any, parts: Sequence[Blocks], sections: Sequence[Mapping[str, Any]]) -> Any:
    """Return a setting for the new blocks, or ``value`` itself where it does not go by blocks."""
    first = parts[0]
    if isinstance(value, list) and _is_indices(key, value, first.total):
        return _renumber(key, parts, sections)
    if isinstance(value, (list, str)) and len(value) == first.total and _goes_by_blocks(key, value):
        alike = value[0] if all(each == value[0] for each in value) else None
        chosen = [
            each for part, section in zip(parts, sections, strict=True) for each in _choose(key, part, section, alike)
        ]
        return "".join(chosen) if isinstance(value, str) else chosen
    if key in _FIRST | _LAST and type(value) is int:
        return _count_ends(key, parts, sections)
    return value


def _goes_by_blocks(key: str, value: list[Any] | str) -> bool:
    if isinstance(value, str):
        return "pattern" in key
    return not _NO_LAYERS.search(key)


def _is_indices(key: str, value: list[Any], total: int) -> bool:
    """Return whether a list names blocks by their indices."""
    if not re.search(r"layer|block|idx|indices|indexes", key) or _NO_LAYERS.search(key):
        return False
    numbers = all(type(each) is int and 0 <= each < total for each in value)
    rising = value == sorted(set(value))
    return numbers and rising and (len(value) < total or total > 2)


def _choose(key: str, part: Blocks, section: Mapping[str, Any], alike: Any) -> list[Any]:
    """Return a part's values of a setting that has one for each block; ``alike`` is the value of all where it is one.

    Raises :class:`~merging.errors.InputError` for a part without them.
    """
    values = section.get(key)
    if values is None and alike is not None:
        return [alike] * len(part.taken)
    implied = _IMPLIED_TYPES.get(str(section.get("model_type")))
    if values is None and key == "layer_types" and implied is not None:
        values = [implied(index, section) for index in range(part.total)]
    if not isinstance(values, (list, str)) or len(values) != part.total:
        raise InputError(f"{part.name}: its config.json has no {key} with a value for each of its {part.total} blocks")
    return [values[index] for index in part.taken]


def _renumber(key: str, parts: Sequence[Blocks], sections: Sequence[Mapping[str, Any]]) -> list[int]:
    named = [
        index in (section.get(key) or ()) for part, section in zip(parts, sections, strict=True) for index in part.taken
    ]
    return [index for index, meant in enumerate(named) if meant]


def _count_ends(key: str, parts: Sequence[Blocks], sections: Sequence[Mapping[str, Any]]) -> int:
    """Return how many blocks at an end differ from the others. Raises :class:`~merging.errors.InputError`."""
    marked = []
    for part, section in zip(parts, sections, strict=True):
        count = section.get(key) or 0
        marked += [index >= part.total - count if key in _LAST else index < count for index in part.taken]
    total, stated = sum(marked), int(sections[0][key])
    if total == len(marked) and stated > parts[0].total:
        return max(stated, total)  # more than there are blocks: of a published config, or a larger model's
    misplaced = [
        index
        for index, meant in enumerate(marked)
        if (any(marked[:index]) and not meant if key in _LAST else meant and not all(marked[:index]))
    ]
    idle = key == "max_window_layers" and not sections[0].get("use_sliding_window")
    if misplaced and (idle or sections[0].get((_FIRST | _LAST)[key])):
        return stated
    if misplaced:
        end, place = ("last", "end") if key in _LAST else ("first", "start")
        raise InputError(
            f"{parts[0].name}: the {end} blocks of this model differ from the others ({key}), and block {misplaced[0]} "
            f"of the stack would be in the wrong place: keep these blocks together at the {place}"
        )
    return total


def _check_periods(section: Mapping[str, Any], parts: Sequence[Blocks]) -> None:
    """Refuse an order of blocks that a period cannot state. Raises :class:`~merging.errors.InputError`."""
    order = [index for part in parts for index in part.taken]
    for key, stated_by in _PERIODS.items():
        period = section.get(key)
        if type(period) is not int or period < 2 or section.get(stated_by):
            continue
        moved = next((place for place, index in enumerate(order) if (place - index) % period), None)
        if moved is not None:
            raise InputError(
                f"{parts[0].name}: every {period} blocks differ from the others ({key}), so that block {order[moved]} "
                f"cannot become block {moved}: move blocks by multiples of {period}"
            )


def _count(section: dict[str, Any], first: Blocks, total: int, others: Mapping[str, int]) -> None:
    """State the number of blocks under every name that a config has for it."""
    words = first.prefix.split(".")
    decoders = [length for prefix, length in others.items() if "decoder" in prefix.split(".")]
    if words[-1].startswith("single_") and "num_single_layers" in section:
        keys = ["num_single_layers"]
    elif "decoder" in words and any("encoder" in prefix.split(".") for prefix in others):
        keys = [key for key in _DECODER_COUNTS if key in section] or ["num_decoder_layers"]
    else:
        keys = [key for key in _COUNTS if type(section.get(key)) is int] or ["num_hidden_layers"]
        if decoders and not any(key in section for key in _DECODER_COUNTS):
            section["num_decoder_layers"] = decoders[0]  # by default it is the encoder's
    section.update(dict.fromkeys(keys, total))
