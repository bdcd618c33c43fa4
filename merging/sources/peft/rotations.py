"""PEFT's types that rotate the base's weight: OFT, BOFT and RoAD."""

from __future__ import annotations

from math import isqrt, sqrt

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.adapter_maths import blockwise, cayley, cayley_series, skew
from merging.sources.changes import Change
from merging.sources.computed import ComputedChange, Parts, WeightView
from merging.sources.peft.module import Module

__all__ = ["boft", "oft", "road"]


def oft(module: Module) -> list[Change]:
    """OFT (Qiu et al. 2023, arXiv 2306.07280): the inputs of the weight, rotated in blocks: ``R W^T - W^T``.

    ``R`` are rotations of skew-symmetric matrices by Cayley's formula or by PEFT's series for it; the entries above
    their diagonals are ``[blocks, size (size - 1) / 2]``. ``block_share``: one block for all. For embeddings the
    features are rotated, ``W R``. ``coft`` limits the norm of the matrices, and PEFT does so again on loading.
    """
    config = module.config
    embedding = "oft_embedding_R" in module.parts
    name = "oft_embedding_R" if embedding else "oft_R"
    size = module.sizes(**{name: "n e"})
    side = (1 + isqrt(1 + 8 * size["e"])) // 2
    if side * (side - 1) // 2 != size["e"]:
        raise module.error(f"{name} has {size['e']} entries a block, which no square block has above its diagonal")
    shared, series = bool(config.get("block_share")), bool(config.get("use_cayley_neumann", True))
    terms, most = config.count("num_cayley_neumann_terms", 5), config.number("eps", 6e-5) / sqrt(size["n"])
    if shared and size["n"] != 1:
        raise module.error(f"has {size['n']} blocks, and its config says that one is shared")

    def formula(parts: Parts, view: WeightView) -> Tensor:
        skewed = skew(parts[name], side)
        if config.get("coft"):
            norm = skewed.norm(dim=(1, 2), keepdim=True)
            skewed = torch.where(norm <= most, skewed, most * skewed / norm)
        rotations = cayley_series(skewed, terms) if series else cayley(skewed)
        if embedding:  # features are what is turned: the outputs of the matrix
            return blockwise(rotations.mT, view.weight) - view.weight
        return (blockwise(rotations, view.weight.mT) - view.weight.mT).mT

    width = None if shared else size["n"] * side
    return [
        module.computed_change(
            formula,
            name,
            kind="embedding" if embedding else "linear",
            transposed=embedding,
            outputs=width if embedding else None,
            inputs=None if embedding else width,
            allows=lambda outputs, width: (outputs if embedding else width) % side == 0,
            needs_base="OFT turns the base's weight",
        )
    ]


def boft(module: Module) -> list[Change]:
    """BOFT (Liu et al. 2024, arXiv 2311.06243): the inputs rotated in blocks, and every output scaled.

    ``R [1, blocks, size, size]`` by Cayley's formula of its skew-symmetric half, ``s [out, 1]`` or ``[1, out]``. With
    more than one factor, permutations come in between, which PEFT has only where its CUDA kernel is available.
    """
    factors = module.part("boft_R").shape[:1]
    if factors != (1,):
        raise module.error(
            f"{factors[0] if factors else 'no'} butterfly factors, whose permutations are not read: only 1 is, which "
            f"PEFT makes of any number where its CUDA kernel is not compiled"
        )
    size = module.sizes(boft_R="1 n b b", boft_s="1 o" if module.part("boft_s").shape[:1] == (1,) else "o 1")

    def formula(parts: Parts, view: WeightView) -> Tensor:
        matrices = parts["boft_R"][0]
        turned = blockwise(cayley((matrices - matrices.mT) / 2), view.weight.mT).mT
        return turned * parts["boft_s"].reshape(-1, 1) - view.weight

    return [
        module.computed_change(
            formula,
            "boft_R",
            "boft_s",
            transposed=False,
            outputs=size["o"],
            inputs=size["n"] * size["b"],
            needs_base="BOFT turns the base's weight",
        )
    ]


def road(module: Module) -> list[Change]:
    """RoAD (Liao and Monz 2024, arXiv 2409.00119): pairs of outputs, rotated and scaled, and the bias with them.

    Outputs are taken in groups; the first half of a group pairs with the second. ``road_1`` has one angle and scale a
    pair, ``road_2`` one an output, ``road_4`` two an output.
    """
    size = module.sizes(road_theta="n", road_alpha="n")
    variant, group = str(module.config.get("variant", "road_1")), module.config.count("group_size", 64)
    parts_of = {"road_1": (2, 1), "road_2": (1, 1), "road_4": (1, 2)}
    if variant not in parts_of:
        raise module.error(f"variant in its config is {variant!r}, and only road_1, road_2 and road_4 are known")
    times, over = parts_of[variant]
    outputs = size["n"] * times // over
    if size["n"] * times % over or outputs % group or group % 2:
        raise module.error(f"{size['n']} angles do not make pairs in groups of {group} (group_size in its config)")

    def rotate(parts: Parts, rows: Tensor) -> Tensor:
        theta, alpha = parts["road_theta"], parts["road_alpha"]
        if variant == "road_1":
            theta, alpha = (each.reshape(-1, 1, group // 2).expand(-1, 2, -1) for each in (theta, alpha))
        theta, alpha = (each.reshape(-1, over, group) for each in (theta, alpha))
        own = (alpha[:, 0] * theta[:, 0].cos()).reshape(outputs, 1)
        other = (alpha[:, -1] * theta[:, -1].sin()).reshape(outputs, 1)
        halves = rows.reshape(-1, 2, group // 2, rows.shape[1])
        swapped = torch.stack([-halves[:, 1], halves[:, 0]], 1).reshape(rows.shape)
        return rows * own + swapped * other - rows

    def formula(parts: Parts, view: WeightView) -> Tensor:
        return rotate(parts, view.weight)

    reason = "RoAD turns the outputs of the base's weight"
    stored = {name: module.part(name) for name in ("road_theta", "road_alpha")}
    return [
        module.computed_change(formula, *stored, transposed=False, outputs=outputs, needs_base=reason),
        ComputedChange(module.bias, "bias", stored, formula, outputs=outputs, optional=True, needs_base=reason),
    ]
