"""Changes that multiply the base's weight: IA3, GLoRA, rotations, and DoRA on top of another change."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch
from merging.sources.adapter_maths import blockwise, cayley, rescale
from merging.sources.changes import Change, LoraChange
from merging.sources.computed import ComputedChange, Parts, WeightView
from merging.sources.lycoris.products import kind_of, number, scale_of
from merging.sources.peft.module import Module
from merging.sources.stored import Stored

__all__ = ["dora", "glora", "ia3", "oft"]


def ia3(module: Module, alpha: float | None) -> Change:
    """IA3 (Liu et al. 2022, arXiv 2205.05638) around 1: ``W (1 + w)``, for every output or every input."""
    if "weight" not in module.parts:
        raise module.error("has on_input, but not the weight of IA3: the file is incomplete")
    module.check("weight", "on_input", partner="on_input")
    module.check_types("weight")
    size, inputs = module.part("weight").numel, number(module, "on_input") != 0
    if size == 0:
        raise module.error("its weight of IA3 holds nothing: save or download it again")

    def formula(parts: Parts, view: WeightView) -> Tensor:
        if not inputs:
            return parts["weight"].reshape(-1, 1) * view.weight
        per_channel = view.weight.reshape(view.outputs, size, -1)
        return parts["weight"].reshape(1, -1, 1) * per_channel

    return module.computed_change(
        formula,
        "weight",
        outputs=None if inputs else size,
        allows=lambda outputs, width: not inputs or width % size == 0,
        needs_base="IA3 multiplies the base's weight",
    )


def glora(module: Module, alpha: float | None) -> Change:
    """GLoRA (Chavan et al. 2023, arXiv 2306.07967) as LyCORIS has it: ``alpha / r (W a1 a2 + b1 b2)``.

    Old files hold the two factors of each product in the reverse order.
    """
    names = ("a1", "a2", "b1", "b2")
    shapes = {name: module.part(name).shape for name in names}
    module.check(*names, partner="a1")
    module.check_types(*names)
    if not all(len(shape) >= 2 for shape in shapes.values()):
        raise module.error("a1, a2, b1 and b2 should be matrices")
    (a, b, c, d) = names
    if not shapes[a][1] == shapes[b][0] == shapes[c][1] == shapes[d][0]:
        (a, b, c, d) = ("a2", "a1", "b2", "b1")
    rank, outputs, inputs = shapes[b][0], shapes[c][0], shapes[b][1]
    kernel = shapes[d][2:]
    fitting = shapes[a][:2] == (inputs, rank) and shapes[c][1] == rank == shapes[d][0] and shapes[d][1] == inputs
    if not fitting or 0 in (rank, outputs, inputs) or any(size != 1 for name in (a, b, c) for size in shapes[name][2:]):
        raise module.error(f"a1, a2, b1 and b2 have shapes that do not multiply: {list(shapes.values())}")
    scale = scale_of(alpha, rank)

    def formula(parts: Parts, view: WeightView) -> Tensor:
        turn = parts[a].flatten(1) @ parts[b].flatten(1)
        turned = torch.einsum("oi...,ij->oj...", view.weight.reshape(view.outputs, inputs, -1), turn)
        return (turned.flatten(1) + parts[c].flatten(1) @ parts[d].flatten(1)) * scale

    return module.computed_change(
        formula,
        *names,
        kind=kind_of(kernel),
        outputs=outputs,
        inputs=inputs,
        kernel=kernel or None,
        trained=0 if kernel else 2 * rank,
        scale=scale,
        needs_base="GLoRA multiplies the base's weight",
    )


def oft(module: Module, alpha: float | None) -> Change:
    """Diag-OFT (Qiu et al. 2023, arXiv 2306.07280) and, with four axes, BOFT (Liu et al. 2023, arXiv 2311.06243).

    The outputs are rotated block by block by ``(I + Q) (I - Q)^-1`` with ``Q = blocks - blocks^T``, and then scaled by
    ``rescale``. If alpha is above 0, the norm of ``Q`` is limited to alpha times the number of outputs.
    """
    blocks = module.part("oft_blocks")
    butterfly = len(blocks.shape) == 4
    layout = {"oft_blocks": "m n b b" if butterfly else "n b b"}
    if "rescale" in module.parts:
        layout["rescale"] = "o" + " 1" * (len(module.part("rescale").shape) - 1)
    size = module.sizes(**layout)
    outputs = size["n"] * size["b"]
    if size.get("o", outputs) != outputs or (butterfly and not _divides(size["m"], size["b"], outputs)):
        raise module.error(f"rescale or blocks do not fit {outputs} outputs: its parts do not belong together")
    bound = (alpha or 0.0) * outputs

    def formula(parts: Parts, view: WeightView) -> Tensor:
        skewed = parts["oft_blocks"] - parts["oft_blocks"].mT
        norm = float(skewed.norm())
        skewed = skewed * (bound / norm) if 0 < bound < norm else skewed
        turned = _butterfly(cayley(-skewed), view.weight) if butterfly else blockwise(cayley(skewed), view.weight)
        if "rescale" in parts:
            turned = turned * parts["rescale"].reshape(-1, 1)
        return turned - view.weight

    return module.computed_change(formula, *layout, outputs=outputs, needs_base="OFT rotates the base's weight")


def _divides(stages: int, block: int, outputs: int) -> bool:
    """Whether a butterfly with this number of stages and this block size fits the outputs."""
    return block % 2 == 0 and stages < 64 and outputs % (2 ** (stages - 1) * block) == 0


def _butterfly(rotations: Tensor, matrix: Tensor) -> Tensor:
    """Apply stages of rotations ``[m, n, b, b]``: each mixes rows of two groups, twice as far apart as before."""
    half, width = rotations.shape[-1] // 2, matrix.shape[1]
    for stage, blocks in enumerate(rotations):
        far = 2**stage * half
        matrix = matrix.reshape(-1, 2, far, width).transpose(1, 2).reshape(-1, width)
        matrix = blockwise(blocks, matrix)
        matrix = matrix.reshape(-1, far, 2, width).transpose(1, 2).reshape(-1, width)
    return matrix


def dora(module: Module, change: Change, magnitude: Stored) -> Change:
    """DoRA (Liu et al. 2024, arXiv 2402.09353) on top of another change: the result has the lengths ``dora_scale``.

    The lengths belong to W plus its change, as LyCORIS trains them: to the outputs, or in older files (``dora_scale``
    is ``[1, in]``) to the inputs. ComfyUI uses the lengths of W alone, with other results.
    """
    if not isinstance(change, (LoraChange, ComputedChange)):
        raise module.error("has a dora_scale, which belongs to factors")
    if not magnitude.floating or not magnitude.shape or not magnitude.numel:
        raise module.error(
            f"its dora_scale should be a vector of lengths, and is {magnitude.dtype_name} {magnitude.shape}"
        )
    on_inputs = len(magnitude.shape) > 1 and magnitude.shape[0] == 1 != magnitude.shape[1]
    inner = _as_formula(module, change)

    def formula(parts: Parts, view: WeightView) -> Tensor:
        made = inner.formula(parts, view)
        delta = made[0] @ made[1] if isinstance(made, tuple) else made
        total = view.weight + delta.reshape(view.weight.shape)
        lengths = parts["dora_scale"].reshape(-1)
        if not on_inputs:
            return rescale(total, lengths, (1,)) - view.weight
        cube = total.reshape(view.outputs, len(lengths), -1)
        return rescale(cube, lengths, (0, 2)).reshape(total.shape) - view.weight

    reason = "DoRA gives every output of the base's weight a new length"
    return ComputedChange(
        target=inner.target,
        kind=inner.kind,
        parts={**inner.parts, "dora_scale": magnitude},
        formula=formula,
        outputs=inner.outputs,
        inputs=inner.inputs,
        kernel=inner.kernel,
        allows=lambda outputs, width: width % magnitude.numel == 0 if on_inputs else outputs == magnitude.numel,
        trained=0,
        scale=inner.scale,
        needs_base=reason,
    )


def _as_formula(module: Module, change: LoraChange | ComputedChange) -> ComputedChange:
    if isinstance(change, ComputedChange):
        return change
    scale = change.scale

    def formula(parts: Parts, view: WeightView) -> tuple[Tensor, Tensor]:
        return parts["lora_up"].flatten(1) * scale, parts["lora_down"].flatten(1)

    outputs, inputs, *kernel = change.shape
    facts = {"outputs": outputs, "inputs": inputs, "kernel": tuple(kernel) or None, "scale": scale}
    return module.computed_change(formula, "lora_down", "lora_up", kind=change.kind, **facts)
