"""LoRA, and what DoRA, PiSSA and OLoRA make of it."""

from __future__ import annotations

from math import sqrt
from typing import Literal

from merging.sources.adapter import AddedBias, Change, LoraChange
from merging.sources.peft.config import Config
from merging.sources.peft.module import Module

__all__ = ["LORA_LEAVES", "check_lora", "lora_changes", "lora_scale"]

LORA_LEAVES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""What LoRA's tensors are called behind the path of their module."""

_PLAIN_STARTS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal", "mica")
_LOST_STARTS = {
    "corda": "it started from statistics of data that the file does not hold",
    "lora_ga": "it started from gradients that the file does not hold",
    "loftq": "its base was replaced by a quantised approximation of it",
}
_CONVERT = (
    "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain LoRA"
)
_UNSUPPORTED = {
    "layer_replication": "it was trained on a base with repeated layers",
    "target_parameters": "it changes expert parameters, which are not read yet",
    "trainable_token_indices": "it holds trained token rows, which are not read yet",
    "use_qalora": "its factors are grouped for a quantised base (QALoRA)",
    "use_bdlora": "its factors are block diagonal (BD-LoRA)",
    "arrow_config": "it routes between experts at run time (Arrow)",
    "alora_invocation_tokens": "it acts only on what follows certain tokens (aLoRA)",
    "kasa_config": "its base was cut to a lower rank at the start (KaSA)",
}


def check_lora(config: Config) -> None:
    """Refuse what the file does not tell completely."""
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise config.error(f"cannot be merged: {reason} ({key} in its config)")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith("pissa_niter_"):
        raise config.error(f"started from a random SVD ({start}) that cannot be repeated: {_CONVERT}")
    if _start(config) is None and start not in _PLAIN_STARTS:
        reason = _LOST_STARTS.get(str(start), "this start is not known")
        raise config.error(f"cannot be merged as it is: {reason} (init_lora_weights = {start!r}): {_CONVERT}")


def _start(config: Config) -> Literal["pissa", "olora"] | None:
    """The start that must be taken off the base, if any."""
    start = config.get("init_lora_weights", True)
    return "pissa" if start == "pissa" else "olora" if start == "olora" else None


def lora_changes(module: Module) -> list[Change]:
    """What LoRA changes in a module: its weight, and its bias where ``lora_bias`` trained one."""
    config, parts = module.config, module.parts
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    down, up = module.part(names[0]), module.part(names[1])
    rank = down.shape[0] if down.shape else 0
    if len(up.shape) != len(down.shape) or len(up.shape) not in (2, 3, 4, 5) or up.shape[1] != rank or rank == 0:
        raise module.error(f"factors of shapes {down.shape} and {up.shape} do not multiply")
    if any(size != 1 for size in up.shape[2:]):
        raise module.error(f"its up factor {up.shape} has a kernel, which no LoRA has")
    module.check(*names, "lora_magnitude_vector", "lora_B.bias", beside=f"{names[0]} and {names[1]}")
    scale, start = lora_scale(module, rank), _start(config)
    magnitude = parts.get("lora_magnitude_vector")
    if config.get("use_dora") and magnitude is None:
        raise config.error(f"{module.path} has no lora_magnitude_vector, and its config says DoRA: it is incomplete")
    reasons = {
        "DoRA gives every output of the base's weight a new length": magnitude is not None,
        f"{start} took a part of the base's weight away at the start": start is not None,
    }
    changes: list[Change] = [
        LoraChange(
            module.target,
            "embedding" if embedding else "linear" if len(up.shape) == 2 else "conv",
            down,
            up,
            scale,
            transposed=embedding or (len(up.shape) == 2 and bool(config.get("fan_in_fan_out"))),
            magnitude=magnitude,
            start=start,
            needs_base=next((reason for reason, holds in reasons.items() if holds), None),
        )
    ]
    if "lora_B.bias" in parts:
        changes.append(AddedBias(f"{module.path}.bias", "bias", parts["lora_B.bias"], scale))
    return changes


def lora_scale(module: Module, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; patterns of the config may set both for a module."""
    config = module.config
    stated = config.pattern("rank_pattern", module.path, config.get("r", rank))
    if stated != rank:
        raise config.error(f"{module.path} has rank {rank}, and its config says {stated}: they do not belong together")
    # A config that leaves alpha out means PEFT's default, no config at all means scale 1.
    default = config.get("lora_alpha", 8 if config.stated else rank)
    alpha = config.pattern("alpha_pattern", module.path, default)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise config.error(f"lora_alpha of {module.path} is {alpha!r}, and should be a number")
    if config.get("use_rslora"):
        return alpha / sqrt(rank)
    return alpha / rank
