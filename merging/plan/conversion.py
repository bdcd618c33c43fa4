"""What transformers calls a checkpoint's tensors in memory, which is what adapters are trained on.

The library renames tensors while it loads them, by rules that change with its releases. So its own rules are asked,
on a model without memory, and only when an adapter's names do not fit the names on disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["names_in_memory"]


def names_in_memory(names: Iterable[str], config: dict[str, Any]) -> dict[str, str]:
    """The name on disk of each tensor by its name in memory, for the model that a config describes.

    Tensors that are fused or split on loading have no such name. Empty where transformers is not installed, is too old
    to have such rules, or does not know the architecture.
    """
    architecture = next(iter(config.get("architectures") or []), None)
    if not isinstance(architecture, str):
        return {}
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {}
    model_class = getattr(transformers, architecture, None)
    if model_class is None or config.get("model_type") not in transformers.CONFIG_MAPPING:
        return {}
    parsed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        model = model_class(parsed)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    meta = model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        in_memory, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        if converter is None and in_memory in meta:
            found[in_memory] = name
    return found
