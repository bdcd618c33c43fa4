"""Adapters of a PEFT model in memory, merged into a new adapter of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from merging.api.merge_tensors import make_method, merge_changes
from merging.api.options import MethodParameters
from merging.api.peft_tensors import changes_in_memory, limit_rank
from merging.display.notices import describe_discarded, report_notices
from merging.errors import InputError, OptionError, nearest, option
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import torch
from merging.maths.linalg import balance_terms
from merging.maths.patterns import all_matching
from merging.methods.contract.method import Method
from merging.output.peft_config import NO_VARIANTS, lora_config
from merging.sources.changes import Change, LoraChange
from merging.sources.stored import MappedTensor
from merging.type_checks import check_types, describe_value

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any  # optional, and not imported for its types

__all__ = ["merge_peft"]


@check_types("adapters", "method", "adapter_name", "rank", "keys")
def merge_peft(
    model: PeftModel,
    adapters: Sequence[str],
    *,
    method: str | Method,
    adapter_name: str = "merged",
    rank: int | None = None,
    exclude: str | Sequence[str] = (),
    keys: Sequence[str] | None = None,
    allow_nonfinite: bool = False,
    **parameters: Unpack[MethodParameters],
) -> None:
    """Merge LoRA adapters of a loaded PEFT model into a new adapter of the model, in memory.

    The merge is the same as of the adapters' files: the products of the factors are merged, with rsLoRA, alphas and
    ranks of single modules, and DoRA on the model's weights. The new adapter is one of the model's: ``set_adapter``
    switches to it, and ``save_pretrained`` saves it. The active adapter stays active.

    Args:
        model: a ``peft.PeftModel`` with the adapters loaded.
        adapters: the names of the adapters, in the order of their weights.
        method: a method, or a chain as it is written (``"lines+task_arithmetic"``).
        adapter_name: the name of the new adapter.
        rank: the rank of the new adapter. By default it is the sum of the ranks, which is exact for methods that merge
            factors. A rank that discards more than a tenth of a change's energy is a warning.
        exclude: names, parts of names or wildcards of tensors that the new adapter does not change.
        keys: one key an adapter for methods that draw random numbers; the positions by default.
        allow_nonfinite: whether NaN and infinities are merged, which spread over the result.
        **parameters: the method's parameters by name (``weights=[0.7, 0.3]``).

    Raises:
        OptionError: for names of adapters that the model does not have, or has already.
        InputError: for adapters that are no LoRA, or that hold modules in full, and for values that are not finite.
            The model is then as it was.

    Example:
        >>> import merging, peft, transformers
        >>> base = transformers.AutoModel.from_pretrained("base")
        >>> model = peft.PeftModel.from_pretrained(base, "a", adapter_name="a")
        >>> _ = model.load_adapter("b", adapter_name="b")
        >>> merging.merge_peft(model, ["a", "b"], method="linear")
        >>> model.set_adapter("merged")
    """
    adapters = _check_names(model, adapters, adapter_name)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise OptionError(f"{option('rank', rank)}: a rank is a whole number above 0")
    bound = make_method(method, parameters, len(adapters))
    with torch.no_grad():
        targets = _read_targets(model, adapters, exclude)
        merged = merge_changes(
            [
                {name: target.deltas[slot] for name, target in targets.items() if slot in target.deltas}
                for slot in range(len(adapters))
            ],
            bound,
            of_model=[name.replace(".base_layer.", ".") for name, _ in model.get_base_model().named_parameters()],
            transposed=[name for name, target in targets.items() if target.transposed],
            keys=keys,
            allow_nonfinite=allow_nonfinite,
        )
        width = max(min(rank or target.rank, target.full_rank) for target in targets.values())
        cut = {name: target.factor(merged[name], width) for name, target in targets.items()}
        factors = {name: each for name, (each, _) in cut.items()}
        for name, each in factors.items():
            if not allow_nonfinite and not (each.up.isfinite().all() and each.down.isfinite().all()):
                raise InputError(f"{name}: the merged values are beyond the range of {each.up.dtype}")
        config = _merged_config(model, adapters[0], targets, width)
        _add_adapter(model, adapter_name, config, [(targets[name].layer, factors[name]) for name in targets])
    report_notices(describe_discarded({name: share for name, (_, share) in cut.items()}, f"raise {option('rank')}"))


def _check_names(model: PeftModel, adapters: Sequence[str], adapter_name: str) -> list[str]:
    """Return the names of the adapters. Refuse other models, and names that are unknown or taken."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        raise OptionError(f"model should be a PeftModel with its adapters loaded, and is {describe_value(model)}")
    loaded = list(model.peft_config)
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise OptionError(f"adapters should be a list of names, out of {', '.join(loaded)}, and is {adapters!r}")
    for name in adapters:
        if name not in loaded:
            raise OptionError(
                f"{name!r}: the model has no such adapter{nearest(str(name), loaded)}: it has {', '.join(loaded)}"
            )
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise OptionError(f"{adapter_name!r} cannot name an adapter: use a word without dots")
    if hasattr(torch.nn.ModuleDict, adapter_name):
        raise OptionError(f"{adapter_name!r} cannot name an adapter, as torch has it: choose another name")
    if adapter_name in loaded:
        taken = (
            f"the model has such an adapter already: choose another {option('adapter_name')}, or call delete_adapter"
        )
        raise OptionError(f"{adapter_name!r}: {taken}")
    return list(adapters)


