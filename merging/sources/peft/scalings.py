"""PEFT's types that scale the base's weight: IA3 by rows or columns, HiRA entry by entry."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor
from merging.sources.changes import Change
from merging.sources.computed import ComputedChange, Parts, WeightView
from merging.sources.peft.module import Module

__all__ = ["hira", "ia3"]


def ia3(module: Module) -> list[Change]:
    """IA3 (Liu et al. 2022, arXiv 2205.05638): every output of the weight times its factor, and the bias with it.

    In feed-forward modules every input is scaled instead, and the bias stays. Factors are ``[out, 1]`` or ``[1, in]``;
    for convolutions both are ``[1, n, 1, 1]``, so that the config decides.
    """
    stored = module.part("ia3_l")
    axes = len(stored.shape)
    convolution = axes in (4, 5)
    layout = " ".join(["1", "n", *("1" for _ in stored.shape[2:])])
    inwards = stored.shape[:1] == (1,)
    if convolution or stored.shape == (1, 1):
        inwards = _feeds_forward(module)
    elif not inwards:
        layout = "n 1"
    count = module.sizes(ia3_l=layout)["n"]

    def formula(parts: Parts, view: WeightView) -> Tensor:
        factors = parts["ia3_l"].flatten() - 1
        if not inwards:
            return view.weight * factors[:, None]
        # a grouped convolution has more inputs than its weight shows: every group has its own
        groups, rest = divmod(count, view.shape[1])
        if rest or not groups or view.outputs % groups:
            raise module.error(f"has {count} factors, which do not belong to a weight of the shape {view.shape}")
        weight = view.weight.reshape(groups, view.outputs // groups, view.shape[1], -1)
        return weight * factors.reshape(groups, 1, -1, 1)

    reason = "IA3 scales the base's weight"
    facts = {"inputs": count if not convolution else None} if inwards else {"outputs": count}
    changes: list[Change] = [module.computed_change(formula, "ia3_l", needs_base=reason, **facts)]
    if not inwards:
        changes.append(
            ComputedChange(
                module.bias, "bias", {"ia3_l": stored}, formula, outputs=count, optional=True, needs_base=reason
            )
        )
    return changes


def _feeds_forward(module: Module) -> bool:
    named = module.config.get("feedforward_modules") or []
    if isinstance(named, str):
        return module.config.match(named, "feedforward_modules", module.path, whole=True) is not None
    return any(module.path.endswith(name) for name in module.config.names("feedforward_modules"))


def hira(module: Module) -> list[Change]:
    """HiRA (Huang et al. 2025, ICLR): the weight times a low-rank matrix, entry by entry: ``W * (B A)``.

    ``A`` is ``[r, in, *kernel]`` and ``B [out, r]``, with ones for a kernel.
    """
    embedding = "hira_embedding_A" in module.parts
    down, up = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")
    kernel = "k l m"[: max(0, 2 * len(module.part(down).shape) - 5)]
    size = module.sizes(**{down: f"r i {kernel}", up: f"o r {' '.join('1' for _ in kernel.split())}"})

    def formula(parts: Parts, view: WeightView) -> Tensor:
        return view.weight * (parts[up].reshape(-1, size["r"]) @ parts[down].reshape(size["r"], -1))

    return [
        module.computed_change(
            formula,
            down,
            up,
            kind="embedding" if embedding else "linear",
            outputs=size["o"],
            inputs=size["i"],
            kernel=tuple(size[axis] for axis in kernel.split()) or None,
            needs_base="HiRA multiplies the base's weight",
        )
    ]
