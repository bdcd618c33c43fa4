"""LoRA as PEFT holds it in memory: read into changes, and changes written back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.errors import InputError
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.output.peft_config import lora_config
from merging.sources.changes import LoraChange
from merging.sources.peft import peft_changes
from merging.sources.stored import MappedTensor

__all__ = ["peft_deltas", "peft_state_dict"]


def peft_deltas(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Delta]:
    """Read the changes of a PEFT LoRA state dict, with every scale folded into the factors.

    Args:
        state_dict: the tensors, as ``peft.get_peft_model_state_dict`` returns them.
        config: the adapter's config, as in ``adapter_config.json``.

    Returns:
        The change of each target. Factors stay on their device and keep their gradients.

    Raises:
        FormatError: for a state dict or a config of no plain LoRA.
        InputError: for variants that need the base (DoRA, PiSSA, OLoRA).
    """
    stored = {name: MappedTensor(tensor, ("", 0)) for name, tensor in state_dict.items()}
    deltas: dict[str, Delta] = {}
    for target, change in peft_changes(stored, config, "the state dict").items():
        if change.needs_base or not isinstance(change, LoraChange):
            raise InputError(
                f"{target}: {change.needs_base or 'is not a LoRA'}: merge this adapter from its files, with its base"
            )
        down, up = (part.tensor for part in (change.down, change.up) if isinstance(part, MappedTensor))
        rank = len(down)
        deltas[target] = LowRank(
            up.reshape(-1, rank) * change.scale, down.reshape(rank, -1), change.shape, change.transposed
        )
    return deltas


def peft_state_dict(deltas: Mapping[str, Delta]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write changes as a PEFT LoRA state dict.

    Args:
        deltas: the change of each target, a linear layer's weight.

    Returns:
        A state dict for ``peft.set_peft_model_state_dict``, and its config. All targets have one rank, with zeros up to
        it, and alpha is equal to the rank.

    Raises:
        InputError: for changes that are not low-rank matrices.
    """
    low = {target: delta for target, delta in deltas.items() if isinstance(delta, LowRank) and len(delta.shape) == 2}
    if len(low) < len(deltas) or not low:
        odd = next((target for target in deltas if target not in low), "nothing")
        raise InputError(f"{odd}: PEFT's linear LoRA holds only low-rank changes of matrices")
    rank = max(delta.rank for delta in low.values())
    state: dict[str, Tensor] = {}
    for target, delta in low.items():
        module = "base_model.model." + target.removesuffix(".weight")
        missing = rank - delta.rank
        state[f"{module}.lora_A.weight"] = torch.nn.functional.pad(delta.down, (0, 0, 0, missing))
        state[f"{module}.lora_B.weight"] = torch.nn.functional.pad(delta.up, (0, missing))
    modules = (target.removesuffix(".weight") for target in low)
    transposed = any(delta.transposed for delta in low.values())
    return state, lora_config(rank=rank, target_modules=modules, fan_in_fan_out=transposed)
