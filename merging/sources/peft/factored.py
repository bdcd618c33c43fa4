"""PEFT's types whose change is a product of two thin factors, however they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.changes import Change
from merging.sources.computed import ComputedChange, Formula, Parts, WeightView
from merging.sources.peft.module import Module

__all__ = ["adalora", "delora", "gralora", "hra", "miss", "vblora", "vera"]

Factors = tuple[Tensor, Tensor]


def adalora(module: Module) -> list[Change]:
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): ``alpha / (r + 1e-5) B (E * A)``, pruned module by module.

    ``r`` is the rank before pruning, which PEFT keeps in the scale. ``A`` is ``[r, in]``, ``B [out, r]``, ``E [r, 1]``.
    """
    size = module.sizes(lora_A="R i", lora_B="o R", lora_E="R 1")
    size["r"] = size["R"]
    alpha, rank = module.config.number("lora_alpha", 8), module.config.count("init_r", 12)
    if size["r"] != rank and not module.config.get("rank_pattern"):
        raise module.error(f"has rank {size['r']}, and init_r in its config is {rank}: they do not belong together")
    scale = (alpha if alpha > 0 else size["r"]) / (rank + 1e-5)

    def formula(parts: Parts, view: WeightView) -> Factors:
        return parts["lora_B"] * scale, parts["lora_A"] * parts["lora_E"]

    return [_low_rank(module, formula, "lora_A", "lora_B", "lora_E", size=size, scale=scale, flat=True)]


def _low_rank(
    module: Module, formula: Formula, *names: str, size: Mapping[str, int | None], **facts: Any
) -> ComputedChange:
    """Return a change kept as factors, of the outputs ``o``, inputs ``i`` and rank ``r`` among the sizes."""
    known = {"outputs": size.get("o"), "inputs": size.get("i"), "trained": size["r"]}
    return module.computed_change(formula, *names, **{"factored": True, **known, **facts})


def vera(module: Module) -> list[Change]:
    """VeRA (Kopiczko et al. 2024, arXiv 2310.11454): ``(b * B)(d * A)`` of projections that all modules share.

    ``A [r, widest]`` and ``B [tallest, r]`` are cut to the module's size.
    """
    for name in ("vera_A", "vera_B"):
        if name not in module.shared:
            raise module.config.error(
                "the random projections were not saved, and only the program that drew them knows them: save it again "
                "with save_projection=True"
            )
    size = module.sizes(vera_lambda_b="o", vera_lambda_d="r", vera_A="r w", vera_B="t r")

    def formula(parts: Parts, view: WeightView) -> Factors:
        up = parts["vera_lambda_b"][:, None] * parts["vera_B"][: view.outputs]
        return up, parts["vera_lambda_d"][:, None] * parts["vera_A"][:, : view.width]

    names = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")
    return [
        _low_rank(
            module,
            formula,
            *names,
            size=size,
            allows=lambda outputs, width: outputs <= size["t"] and width <= size["w"],
            needs_base="VeRA does not say how many inputs the module has",
        )
    ]


def vblora(module: Module) -> list[Change]:
    """VB-LoRA (Li et al. 2024, arXiv 2405.15179): factors of vectors from a bank, mixed by the best ``topk`` logits.

    The logits are ``[r, in / length, vectors]`` for ``A`` and ``[out / length, r, vectors]`` for ``B``, the bank is
    ``[vectors, length]``. If only the best were saved, the file has their positions, and all but the last of their
    weights.
    """
    short = "vblora_logits_A_topk_indices" in module.parts
    if short:
        layout = {
            "vblora_logits_A_topk_indices": "int r i k",
            "vblora_logits_A_topk_weights": "r i M",
            "vblora_logits_B_topk_indices": "int o r k",
            "vblora_logits_B_topk_weights": "o r M",
        }
    else:
        layout = {"vblora_logits_A": "r i n", "vblora_logits_B": "o r n"}
    layout["vblora_vector_bank"] = "n l"
    size = module.sizes(**layout)
    topk = module.config.count("topk", 2)
    if topk != size.get("k", topk) or size.get("M", topk - 1) != topk - 1 or topk > size["n"]:
        raise module.error(
            f"topk is {topk} in its config, and its tensors have other sizes: they do not belong together"
        )

    def mix(parts: Parts, side: str) -> Tensor:
        bank = parts["vblora_vector_bank"]
        if not short:
            values, places = parts[f"vblora_logits_{side}"].topk(topk, dim=-1)
            weights = values.softmax(-1)
        else:
            places, most = (
                parts[f"vblora_logits_{side}_topk_indices"].long(),
                parts[f"vblora_logits_{side}_topk_weights"],
            )
            if not bool(((places >= 0) & (places < len(bank))).all()):
                raise module.error("points at vectors that its bank does not have")
            weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], dim=-1)
        return (weights[..., None] * bank[places]).sum(-2)

    def formula(parts: Parts, view: WeightView) -> Factors:
        down = mix(parts, "A").reshape(size["r"], -1)
        return mix(parts, "B").transpose(1, 2).reshape(-1, size["r"]), down

    whole = {"o": size["o"] * size["l"], "i": size["i"] * size["l"], "r": size["r"]}
    return [_low_rank(module, formula, *layout, size=whole)]


def delora(module: Module) -> list[Change]:
    """DeLoRA (Bini et al. 2025, arXiv 2503.18225): ``lambda / r B A`` of normed rows and columns, times ``w_norm``."""
    names = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    size = module.sizes(delora_A="r i", delora_B="o r", delora_lambda="1", delora_w_norm="i")

    def formula(parts: Parts, view: WeightView) -> Factors:
        down, up = parts["delora_A"], parts["delora_B"]
        lengths = down.norm(dim=1).clamp(min=1e-4) * up.norm(dim=0).clamp(min=1e-4)
        return up * (parts["delora_lambda"] / size["r"] / lengths), down * parts["delora_w_norm"]

    return [_low_rank(module, formula, *names, size=size)]


