"""The kinds of change that adapters hold, with their definitions written out in float64."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from support.gallery.layout import Draw, Formula, Kind, Shape, State

__all__ = ["adalora", "boft", "diff", "dora", "experts", "glora", "ia3", "loha", "lokr", "lora", "lora_b", "oft",
           "replaced", "tucker", "vera"]  # fmt: skip

PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")


def product(up: Tensor, down: Tensor, shape: Shape) -> Tensor:
    rank = down.shape[0]
    return (up.double().reshape(-1, rank) @ down.double().reshape(rank, -1)).reshape(shape)


def factors(draw: Draw, shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    return draw(rank, *shape[1:]), draw(shape[0], rank, *(1 for _ in shape[2:]))


def lora(
    leaves: tuple[str, str] = PEFT,
    alpha: float | None = None,
    *,
    scale: float | None = None,
    rank: int = 2,
    turned: bool = False,
    stated: str = "alpha",
) -> Kind:
    """``W + scale * up @ down``. ``alpha`` is in the file; ``scale`` holds if it is elsewhere, and is 1 otherwise.

    ``turned``: the weight is ``[in, out]``.
    """

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        down, up = factors(draw, shape[::-1] if turned else shape, rank)
        times = alpha / rank if alpha is not None else scale if scale is not None else 1.0
        tensors = {leaves[0]: down, leaves[1]: up}
        if alpha is not None:
            tensors[stated] = torch.tensor(float(alpha))
        delta = product(up, down, shape[::-1] if turned else shape)
        return tensors, lambda weight: weight + times * (delta.T if turned else delta)

    return kind


def lora_b(leaf: str, scale: float) -> Kind:
    """A trained bias of the upper factor."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        value = draw(*shape)
        return {leaf: value}, lambda bias: bias + scale * value.double()

    return kind


def dora(leaves: tuple[str, str], magnitude: str, *, scale: float, over_inputs: bool = False) -> Kind:
    """DoRA: each output of ``W + delta`` has the length of its magnitude; each input in LyCORIS's older files."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        down, up = factors(draw, shape, 2)
        length = draw(*((1, shape[1]) if over_inputs else (shape[0],))).abs() + 1

        def formula(weight: Tensor) -> Tensor:
            total = weight + scale * product(up, down, shape)
            norm = total.norm(dim=0 if over_inputs else 1, keepdim=True)
            return total * length.double().reshape(norm.shape) / norm

        return {leaves[0]: down, leaves[1]: up, magnitude: length}, formula

    return kind


def diff(leaf: str = "diff") -> Kind:
    """A change in full, added."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        value = draw(*shape)
        return {leaf: value}, lambda weight: weight + value.double()

    return kind


def replaced(leaf: str = "weight") -> Kind:
    """A tensor saved in full, which takes the place of the base's."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        value = draw(*shape)
        return {leaf: value}, lambda _: value.double()

    return kind


def loha(alpha: float | None, scale: float | None = None) -> Kind:
    """``W + s * (w1a @ w1b) * (w2a @ w2b)``."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        parts = {f"hada_w{n}_{side}": draw(*size) for n in "12"
                 for side, size in (("a", (shape[0], 2)), ("b", (2, prod(shape[1:]))))}  # fmt: skip
        times = scale if scale is not None else (alpha or 2) / 2
        one, two = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in "12")
        stated = {} if alpha is None else {"alpha": torch.tensor(float(alpha))}
        return parts | stated, lambda weight: weight + times * (one * two).reshape(shape)

    return kind


def lokr(alpha: float | None, *, factored: bool, scale: float | None = None) -> Kind:
    """``W + s * kron(w1, w2)``; the scale is 1 where both are full."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        first = draw(2, 2)
        rows, columns = shape[0] // 2, shape[1] // 2
        parts = {"lokr_w1": first}
        if factored:
            parts |= {"lokr_w2_a": draw(rows, 2), "lokr_w2_b": draw(2, columns)}
            second = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
        else:
            parts["lokr_w2"] = draw(rows, columns)
            second = parts["lokr_w2"].double()
        times = scale if scale is not None else alpha / 2 if factored and alpha is not None else 1.0
        stated = {} if alpha is None else {"alpha": torch.tensor(float(alpha))}
        return parts | stated, lambda weight: weight + times * torch.kron(first.double(), second)

    return kind


def tucker(alpha: float) -> Kind:
    """LoCon with a core: ``delta[o, i, k] = s * up[o, a] core[a, b, k] down[b, i]``."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        ones = tuple(1 for _ in shape[2:])
        down, core, up = draw(2, shape[1], *ones), draw(2, 2, *shape[2:]), draw(shape[0], 2, *ones)
        delta = torch.einsum("oa,abkl,bi->oikl", up.double()[..., 0, 0], core.double(), down.double()[..., 0, 0])
        tensors = {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up}
        return tensors | {"alpha": torch.tensor(alpha)}, lambda weight: weight + alpha / 2 * delta

    return kind


