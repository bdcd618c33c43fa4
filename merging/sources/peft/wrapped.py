"""LoRA of PEFT on parameters that are no module's weight, and on torch's multi-head attention.

The names in the file alone identify neither. Several parameters of one module are wrapped in one another
(``experts.base_layer.lora_A``, ``experts.lora_A``), and only the config names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from merging.sources.adapter import Adapter
from merging.sources.changes import Change, LoraChange
from merging.sources.expert_stacks import ExpertsChange
from merging.sources.peft.config import Config
from merging.sources.peft.module import Module
from merging.sources.tensor_views import view

__all__ = ["added_twice", "attention_target", "experts_change", "in_order", "out_proj_once", "parameter_of"]

_OUT_PROJ = ".base_layer.out_proj"
"""The place of PEFT's factors for the output projection of torch's multi-head attention."""

_SWAPPED_SINCE = (0, 19)
"""The version of PEFT since which ``down`` belongs to the inputs in all models."""


def in_order(parameters: Iterable[str]) -> list[str]:
    """Sort the names of a module's parameters as modules of experts define them, and PEFT wraps them.

    Input projections are first: ``gate_up_proj``, ``up_proj`` or ``w1`` before ``down_proj`` or ``w2``.
    """
    return sorted(parameters, key=lambda name: ("down" in name or name == "w2", name))


def attention_target(module: Module) -> tuple[str, float] | None:
    """Return the tensor of torch's multi-head attention that a module's factors change, and how often PEFT adds them.

    PEFT up to 0.21 adds the factors of ``out_proj`` twice, in training and in merging, so that the trained change is
    twice their product. :func:`out_proj_once` undoes this for adapters of a version that adds them once.
    """
    path, others = module.path, module.siblings
    if path.endswith(_OUT_PROJ) and path.removesuffix(_OUT_PROJ) in others:
        return f"{path.removesuffix(_OUT_PROJ)}.out_proj.weight", 2.0
    if path + _OUT_PROJ in others:
        return f"{path}.in_proj_weight", 1.0
    return None


def added_twice(adapter: Adapter) -> list[str]:
    """Return the targets of an adapter to which PEFT up to 0.21 adds factors twice."""
    ends = [(target, target.removesuffix(".out_proj.weight")) for target in adapter.changes]
    return [target for target, module in ends if module != target and f"{module}.in_proj_weight" in adapter.changes]


def out_proj_once(adapter: Adapter) -> Adapter:
    """Return the adapter as trained by a version that adds factors on the attention's output projection once."""
    changes = dict(adapter.changes)
    for target in added_twice(adapter):
        change = changes[target]
        if isinstance(change, LoraChange):
            changes[target] = replace(change, scale=change.scale / 2)
    return replace(adapter, changes=changes)


def parameter_of(module: Module) -> str | None:
    """Return the parameter that a module's factors change, None for the weight of a module.

    Raises :class:`~merging.errors.FormatError` if the config names other parameters than the file has factors for.
    """
    config, path = module.config, module.path
    plain = re.sub(r"(\.base_layer)+$", "", path)
    named, dotted = set(), False
    for target in config.names("target_parameters"):
        parent, _, parameter = target.rpartition(".")
        if not parent or plain == parent or plain.endswith(f".{parent}"):
            named.add(parameter)
            dotted |= bool(parent)
    if not named:
        return None
    wrappers = {each for each in (path, *module.siblings) if re.fullmatch(rf"{re.escape(plain)}(\.base_layer)*", each)}
    depth = path.count(".base_layer", len(plain))
    # A name without its module's fits any module: the factors of many experts are larger than the rank.
    stated = config.pattern("rank_pattern", path, config.get("r", 8))
    if not dotted and len(wrappers) == 1 and module.part("lora_A").shape[:1] == (stated,):
        return None
    if len(named) != len(wrappers):
        raise config.error(
            f"{plain} has factors for {len(wrappers)} parameters, and target_parameters in its config name "
            f"{', '.join(sorted(named))}: it is not clear for which the factors are"
        )
    return f"{plain}.{in_order(named)[len(wrappers) - 1 - depth]}"


def experts_change(module: Module, parameter: str, scale_of: Callable[[Module, int], float]) -> Change:
    """Return the change of a parameter: PEFT keeps ``down`` as ``[E * r, in]``, and ``up`` as ``[out, r * E]``.

    A parameter of two axes counts as one expert, like any weight. ``scale_of`` returns the scale of factors of a rank.
    """
    module = replace(module, path=parameter)
    module.check("lora_A", "lora_B", partner="lora_A and lora_B")
    module.check_types("lora_A", "lora_B")
    down, up = module.part("lora_A"), module.part("lora_B")
    rank = module.config.count("r", 8, parameter, "rank_pattern")
    if len(down.shape) != 2 or len(up.shape) != 2 or up.shape[1] != down.shape[0] or not down.numel or not up.numel:
        raise module.error(f"factors of shapes {down.shape} and {up.shape} do not multiply")
    if down.shape[0] % rank:
        raise module.error(
            f"has factors of {down.shape[0]} rows, which are not experts of the rank {rank} in its config"
        )
    experts, scale = down.shape[0] // rank, scale_of(module, rank)
    if experts == 1:
        return LoraChange(parameter, "linear", down, up, scale)
    either = _version(module.config) < _SWAPPED_SINCE
    reason = "PEFT before 0.19 took the inputs of most experts for their outputs, and only the base shows for which"
    return ExpertsChange(
        parameter,
        "experts",
        view(down, experts, rank, down.shape[1]),
        view(up, up.shape[0], rank, experts).permute(2, 0, 1),
        scale,
        transposed=either,
        either=either,
        needs_base=reason if either else None,
    )


def _version(config: Config) -> tuple[int, int]:
    """Return the first two numbers of the version of PEFT in the config, which has it since 0.18."""
    found = re.match(r"(\d+)\.(\d+)", config.text("peft_version") or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)