@dataclass(slots=True)
class _Target:
    """A weight of the model that adapters change, and their changes by position."""

    module: str
    layer: Any
    shape: tuple[int, ...]
    transposed: bool = False
    dtype: torch.dtype | None = None
    rank: int = 0
    deltas: dict[int, Delta] = field(default_factory=dict)

    @property
    def full_rank(self) -> int:
        return min(self.shape[0], prod(self.shape[1:]))

    def add(self, slot: int, change: LoraChange) -> None:
        """Add an adapter's change, with every scale in its factors, on their device."""
        down, up = (part.tensor for part in (change.down, change.up) if isinstance(part, MappedTensor))
        self.dtype = down.dtype if self.dtype is None else torch.promote_types(self.dtype, down.dtype)
        self.rank += change.rank
        self.transposed = change.is_transposed(self.shape)
        dtype = torch.float64 if down.dtype == torch.float64 else torch.float32
        if change.magnitude is not None:
            weight = self.layer.get_base_layer().weight
            if not weight.is_floating_point() or weight.is_meta:
                state = "on the meta device" if weight.is_meta else "quantised"
                raise InputError(f"{change.target}: {change.needs_base}, and the model's weight is {state}")
            self.deltas[slot] = change.read(self.shape, lambda: weight.to("cpu", dtype), dtype).to(down.device)
            return
        upper = up.to(dtype).reshape(-1, len(down)) * change.scale
        self.deltas[slot] = LowRank(upper, down.to(dtype).reshape(len(down), -1), self.shape, self.transposed)

    def factor(self, merged: Delta, rank: int) -> tuple[LowRank, float]:
        """Return the merged change as factors of exactly this rank, and the share of its energy that they discard.

        The factors have the type of the adapters' factors.
        """
        factors, discarded = limit_rank(merged, rank, self.transposed)
        if self.dtype == torch.float16:
            factors = balance_terms(factors, factors.up.dtype)
        missing = rank - factors.rank
        down = torch.nn.functional.pad(factors.down, (0, 0, 0, missing)).to(self.dtype)
        up = torch.nn.functional.pad(factors.up, (0, missing)).to(self.dtype)
        return LowRank(up, down, self.shape, factors.transposed), discarded


def _read_targets(model: PeftModel, adapters: Sequence[str], exclude: str | Sequence[str]) -> dict[str, _Target]:
    """Read the changes of the adapters that are not excluded, by the weight that they change."""
    changes = [_read_changes(model, name) for name in adapters]
    left = all_matching(exclude, dict.fromkeys(target for each in changes for target in each))
    targets: dict[str, _Target] = {}
    for slot, (name, held) in enumerate(zip(adapters, changes, strict=True)):
        for target, change in held.items():
            if target in left:
                continue
            layer = _find_layer(model, target)
            if layer is None or not isinstance(change, LoraChange) or change.start:
                reason = change.needs_base or "it is no product of two factors for the weight of one layer"
                raise InputError(
                    f"adapter {name!r}: {target}: {reason}: leave it out with "
                    f"{option('exclude', target.rpartition('.')[0])}, or merge the adapters from their files, with "
                    f"their base"
                )
            if target not in targets:
                targets[target] = _Target(target.removesuffix(".weight"), layer, _shape_of(layer, change))
            targets[target].add(slot, change)
    if not targets:
        raise InputError("the adapters change nothing that is not excluded: there is nothing to merge")
    return targets