def miss(module: Module) -> list[Change]:
    """MiSS (Kang et al. 2024, arXiv 2409.15371; Bone before): one block ``[r, out]``, added to every ``r`` inputs.

    ``mini``: the block is repeated along the outputs. ``bat``: blocks ``M [out / r, r, r]``, and every block of the
    weight ``W_ij`` becomes ``W_ij + W_ij M_i + M_i``.
    """
    (name,) = (each for each in ("miss_block", "bone_block") if each in module.parts)
    way = module.config.get("init_weights", True)
    if way == "bat":
        return [_bat(module, name)]
    size = module.sizes(**{name: "r o"})
    rank, mini = size["r"], way == "mini"

    def formula(parts: Parts, view: WeightView) -> Factors:
        block = parts[name]
        rows = torch.arange(view.width).remainder(rank)
        down = torch.nn.functional.one_hot(rows, rank).T.to(block.dtype)
        return block.T.repeat(view.outputs // size["o"], 1), down

    facts: dict[str, int | None] = {"o": None if mini else size["o"], "r": rank}
    return [
        _low_rank(
            module,
            formula,
            name,
            size=facts,
            allows=lambda outputs, width: rank <= width and outputs % size["o"] == 0,
            needs_base="MiSS does not say how many inputs the module has",
        )
    ]


def _bat(module: Module, name: str) -> ComputedChange:
    size = module.sizes(**{name: "n r r"})

    def formula(parts: Parts, view: WeightView) -> Tensor:
        blocks, rank = parts[name], size["r"]
        weight = view.weight.reshape(size["n"], rank, -1, rank).transpose(1, 2)
        return (weight @ blocks[:, None] + blocks[:, None]).transpose(1, 2)

    return module.computed_change(
        formula,
        name,
        outputs=size["n"] * size["r"],
        allows=lambda outputs, width: width % size["r"] == 0,
        needs_base="MiSS (bat) multiplies the base's weight",
    )


def hra(module: Module) -> list[Change]:
    """HRA (Yuan et al. 2024, arXiv 2405.17484): the weight, reflected at ``r`` hyperplanes of normals ``u [in, r]``.

    A product of reflections ``I - 2 u u^T`` is ``I - L U^T``, so that the change ``-(W L) U^T`` has rank ``r``.
    """
    size = module.sizes(hra_u="i r")
    orthogonal = bool(module.config.get("apply_GS"))

    def formula(parts: Parts, view: WeightView) -> Factors:
        normals = _orthogonal(parts["hra_u"]) if orthogonal else parts["hra_u"] / parts["hra_u"].norm(dim=0)
        left: list[Tensor] = []
        for index, normal in enumerate(normals.T):
            turned = normal
            if left:
                turned = normal - torch.stack(left, 1) @ (normals[:, :index].T @ normal)
            left.append(2 * turned)
        return -(view.weight @ torch.stack(left, 1)), normals.T

    return [
        _low_rank(module, formula, "hra_u", size=size, needs_base="HRA reflects the base's weight", transposed=False)
    ]


def _orthogonal(columns: Tensor) -> Tensor:
    """Return the columns, orthogonalised and normalised (Gram-Schmidt as in PEFT)."""
    done: list[Tensor] = []
    for column in columns.T:
        rest = column
        for each in done:
            rest = rest - (each @ rest) * each
        done.append(rest / rest.norm())
    return torch.stack(done, 1)


def gralora(module: Module) -> list[Change]:
    """GraLoRA (Jung et al. 2025, arXiv 2505.20355): ``k x k`` blocks of rank ``r / k`` each, and a LoRA across them.

    ``A`` is ``[k, in / k, r]`` and ``B [k, r, out / k]``; block (g, n) of the change is ``B_g[n] A_n[g]``, where
    ``[.]`` are groups of ``r / k``. As factors they have rank ``k r``.
    """
    general = "gralora_A_general" in module.parts
    across = {"gralora_A_general": "h y", "gralora_B_general": "x h"} if general else {}
    layout = {"gralora_A": "k i r", "gralora_B": "k r o", **across}
    size = module.sizes(**layout)
    groups, rank, hybrid = size["k"], size["r"], size.get("h", 0)
    outputs, inputs = groups * size["o"], groups * size["i"]
    stated = module.config.count("gralora_k", 2)
    if stated != groups or rank % groups or (general and (size["x"], size["y"]) != (outputs, inputs)):
        raise module.error(
            f"has {groups} groups of rank {rank}, which do not belong to its config or its other factors"
        )
    scale = module.config.number("alpha", 64) / (rank + hybrid)

    def formula(parts: Parts, view: WeightView) -> Factors:
        each = rank // groups
        up = parts["gralora_A"].new_zeros(groups, size["o"], groups, groups, each)
        down = parts["gralora_A"].new_zeros(groups, groups, each, groups, size["i"])
        for group in range(groups):
            # up's rows of a group use the ranks (group, ., .), down's inputs of a block the ranks (., block, .)
            up[group, :, group] = parts["gralora_B"][group].T.reshape(size["o"], groups, each)
            down[:, group, :, group] = parts["gralora_A"][group].T.reshape(groups, each, size["i"])
        up, down = up.reshape(outputs, -1), down.reshape(-1, inputs)
        if general:
            up = torch.cat([up, parts["gralora_B_general"]], 1)
            down = torch.cat([down, parts["gralora_A_general"]], 0)
        return up * scale, down

    whole = {"o": outputs, "i": inputs, "r": groups * rank + hybrid}
    return [_low_rank(module, formula, *layout, size=whole, scale=scale)]
