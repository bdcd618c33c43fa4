"""LoRA as PEFT holds it in memory: read into changes, and changes written back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.api.arguments import check_path, check_state_dict
from merging.display.notices import describe_discarded, report_notices
from merging.errors import InputError, option
from merging.hub.address import local_path
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import compress_matrix, truncate
from merging.maths.site import inputs_by_outputs
from merging.output.peft_config import lora_config
from merging.sources.changes import Change, LoraChange
from merging.sources.peft import peft_changes
from merging.sources.small_files import read_json
from merging.sources.stored import MappedTensor
from merging.type_checks import check_types

if TYPE_CHECKING:
    from peft import PeftConfig
else:
    PeftConfig = Any  # optional, and not imported for its types

__all__ = ["changes_in_memory", "limit_rank", "peft_deltas", "peft_state_dict"]


def changes_in_memory(state_dict: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Change]:
    """Return the changes in a PEFT state dict, by target, as in an adapter's file; ``where`` is its name in errors."""
    stored = {name: MappedTensor(tensor, ("", 0)) for name, tensor in state_dict.items()}
    return peft_changes(stored, config, where)


@check_types("state_dict", "config")
def peft_deltas(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | PeftConfig | str | Path
) -> dict[str, Delta]:
    """Read the changes of a PEFT LoRA state dict, with every scale folded into the factors.

    Args:
        state_dict: the tensors, as ``peft.get_peft_model_state_dict`` returns them.
        config: the adapter's config: PEFT's object (``model.peft_config["default"]``), its fields, or the path of an
            ``adapter_config.json`` or of its folder.

    Returns:
        The change of each target. Factors stay on their device and keep their gradients.

    Raises:
        FormatError: for a state dict or a config of no plain LoRA.
        InputError: for variants that need the base (DoRA, PiSSA, OLoRA).

    Example:
        >>> import merging
        >>> from safetensors.torch import load_file
        >>> deltas = merging.peft_deltas(load_file("a/adapter_model.safetensors"), "a")
        >>> len(deltas)
        12
    """
    state_dict = check_state_dict(state_dict, "state_dict")
    deltas: dict[str, Delta] = {}
    for target, change in changes_in_memory(state_dict, _config_fields(config), "the state dict").items():
        if change.needs_base or not isinstance(change, LoraChange):
            raise InputError(
                f"{target}: {change.needs_base or 'is no LoRA'}: merge this adapter from its files, with its base"
            )
        down, up = (part.tensor for part in (change.down, change.up) if isinstance(part, MappedTensor))
        rank = len(down)
        deltas[target] = LowRank(
            up.reshape(-1, rank) * change.scale, down.reshape(rank, -1), change.shape, change.transposed
        )
    return deltas


def _config_fields(config: Mapping[str, Any] | PeftConfig | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, (str, Path)) and hasattr(config, "peft_type"):
        fields: Mapping[str, Any] = config.to_dict()
        return fields
    path = local_path(str(check_path(config, "config")))
    return read_json(path / "adapter_config.json" if path.is_dir() else path)


@check_types()
def peft_state_dict(
    deltas: Mapping[str, Delta], *, rank: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write changes as a PEFT LoRA state dict.

    Args:
        deltas: the change of each target, a linear layer's weight.
        rank: the largest rank of the factors. Higher ranks and full changes are cut to the best approximation in the
            Frobenius norm. By default all ranks are kept, and full changes are refused.

    Returns:
        A state dict for ``peft.set_peft_model_state_dict``, and its config. All targets have one rank, with zeros up to
        it, and alpha is equal to the rank. A rank that discards more than a tenth of a change's energy is a warning.

    Raises:
        InputError: for changes that are not matrices, and for full changes without ``rank``.

    Example:
        >>> import torch, merging
        >>> state, config = merging.peft_state_dict({"layer.weight": merging.Dense(torch.eye(4))}, rank=2)
        >>> config["r"], sorted(state)
        (2, ['base_model.model.layer.lora_A.weight', 'base_model.model.layer.lora_B.weight'])
    """
    odd = next((target for target, delta in deltas.items() if len(delta.shape) != 2), None if deltas else "nothing")
    if odd is not None:
        raise InputError(f"{odd}: PEFT's linear LoRA holds only changes of matrices")
    turned = {target for target, delta in deltas.items() if isinstance(delta, LowRank) and delta.transposed}
    turned |= inputs_by_outputs({target: delta.shape for target, delta in deltas.items()})
    low: dict[str, LowRank] = {}
    discarded: dict[str, float] = {}
    for target, delta in deltas.items():
        if rank is None and not isinstance(delta, LowRank):
            raise InputError(
                f"{target}: PEFT's linear LoRA holds only low-rank changes, and this one is full: choose a rank with "
                f"{option('rank')}"
            )
        low[target], discarded[target] = limit_rank(delta, rank, target in turned)
    report_notices(describe_discarded(discarded, f"raise {option('rank')}"))
    width = max(delta.rank for delta in low.values())
    state: dict[str, Tensor] = {}
    for target, factors in low.items():
        module = "base_model.model." + target.removesuffix(".weight")
        missing = width - factors.rank
        state[f"{module}.lora_A.weight"] = torch.nn.functional.pad(factors.down, (0, 0, 0, missing))
        state[f"{module}.lora_B.weight"] = torch.nn.functional.pad(factors.up, (0, missing))
    modules = (target.removesuffix(".weight") for target in low)
    return state, lora_config(rank=width, target_modules=modules, fan_in_fan_out=bool(turned))


def limit_rank(delta: Delta, rank: int | None, transposed: bool) -> tuple[LowRank, float]:
    """Return the best factors of at most ``rank`` for a change, and the share of its energy that they discard.

    ``transposed``: a full change belongs to a tensor that is stored as ``[in, out]``.
    """
    if isinstance(delta, LowRank):
        return (delta, 0.0) if rank is None else truncate(delta, rank)
    matrix = delta.value.reshape(len(delta.value), -1)
    most = min(matrix.shape) if rank is None else rank
    return compress_matrix(matrix.mT if transposed else matrix, most, delta.shape, transposed)
