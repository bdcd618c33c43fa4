"""LoHa and LoKr in PEFT, which differ from LyCORIS for some convolutions."""

from __future__ import annotations

from math import prod

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.adapter_maths import hadamard, kronecker, tucker
from merging.sources.changes import Change
from merging.sources.computed import Parts, WeightView
from merging.sources.peft.module import Module

__all__ = ["loha", "lokr"]


def loha(module: Module) -> list[Change]:
    """LoHa (FedPara, Hyeon-Woo et al. 2022, arXiv 2108.06098): ``alpha / r (w1_a w1_b) * (w2_a w2_b)``, entry by entry.

    With cores ``t1`` and ``t2 [r, r, *kernel]`` each matrix is a Tucker product, of ``[r, out]`` and ``[r, in]``.
    """
    cores = "hada_t1" in module.parts
    one = {"hada_w1_a": "r o", "hada_w1_b": "r i"} if cores else {"hada_w1_a": "o r", "hada_w1_b": "r i"}
    two = {name.replace("1", "2"): axes for name, axes in one.items()}
    layout = {**one, **two, **({"hada_t1": "r r k l", "hada_t2": "r r k l"} if cores else {})}
    size = module.sizes(**layout)
    scale = _scale(module, size["r"])

    def formula(parts: Parts, view: WeightView) -> Tensor:
        first, second = (parts["hada_w1_a"], parts["hada_w1_b"]), (parts["hada_w2_a"], parts["hada_w2_b"])
        return hadamard(first, second, (parts["hada_t1"], parts["hada_t2"]) if cores else None) * scale

    return [
        module.computed_change(
            formula,
            *layout,
            transposed=False,
            scale=scale,
            outputs=size["o"],
            inputs=size["i"],
            kernel=(size["k"], size["l"]) if cores else None,
            trained=size["r"] ** 2,
            flat=not cores,
        )
    ]


def lokr(module: Module) -> list[Change]:
    """LoKr (LyCORIS, Yeh et al. 2024, arXiv 2309.14859): ``alpha / r`` times the Kronecker product ``w1 x w2``.

    Both may be products themselves: ``w1 = w1_a w1_b [a, b]``, ``w2 = w2_a w2_b [c, d]``, or with a core ``t2 [r, r,
    *kernel]``. For a full ``w2`` of a convolution along one axis PEFT takes the product along the wrong axes, in
    training too; this is repeated here.
    """
    first = {"lokr_w1": "a b"} if "lokr_w1" in module.parts else {"lokr_w1_a": "a r", "lokr_w1_b": "r b"}
    axes = "c d k l"
    if "lokr_w2" in module.parts:
        axes = axes[: 2 * max(2, len(module.parts["lokr_w2"].shape)) - 1]
        second = {"lokr_w2": axes}
    elif "lokr_t2" in module.parts:
        second = {"lokr_t2": "r r k l", "lokr_w2_a": "r c", "lokr_w2_b": "r d"}
    else:
        second = {"lokr_w2_a": "c r", "lokr_w2_b": "r d"}
    layout = {**first, **second}
    size = module.sizes(**layout)
    scale = _scale(module, size.get("r"))

    def formula(parts: Parts, view: WeightView) -> Tensor:
        left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_w2" in parts:
            right = parts["lokr_w2"]
        elif "lokr_t2" in parts:
            right = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        else:
            right = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        return (torch.kron(left, right) if right.dim() == 3 else kronecker(left, right)) * scale

    kernel = tuple(size[axis] for axis in "kl" if axis in size) or None
    left = min(size["a"], size["b"], size["r"] if "lokr_w1_a" in layout else size["a"])
    right = min(size["c"], size["d"] * prod(kernel or ()), size["c"] if "lokr_w2" in layout else size["r"])
    return [
        module.computed_change(
            formula,
            *layout,
            transposed=False,
            scale=scale,
            outputs=size["a"] * size["c"],
            inputs=size["b"] * size["d"],
            kernel=kernel,
            flat=kernel is None,
            trained=left * right if axes != "c d k" else 0,  # along the wrong axes these are not ranks
        )
    ]


def _scale(module: Module, rank: int | None) -> float:
    """Return alpha / r, by the patterns of the config; the tensors must have this r."""
    config = module.config
    stated = config.count("r", 8, module.path, "rank_pattern")
    if rank not in (None, stated):
        raise module.error(f"has rank {rank}, and its config says {stated}: they do not belong together")
    return config.number("alpha", 8, module.path, "alpha_pattern") / stated