def glora(alpha: float) -> Kind:
    """GLoRA: ``W + s * (W a1 a2 + b1 b2)``."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        out, width = shape
        a1, a2, b1, b2 = draw(width, 2), draw(2, width), draw(out, 2), draw(2, width)
        tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}

        def formula(weight: Tensor) -> Tensor:
            return weight + alpha / 2 * (weight @ a1.double() @ a2.double() + b1.double() @ b2.double())

        return tensors | {"alpha": torch.tensor(alpha)}, formula

    return kind


def ia3(leaf: str, *, added: bool, on_input: bool = False) -> Kind:
    """IA3: outputs or inputs times a vector; times 1 + the vector in LyCORIS, which says so in ``on_input``."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        vector = draw(*((1, shape[1]) if on_input else (shape[0], 1)))
        tensors = {leaf: vector} | ({"on_input": torch.tensor(on_input)} if added else {})
        return tensors, lambda weight: weight * ((1 if added else 0) + vector.double())

    return kind


def cayley(skew: Tensor) -> Tensor:
    eye = torch.eye(skew.shape[-1], dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def oft(block: int = 4, *, back: bool = False) -> Kind:
    """Diag-OFT of LyCORIS: blocks of outputs turned by the transpose of R, or ``back`` by R.

    ``R = (I + Q) (I - Q)^-1``, and ``Q = blocks - blocks^T``.
    """

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        blocks = draw(shape[0] // block, block, block)

        def formula(weight: Tensor) -> Tensor:
            turn = cayley(blocks.double() - blocks.double().mT)
            turn = turn if back else turn.mT
            return torch.einsum("kmn,kn...->km...", turn, weight.reshape(-1, block, *shape[1:])).reshape(shape)

        return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, formula

    return kind


def boft(block: int = 4) -> Kind:
    """BOFT of LyCORIS with one stage: Diag-OFT, with the two halves of each block interleaved before it."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        tensors, turned = oft(block, back=True)(draw, shape)

        def formula(weight: Tensor) -> Tensor:
            woven = weight.reshape(-1, 2, block // 2, *shape[1:]).transpose(1, 2).reshape(shape)
            return turned(woven).reshape(-1, block // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)

        return {"oft_blocks": tensors["oft_blocks"][None], "alpha": tensors["alpha"]}, formula

    return kind


def adalora(alpha: float, rank: int = 2) -> Kind:
    """``W + alpha / (r + 1e-5) * B @ (A * E)``."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        down, up, values = draw(rank, shape[1]), draw(shape[0], rank), draw(rank, 1)
        delta = product(up, down.double() * values.double(), shape)
        tensors = {"lora_A": down, "lora_B": up, "lora_E": values}
        return tensors, lambda weight: weight + alpha / (rank + 1e-5) * delta

    return kind


def vera(shared: Mapping[str, Tensor]) -> Kind:
    """``W + (b * B) @ (d * A)`` of shared projections, cut to the size of the weight."""

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        lengths, ranks = draw(shape[0]), draw(len(shared["vera_A"]))
        up = lengths.double()[:, None] * shared["vera_B"].double()[: shape[0]]
        down = ranks.double()[:, None] * shared["vera_A"].double()[:, : shape[1]]
        return {"vera_lambda_b": lengths, "vera_lambda_d": ranks}, lambda weight: weight + up @ down

    return kind


def experts(scale: float, rank: int = 2, *, swapped: bool = False) -> Kind:
    """LoRA of stacked experts ``[E, out, in]``: A is ``[E * r, in]``, and B ``[out, r * E]``.

    ``swapped``: as PEFT before 0.19 wrote it, with inputs and outputs confused.
    """

    def kind(draw: Draw, shape: Shape) -> tuple[State, Formula]:
        count, outputs, inputs = shape
        first, last = (outputs, inputs) if swapped else (inputs, outputs)
        a, b = draw(count * rank, first), draw(last, rank * count)
        down, up = a.double().reshape(count, rank, first), b.double().reshape(last, rank, count).permute(2, 0, 1)
        delta = up @ down
        tensors = dict(zip(PEFT, (a, b), strict=True))
        return tensors, lambda weight: weight + scale * (delta.mT if swapped else delta)

    return kind
