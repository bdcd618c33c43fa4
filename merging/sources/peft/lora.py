"""LoRA, and its variants DoRA, PiSSA and OLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, Literal

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import AddedBias, Change, LoraChange
from merging.sources.computed import ComputedChange, WeightView
from merging.sources.peft.config import Config
from merging.sources.peft.module import Module
from merging.sources.peft.trainable_tokens import TOKENS, lora_tokens
from merging.sources.peft.wrapped import attention_target, experts_change, parameter_of

__all__ = ["LORA_LEAVES", "TRAINING_STATE", "check_lora", "lora_about", "lora_changes", "lora_scale"]

LORA_LEAVES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag", TOKENS)
"""The names of LoRA's tensors after the path of their module."""

TRAINING_STATE = ("lora_velora_embed", "lora_monteclora_sampler")
"""Tensors that VeLoRA and MonteCLoRA use only for training: afterwards both are plain LoRA."""

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
    "use_qalora": "its factors are grouped for a quantised base (QALoRA)",
    "arrow_config": "it routes between experts at run time (Arrow)",
    "alora_invocation_tokens": "it acts only on what follows certain tokens (aLoRA)",
}
_VARIANTS = {
    "use_rslora": "rsLoRA",
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "lora_bias": "biases",
    "target_parameters": "experts or other parameters",
    "trainable_token_indices": "rows of tokens",
    "modules_to_save": "modules saved in full",
}


def lora_about(config: Config) -> str:
    """Return a description of a LoRA's changes that names its variants."""
    start = {"pissa": ["PiSSA"], "olora": ["OLoRA"]}.get(str(config.get("init_lora_weights")), [])
    return ", ".join(["low-rank factors", *start, *(name for key, name in _VARIANTS.items() if config.get(key))])


def check_lora(config: Config) -> None:
    """Refuse variants that the file does not determine completely."""
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
    """Return the start that must be subtracted from the base, None without one."""
    start = config.get("init_lora_weights", True)
    return "pissa" if start == "pissa" else "olora" if start == "olora" else None


def lora_changes(module: Module) -> list[Change]:
    """Return LoRA's changes of a module: of its weight, and of its bias if ``lora_bias`` trained one."""
    if TOKENS in module.parts:
        return [lora_tokens(module)]
    parameter, attention = parameter_of(module), attention_target(module)
    if parameter:
        return [experts_change(module, parameter, lora_scale)]
    if attention:
        return [_attention(module, *attention)]
    config, parts = module.config, module.parts
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    if config.get("use_bdlora"):
        return [_block_diagonal(module)]
    if "lora_diag" in parts or config.get("kasa_config"):
        return [_kasa(module)]
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    down, up = module.part(names[0]), module.part(names[1])
    rank = down.shape[0] if down.shape else 0
    if len(up.shape) != len(down.shape) or len(up.shape) not in (2, 3, 4, 5) or up.shape[1] != rank or rank == 0:
        raise module.error(f"factors of shapes {down.shape} and {up.shape} do not multiply")
    if any(size != 1 for size in up.shape[2:]):
        raise module.error(f"its up factor {up.shape} has a kernel, which no LoRA has")
    module.check(*names, "lora_magnitude_vector", "lora_B.bias", partner=f"{names[0]} and {names[1]}")
    module.check_types(*parts)
    scale, start = lora_scale(module, rank), _start(config)
    magnitude = parts.get("lora_magnitude_vector")
    if config.get("use_dora") and magnitude is None:
        raise config.error(f"{module.path} has no lora_magnitude_vector, and its config says DoRA: it is incomplete")
    if magnitude is not None and magnitude.numel != up.shape[0]:
        raise module.error(f"its {magnitude.numel} magnitudes do not fit {up.shape[0]} outputs")
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


