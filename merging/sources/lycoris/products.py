"""Changes that are products of factors (LoRA and LoCon, LoHa, LoKr), and changes stored in full."""

from __future__ import annotations

from math import isfinite, prod

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.adapter_maths import hadamard, kronecker, tucker
from merging.sources.changes import AddedBias, Change, ChangeKind, LoraChange, Replacement
from merging.sources.computed import Parts, WeightView
from merging.sources.dtypes import DTYPES
from merging.sources.peft.module import Module
from merging.sources.stored import Stored

__all__ = ["full", "kind_of", "loha", "lokr", "lora", "norm", "number", "replacement", "scale_of"]


def number(module: Module, name: str) -> float:
    """Return the number in a part. It is read at once, as it decides what the other parts mean."""
    stored = module.part(name)
    known = stored.numel == 1 and stored.dtype_name in DTYPES and not stored.dtype.is_complex
    value = float(stored.read().reshape(-1)[0]) if known else float("nan")
    if not isfinite(value):
        raise module.error(
            f"its {name} should be one number, and is {stored.dtype_name} of shape {stored.shape}, or not finite"
        )
    return value


def scale_of(alpha: float | None, rank: int) -> float:
    """Return alpha / r; an alpha that is missing or 0 counts as the rank."""
    return alpha / rank if alpha else 1.0


def kind_of(kernel: tuple[int, ...] | None) -> ChangeKind:
    """Return the kind of a weight with this kernel."""
    return "conv" if kernel else "linear"


def _axes(stored: Stored, letters: str) -> str:
    """Return a layout with as many axes as a tensor has, but at least two: the first of the letters."""
    return " ".join(letters[: max(2, len(stored.shape))])


def lora(module: Module, alpha: float | None) -> Change:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): ``alpha / r up down``.

    A convolution's kernel is in ``down``, or in the core ``mid`` between the two.
    """
    down, up = module.part("lora_down"), module.part("lora_up")
    ones = " 1" * (len(up.shape) - 2)
    if "lora_mid" not in module.parts:
        size = module.sizes(lora_down=_axes(down, "riklm"), lora_up=f"o r{ones}")
        kind: ChangeKind = "linear" if len(down.shape) == 2 else "conv"
        return LoraChange(module.target, kind, down, up, scale_of(alpha, size["r"]))
    inner = " 1" * (len(down.shape) - 2)
    core = module.part("lora_mid")
    size = module.sizes(lora_down=f"s i{inner}", lora_up=f"o r{ones}", lora_mid=_axes(core, "rsklm"))
    scale, kernel = scale_of(alpha, size["r"]), core.shape[2:]

    def formula(parts: Parts, view: WeightView) -> tuple[Tensor, Tensor]:
        inputs = parts["lora_down"].flatten(1)
        wide = torch.einsum("rs...,si->ri...", parts["lora_mid"], inputs)
        return parts["lora_up"].flatten(1) * scale, wide.flatten(1)

    facts = {"outputs": size["o"], "inputs": size["i"], "kernel": kernel, "trained": size["r"]}
    return module.computed_change(
        formula, "lora_down", "lora_up", "lora_mid", kind="conv", scale=scale, factored=True, **facts
    )


def loha(module: Module, alpha: float | None) -> Change:
    """LoHa: ``alpha / r (w1_a w1_b) * (w2_a w2_b)``, entry by entry; with cores each is a Tucker product."""
    cores = "hada_t1" in module.parts
    layout = {"hada_w1_a": "r o" if cores else "o r", "hada_w1_b": "r i"}
    layout |= {name.replace("1", "2"): axes for name, axes in layout.items()}
    if cores:
        layout |= {name: _axes(module.part(name), "rrklm") for name in ("hada_t1", "hada_t2")}
    size = module.sizes(**layout)
    scale = scale_of(alpha, size["r"])
    kernel = module.part("hada_t1").shape[2:] if cores else None

    def formula(parts: Parts, view: WeightView) -> Tensor:
        first, second = (parts["hada_w1_a"], parts["hada_w1_b"]), (parts["hada_w2_a"], parts["hada_w2_b"])
        return hadamard(first, second, (parts["hada_t1"], parts["hada_t2"]) if cores else None) * scale

    facts = {"outputs": size["o"], "inputs": size["i"], "kernel": kernel, "trained": 0 if cores else size["r"] ** 2}
    return module.computed_change(formula, *layout, kind=kind_of(kernel), scale=scale, **facts)


def lokr(module: Module, alpha: float | None) -> Change:
    """LoKr: ``alpha / r`` times the Kronecker product of ``w1 [a, b]`` and ``w2 [c, d, *kernel]``.

    Both may be products themselves. Where neither is, the rank is not known and the scale is 1.
    """
    first = {"lokr_w1": "a b"} if "lokr_w1" in module.parts else {"lokr_w1_a": "a r", "lokr_w1_b": "r b"}
    if "lokr_w2" in module.parts:
        second = {"lokr_w2": _axes(module.part("lokr_w2"), "cdklm")}
    elif "lokr_t2" in module.parts:
        second = {"lokr_t2": _axes(module.part("lokr_t2"), "sqklm"), "lokr_w2_a": "s c", "lokr_w2_b": "q d"}
    else:
        second = {"lokr_w2_a": "c s", "lokr_w2_b": _axes(module.part("lokr_w2_b"), "sdklm")}
    layout = {**first, **second}
    size = module.sizes(**layout)
    rank = size.get("r") or size.get("s")
    scale = scale_of(alpha, rank) if rank else 1.0

    def formula(parts: Parts, view: WeightView) -> Tensor:
        left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_w2" in parts:
            right = parts["lokr_w2"]
        elif "lokr_t2" in parts:
            right = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        else:
            right = parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)
        return kronecker(left, right.flatten(1)) * scale

    kernel = tuple(size[axis] for axis in "klm" if axis in size)
    left = min(size["a"], size["b"], size.get("r", size["a"]))
    right = min(size["c"], size["d"] * prod(kernel), size.get("s", size["c"]))
    facts = {"outputs": size["a"] * size["c"], "inputs": size["b"] * size["d"], "kernel": kernel or None}
    return module.computed_change(formula, *layout, kind=kind_of(kernel), scale=scale, trained=left * right, **facts)


def full(module: Module, alpha: float | None) -> Change:
    """A change that was trained in full."""
    value = module.part("diff")
    module.check("diff", partner="diff")
    module.check_types("diff")
    if len(value.shape) < 2:
        return AddedBias(module.target, "bias", value, 1.0)
    outputs, inputs, *kernel = value.shape
    facts = {"outputs": outputs, "inputs": inputs, "kernel": tuple(kernel) or None}
    return module.computed_change(lambda parts, place: parts["diff"], "diff", kind=kind_of(tuple(kernel)), **facts)


def norm(module: Module, alpha: float | None) -> Change:
    """A change of the weight of a norm."""
    module.check("w_norm", partner="w_norm")
    module.check_types("w_norm")
    return AddedBias(module.target, "bias", module.part("w_norm"), 1.0)


def replacement(module: Module, alpha: float | None) -> Change:
    """A weight that replaces the base's."""
    module.check("set_weight", partner="set_weight")
    module.check_types("set_weight")
    reason = "it is saved in full, and what it changes is the difference from the base"
    return Replacement(module.target, "full", module.part("set_weight"), needs_base=reason)
