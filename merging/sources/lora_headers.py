"""Statements about training in the headers of LoRA files, whatever program wrote them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from merging.errors import FormatError, option
from merging.sources.lora_names import normal_name
from merging.sources.small_files import parse_json

__all__ = ["METADATA_KEY", "alphas_differ", "base_facts", "component_configs", "config_of", "unstated_alpha"]

T = TypeVar("T")

METADATA_KEY = "lora_adapter_metadata"
"""The metadata entry in which diffusers keeps the configs of its components; each field follows the component's name.
"""

_DENOISERS = {"denoiser": ("transformer", "unet"), "denoiser_2": ("transformer_2",)}
"""The names of denoisers in diffusers."""

_BASE_FACTS = ("ss_base_model_version", "ss_v2")


def component_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the PEFT config of each component, if the header has any. diffusers and SimpleTuner write them.

    Raises :class:`~merging.errors.FormatError` for an entry that is not a JSON object.
    """
    if METADATA_KEY not in metadata:
        return {}
    fields = parse_json(metadata[METADATA_KEY], f"{path}: the {METADATA_KEY} in its header")
    configs: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in fields.items():
        component, _, field = name.partition(".")
        if field:
            configs[component][field] = value
        else:
            configs[""][name] = value  # one config for all, without a component
    return dict(configs)


def config_of(configs: Mapping[str, T], name: str) -> T | None:
    """Return the config of the component that a name belongs to, however the file spells it; None without one."""
    component, _ = normal_name(name)
    named = (name.partition(".")[0], *_DENOISERS.get(component, (component,)), "")
    return next((configs[each] for each in named if each in configs), None)


def base_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the header's statements about the base, by the keys of Kohya's sd-scripts, which other trainers share."""
    return {key: metadata[key] for key in _BASE_FACTS if key in metadata}


def alphas_differ(path: Path, name: str) -> FormatError:
    """Return the error for a file whose tensor ``name`` contradicts the alpha in the config of its header."""
    return FormatError(
        f"{path}: states its alphas twice, next to the factors and in the {METADATA_KEY} of its header, and not alike "
        f"({name}): remove one of the two, or give the right one with {option('lora_alpha')}"
    )


def unstated_alpha(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return a notice if a header names an alpha that no tensor of the file states.

    Programs use the tensors alone. Converters that multiply the scale into the factors (musubi-tuner's) keep such a
    header unchanged: the scale is 1 then.
    """
    alpha, rank = metadata.get("ss_network_alpha", metadata.get("alpha")), metadata.get("ss_network_dim")
    if alpha is None or _number(alpha) == _number(rank):
        return ()
    at = "" if rank is None else f" at rank {rank[:20]}"
    return (
        f"{path}: its header states alpha {alpha[:20]}{at}, and no tensor does: programs take the scale as 1, and so "
        f"does this: if it is not folded into the factors, set it with {option('lora_alpha')}",
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