def _attention(module: Module, target: str, times: float) -> LoraChange:
    """Return plain LoRA on a tensor of torch's multi-head attention, which PEFT adds ``times`` times."""
    module.sizes(lora_A="r i", lora_B="o r")
    down, up = module.part("lora_A"), module.part("lora_B")
    return LoraChange(target, "linear", down, up, times * lora_scale(module, down.shape[0]))


def _kasa(module: Module) -> ComputedChange:
    """KaSA (Wang et al. 2025, arXiv 2412.06071): ``s B diag(d) A``, on a base without its ``r`` smallest directions."""
    size = module.sizes(lora_A="r i", lora_B="o r", lora_diag="r")
    rank, scale = size["r"], lora_scale(module, size["r"])

    def formula(parts: Mapping[str, Tensor], view: WeightView) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(view.weight, full_matrices=False)
        up = torch.cat([parts["lora_B"] * parts["lora_diag"] * scale, -u[:, -rank:] * s[-rank:]], 1)
        return up, torch.cat([parts["lora_A"], vh[-rank:]], 0)

    reason = "KaSA took the base's least singular values away at the start"
    return module.computed_change(
        formula,
        "lora_A",
        "lora_B",
        "lora_diag",
        outputs=size["o"],
        inputs=size["i"],
        allows=lambda outputs, width: rank < min(outputs, width),
        factored=True,
        trained=2 * rank,
        transposed=False,
        scale=scale,
        needs_base=reason,
    )


def _block_diagonal(module: Module) -> ComputedChange:
    """BD-LoRA (Block-Diagonal LoRA, NeurIPS 2025): one factor is block diagonal, its blocks stacked in the file."""
    options = module.config.get("use_bdlora")
    options = Config(options if isinstance(options, Mapping) else {}, f"{module.config.where}: use_bdlora")
    blocks, name = options.count("nblocks", 1), module.path.rpartition(".")[2]
    diagonal = [any(part in name for part in options.names(f"target_modules_bd_{side}")) for side in "ab"]
    layout = {"lora_A": "r i", "lora_B": "o q"} if diagonal[1] else {"lora_A": "r i", "lora_B": "o r"}
    size = module.sizes(**layout)
    rank, scale = size["r"], lora_scale(module, size["r"])
    times = blocks if diagonal[1] else 1
    if all(diagonal) or size.get("q", rank) * times != rank or (rank if diagonal[0] else size["o"]) % blocks:
        raise module.error(f"its factors do not divide into the {blocks} blocks of use_bdlora in its config")

    def formula(parts: Mapping[str, Tensor], view: WeightView) -> tuple[Tensor, Tensor]:
        up, down = parts["lora_B"] * scale, parts["lora_A"]
        return _unstack(up, blocks) if diagonal[1] else up, _unstack(down, blocks) if diagonal[0] else down

    inputs = size["i"] * (blocks if diagonal[0] else 1)
    facts: dict[str, Any] = {"outputs": size["o"], "inputs": inputs, "trained": rank, "scale": scale, "factored": True}
    return module.computed_change(formula, *layout, **facts)


def _unstack(stacked: Tensor, blocks: int) -> Tensor:
    """Return the block diagonal matrix whose blocks are equal parts of the rows."""
    diagonal: Tensor = torch.block_diag(*stacked.chunk(blocks))  # type: ignore[no-untyped-call]
    return diagonal


def lora_scale(module: Module, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA; patterns of the config may set both for a module."""
    config = module.config
    stated = config.pattern("rank_pattern", module.path, config.get("r", rank))
    if stated != rank:
        raise config.error(
            f"{module.path} has rank {rank}, and its config says {stated!r}: they do not belong together"
        )
    # A config that leaves alpha out means PEFT's default, no config at all means scale 1.
    default = config.get("lora_alpha", 8 if config.stated else rank)
    alpha = config.pattern("alpha_pattern", module.path, default)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e300:
        raise config.error(f"lora_alpha of {module.path} is {alpha!r}, and should be a number")
    if config.get("use_rslora"):
        return alpha / sqrt(rank)
    return alpha / rank
