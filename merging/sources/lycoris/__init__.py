"""Changes of one module of a Kohya, LyCORIS or ComfyUI file: LoRA, LoCon, LoHa, LoKr and the other types of LyCORIS.

The formulas are LyCORIS's (Yeh et al. 2024, arXiv 2309.14859). They may differ from PEFT's methods of the same name: in
the kernels of LoKr, the side on which OFT rotates, the scale of IA3.

A new type is a function from a module and its alpha to a change, and an entry in ``LYCORIS_TYPES``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from merging.errors import option
from merging.sources.changes import AddedBias, Change, LoraChange
from merging.sources.lycoris.multiplicative import dora, glora, ia3, oft
from merging.sources.lycoris.products import full, loha, lokr, lora, norm, number, replacement
from merging.sources.peft.config import Config
from merging.sources.peft.module import Module
from merging.sources.stored import Stored

__all__ = ["LYCORIS_TYPES", "LycorisType", "is_factor", "leaf_of", "module_changes", "zero_alphas"]

_LEAF = re.compile(
    r"\.(?:(lora_down|lora_up|lora_mid|lora_A|lora_B|a1|a2|b1|b2)(?:\.default)?\.weight"
    r"|(lora_B\.bias|lora_magnitude_vector|dora_scale|alpha|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?"
    r"|(?:modulation\.)?diff|diff_[bm]|set_weight|w_norm|b_norm|on_input|oft_blocks|rescale)(?:\.weight)?)$"
)
_SAME = {
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "lora_B.bias": "lora_up.bias",
    "lora_magnitude_vector": "dora_scale",
    "modulation.diff": "diff_m",
}
_BESIDE = {"diff_b": "bias", "b_norm": "bias", "lora_up.bias": "bias", "diff_m": "modulation"}
"""Parts that change another tensor of the module than its weight, and the tensor's name."""

_SCALED = ("lora_down", "hada_w1_a", "lokr_w1_a", "lokr_w2_a")
"""Parts that have a rank, by which alpha is divided."""

_WEAK = {"alpha", "rescale", "a1", "a2", "b1", "b2", "diff", "diff_b", "diff_m", "w_norm", "b_norm"}
"""Parts whose names an ordinary model's parameters may also have."""


def leaf_of(name: str) -> tuple[str, str] | None:
    """Return the module of a tensor, and which of the module's parts it is; None for any other name.

    IA3's part ``weight`` is not recognised alone: only the ``on_input`` next to it identifies it.
    """
    found = _LEAF.search(name)
    if found is None:
        return None
    leaf = found[1] or found[2]
    return name[: found.start()], _SAME.get(leaf, leaf)


def is_factor(name: str) -> bool:
    """Whether a tensor's name alone proves that it is a part of an adapter."""
    found = leaf_of(name)
    return found is not None and found[1] not in _WEAK


@dataclass(frozen=True, slots=True)
class LycorisType:
    """A type of change: its name, and the function from a module and its stated alpha (or None) to the change."""

    summary: str
    change: Callable[[Module, float | None], Change]


LYCORIS_TYPES = {
    "lora_down": LycorisType("LoRA, LoCon, DyLoRA, LoRA-FA", lora),
    "hada_w1_a": LycorisType("LoHa", loha),
    "lokr_w1": LycorisType("LoKr", lokr),
    "lokr_w1_a": LycorisType("LoKr", lokr),
    "a1": LycorisType("GLoRA", glora),
    "oft_blocks": LycorisType("Diag-OFT, BOFT", oft),
    "on_input": LycorisType("IA3", ia3),
    "diff": LycorisType("changes trained in full", full),
    "w_norm": LycorisType("norms", norm),
    "set_weight": LycorisType("weights saved in full", replacement),
}
"""The types, by the part that identifies each."""


def zero_alphas(tensors: Mapping[str, Stored], where: str) -> tuple[str, ...]:
    """Return a notice if alphas next to factors are 0, which programs read in two ways."""
    leaves = filter(None, map(leaf_of, tensors))
    modules = dict.fromkeys(module for module, leaf in leaves if leaf in _SCALED and f"{module}.alpha" in tensors)
    parts = {module: {"alpha": tensors[f"{module}.alpha"]} for module in modules}
    zero = [module for module, part in parts.items() if number(Module(module, part, Config({}, where)), "alpha") == 0]
    if not zero:
        return ()
    return (
        f"{where}: the alpha of {len(zero)} of its modules is 0 ({zero[0]}): it is read as the rank, a scale of 1, as "
        f"in sd-scripts and LyCORIS; ComfyUI multiplies by 0: give the right one with {option('lora_alpha')}",
    )


def module_changes(path: str, parts: Mapping[str, Stored], where: str, alpha: float | None = None) -> list[Change]:
    """Return the changes of a module: of its weight, its bias, and its modulation (``diff_m``).

    ``alpha`` replaces the stated one. Without either, or if it is 0, alpha is the rank. Raises
    :class:`~merging.errors.FormatError` for parts that do not belong together.
    """
    config = Config({}, where)
    if alpha is None and "alpha" in parts:
        alpha = number(Module(path, parts, config), "alpha")
    own = {name: part for name, part in parts.items() if name not in (*_BESIDE, "alpha", "dora_scale")}
    module = Module(path, own, config)
    method = next((method for marker, method in LYCORIS_TYPES.items() if marker in own), None)
    changes: list[Change] = []
    if method is not None:
        changes.append(method.change(module, alpha))
        if "dora_scale" in parts:
            changes = [dora(module, changes[0], parts["dora_scale"])]
    elif own or not any(name in parts for name in _BESIDE):
        odd = next(iter(own or parts))
        raise module.error(f"has {odd}, and nothing that it goes with: the file is incomplete, or of a kind not known")
    scale = next((change.scale for change in changes if isinstance(change, LoraChange)), 1.0)
    for name, changed in _BESIDE.items():
        if name in parts:
            factor = scale if name == "lora_up.bias" else 1.0
            changes.append(AddedBias(f"{path}.{changed}", "bias", parts[name], factor))
    return changes
