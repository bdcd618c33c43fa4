"""The types of mixtures that dense models can become: their tensors' names on disk, as the Hub has them, and configs.

Every expert has names of its own (``experts.3.w1``): programs stack them when they load them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from merging.errors import InputError, OptionError
from merging.moe.recipe import ARCHITECTURES as SPELLINGS
from merging.moe.recipe import MoeRecipe, spelled_out
from merging.moe.source import MoeSource

__all__ = ["MOE_ARCHITECTURES", "PARTS", "MoeArchitecture", "select_architecture"]

PARTS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense model's MLP."""

_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_IN_LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
)
_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.(.+)")
_ROTARY = "self_attn.rotary_emb.inv_freq"
"""A buffer that old checkpoints hold and no program reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeArchitecture:
    """A type of mixture.

    Attributes:
        model_type: its name in config.json.
        class_name: its class in ``architectures``.
        title: its name for people.
        dense: the types of dense models that it is made of.
        block: the name of its MLP in a layer.
        parts: the names of an expert's matrices, in the order of :data:`PARTS`.
        extras: further tensors that a layer may have.
        shared: the name of the shared expert; None if there cannot be one.
        shared_gate: whether a gate weighs the shared expert, which then needs prompts, and must be there.
    """

    model_type: str
    class_name: str
    title: str
    dense: tuple[str, ...]
    block: str = "mlp"
    parts: tuple[str, ...] = PARTS
    extras: tuple[str, ...] = ()
    shared: str | None = None
    shared_gate: bool = False

    def expert(self, layer: int, expert: int, part: int) -> str:
        """Return the name of a matrix of an expert."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.parts[part]}.weight"

    def router(self, layer: int) -> str:
        """Return the name of a layer's router."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def shared_expert(self, layer: int, part: int) -> str:
        """Return the name of a matrix of the shared expert."""
        return f"model.layers.{layer}.{self.block}.{self.shared}.{self.parts[part]}.weight"

    def shared_router(self, layer: int) -> str:
        """Return the name of the gate of the shared expert."""
        return f"model.layers.{layer}.{self.block}.shared_expert_gate.weight"

    def refusal(self, recipe: MoeRecipe, base_type: str) -> str:
        """Return the reason why a recipe cannot be made into this type, "" if it can."""
        if base_type not in self.dense:
            return f"is made of {' or '.join(self.dense)} models"
        shared = recipe.shared_experts[0] if recipe.shared_experts else None
        if shared is None:
            return "has a shared expert that every token reaches: add shared_experts" if self.shared_gate else ""
        if self.shared is None:
            return "has no shared experts"
        if self.shared_gate and recipe.prompted and not shared.positive_prompts:
            return "weighs its shared expert by a gate: give the shared expert positive_prompts"
        if not self.shared_gate and (shared.positive_prompts or shared.negative_prompts):
            return "has no gate before its shared expert: leave the prompts of the shared expert out"
        return ""

    def list_copied(self, source: MoeSource) -> list[str]:
        """Return the names of the base's tensors that the mixture keeps: all but the MLPs.

        Raises :class:`~merging.errors.InputError` for a tensor that this type has no place for.
        """
        kept = []
        for name in source.checkpoint.tensors:
            found = _LAYER.fullmatch(name)
            inner = found[2] if found else ""
            if inner == _ROTARY or (inner.startswith("mlp.") and inner[4:].removesuffix(".weight") in PARTS):
                continue
            if not (name in _OUTSIDE or inner in _IN_LAYER or inner in self.extras):
                raise InputError(
                    f"{source.name}: {name} has no place in a {self.title} mixture: give a base without it, or another "
                    f"architecture"
                )
            kept.append(name)
        return kept


_QKV_BIAS = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")

MOE_ARCHITECTURES = (
    MoeArchitecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        title="Mixtral",
        dense=("llama", "mistral"),
        block="block_sparse_moe",
        parts=("w1", "w3", "w2"),
    ),
    MoeArchitecture(
        model_type="deepseek",
        class_name="DeepseekForCausalLM",
        title="DeepSeek-MoE",
        dense=("llama", "mistral"),
        shared="shared_experts",
    ),
    MoeArchitecture(
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        title="Qwen2-MoE",
        dense=("llama", "mistral", "qwen2"),
        extras=_QKV_BIAS,
        shared="shared_expert",
        shared_gate=True,
    ),
    MoeArchitecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        title="Qwen3-MoE",
        dense=("qwen3",),
        extras=(
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            *_QKV_BIAS,
            "self_attn.o_proj.bias",
        ),
    ),
)
"""All types, in the order in which they are tried."""


def select_architecture(recipe: MoeRecipe, base: MoeSource) -> MoeArchitecture:
    """Return the type that a recipe names, or the first one that fits its base and its shared expert.

    Raises:
        InputError: for a base that no type is made of.
        OptionError: for a type that does not fit.
    """
    kind = str(base.checkpoint.config.get("model_type"))
    named = SPELLINGS[spelled_out(recipe.architecture)] if recipe.architecture else ()
    possible = [each for each in MOE_ARCHITECTURES if not named or each.model_type in named]
    fitting = [each for each in possible if kind in each.dense]
    known = sorted({each for one in MOE_ARCHITECTURES for each in one.dense})
    if kind not in known:
        raise InputError(
            f"{base.name}: is a model of type {kind}: mixtures are made of {', '.join(known)} models (and by "
            f"gate_mode: smile of any model with linear layers)"
        )
    reasons = [(each, each.refusal(recipe, kind)) for each in fitting or possible]
    for each, reason in reasons:
        if not reason:
            return each
    raise OptionError(
        f"{base.name}: this recipe makes no mixture: " + "; ".join(f"{each.title} {reason}" for each, reason in reasons)
    )