def _read_changes(model: PeftModel, name: str) -> dict[str, Change]:
    """Return the changes of an adapter, by target. Raises :class:`~merging.errors.InputError` without values.

    If any adapter has trained rows of tokens, PEFT looks for them in each: it finds an empty tensor here.
    """
    from peft.utils import get_peft_model_state_dict

    state = model.state_dict()
    rows = {key.rpartition(".")[0] for key in state if ".token_adapter.trainable_tokens_delta." in key}
    absent = {key for key in rows if f"{key}.{name}" not in state}
    state |= {f"{key}.{name}": torch.empty(0) for key in absent}
    saved = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
    held = {key: value for key, value in saved.items() if key not in absent}
    if any(value.is_meta for value in held.values()):
        raise InputError(
            f"adapter {name!r} is on the meta device, without values: load the model with its values first"
        )
    return changes_in_memory(held, model.peft_config[name].to_dict(), f"adapter {name!r}")


def _find_layer(model: PeftModel, target: str) -> Any:
    """Return the layer with the factors for a weight, None if the weight is no layer's own."""
    from peft.tuners.lora import LoraLayer

    try:
        layer = model.get_base_model().get_submodule(target.removesuffix(".weight"))
    except AttributeError:
        return None
    if not isinstance(layer, LoraLayer):
        return None
    if layer.merged:
        raise InputError(f"{target}: adapters are merged into the model's weights: call unmerge_adapter() first")
    return layer


def _shape_of(layer: Any, change: LoraChange) -> tuple[int, ...]:
    """Return the shape of a layer's weight, which is another one in memory where the weight is quantised."""
    shape = tuple(layer.get_base_layer().weight.shape)
    return shape if change.fits(shape) else change.shape


def _merged_config(model: PeftModel, adapter: str, targets: Mapping[str, _Target], rank: int) -> Any:
    """Return PEFT's config of the new adapter, with the facts about the task and the base of another one."""
    from peft import LoraConfig

    like = model.peft_config[adapter]
    fields = lora_config(
        rank=rank,
        target_modules=[target.module for target in targets.values()],
        **NO_VARIANTS,
        fan_in_fan_out=any(getattr(target.layer, "fan_in_fan_out", False) for target in targets.values()),
        **{
            name: getattr(like, name) for name in ("task_type", "base_model_name_or_path", "revision", "inference_mode")
        },
    )
    return LoraConfig(**{name: value for name, value in fields.items() if name != "peft_type"})


def _add_adapter(model: PeftModel, name: str, config: Any, layers: Sequence[tuple[Any, LowRank]]) -> None:
    """Add an adapter with these factors to a model; if this fails, the model stays as it was."""
    from peft.tuners.lora import LoraLayer

    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.add_adapter(name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        made = {id(each) for each in model.modules() if isinstance(each, LoraLayer) and name in each.r}
        if made != {id(layer) for layer, _ in layers}:
            raise InputError(f"{name!r}: names of the adapted modules are the ends of other modules' names")
        for layer, factors in layers:
            _write_factors(layer, name, factors)
    except BaseException:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _write_factors(layer: Any, name: str, factors: LowRank) -> None:
    """Put factors in place of the empty ones that PEFT made for a layer."""
    embedding = name in layer.lora_embedding_A
    turned = embedding or bool(getattr(layer, "fan_in_fan_out", False))
    factors = factors.oriented(turned) if len(factors.shape) == 2 else factors
    if embedding:
        for holder, value in ((layer.lora_embedding_A, factors.down), (layer.lora_embedding_B, factors.up)):
            holder[name] = torch.nn.Parameter(value.contiguous(), holder[name].requires_grad)
        return
    for module, value in ((layer.lora_A[name], factors.down), (layer.lora_B[name], factors.up)):
        shape, flag = module.weight.shape, module.weight.requires_grad
        module.weight = torch.nn.Parameter(value.reshape(shape).contiguous(), flag)
