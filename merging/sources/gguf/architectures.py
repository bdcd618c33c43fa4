"""The architectures of GGUF files that are read: names of their tensors, and the layout that llama.cpp gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ARCHITECTURES", "DIFFUSION", "Architecture", "architecture_of_config"]

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TIED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
"""The modules outside of the blocks of models whose head is always their embedding."""

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_BLOCK = _ATTENTION | _MLP | _NORMS
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}

_NUMBERED = re.compile(r"blk\.([0-9]{1,5})\.(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp, and its model in transformers.

    Attributes:
        model_type: The type of model in config.json.
        model_class: The class of transformers.
        block: The names of the modules in a block: of transformers, by llama.cpp's.
        outer: The names of the other modules.
        prefix: The beginning of a block's names in transformers.
        experts: The names of single experts, by the names of their stacks.
        fields: The fields of config.json by the keys of the metadata, beyond the usual fields.
        constants: Further fields of config.json.
        permuted: Whether the rows of queries and keys are in llama.cpp's own order.
        shifted: Whether 1 was added to the weights of norms.
        transposed: The modules that transformers stores transposed.
    """

    model_type: str
    model_class: str
    block: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    prefix: str = "model.layers."
    experts: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=lambda: _RMS)
    constants: Mapping[str, object] = field(default_factory=dict)
    permuted: bool = False
    shifted: bool = False
    transposed: tuple[str, ...] = ()

    def is_shifted(self, name: str) -> bool:
        """Return whether 1 was added to a tensor, by its name in transformers."""
        return self.shifted and name.endswith("norm.weight")

    def name_in_transformers(self, name: str) -> tuple[str, str] | None:
        """Return the name in transformers of a tensor in a GGUF file, and its module in llama.cpp; None if unknown.

        The name of a stack of experts has ``{}`` for the number of an expert.
        """
        module, _, leaf = name.rpartition(".")
        if numbered := _NUMBERED.fullmatch(module):
            known = self.block.get(numbered[2]) or self.experts.get(numbered[2])
            return (f"{self.prefix}{int(numbered[1])}.{known}.{leaf}", numbered[2]) if known else None
        known = self.outer.get(module)
        return (f"{known}.{leaf}", module) if known else None

    def name_in_gguf(self, name: str) -> tuple[str, str] | None:
        """Return the name in a GGUF file of a tensor of transformers, and its module there; None if unknown."""
        module, _, leaf = name.rpartition(".")
        for ours, theirs in self.outer.items():
            if theirs == module:
                return f"{ours}.{leaf}", ours
        number, _, inner = module.removeprefix(self.prefix).partition(".")
        if not module.startswith(self.prefix) or not number.isdigit():
            return None
        found = next((ours for ours, theirs in self.block.items() if theirs == inner), None)
        return (f"blk.{number}.{found}.{leaf}", found) if found else None

    def expert_in_gguf(self, name: str) -> tuple[str, str, int] | None:
        """Return the stack in a GGUF file of an expert's weight, its module there, and the number of the expert."""
        number, _, inner = name.removeprefix(self.prefix).partition(".")
        for module, known in self.experts.items():
            before, after = known.split("{}")
            expert = inner.removeprefix(before).removesuffix(f"{after}.weight")
            if inner == f"{before}{expert}{after}.weight" and expert.isdigit() and number.isdigit():
                return f"blk.{number}.{module}.weight", module, int(expert)
        return None


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(model_type="llama", model_class="LlamaForCausalLM", block=_BLOCK, permuted=True),
    "mixtral": Architecture(
        model_type="mixtral",
        model_class="MixtralForCausalLM",
        block=_ATTENTION | _NORMS | {"ffn_gate_inp": "block_sparse_moe.gate"},
        experts={
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        },
        fields=_RMS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        permuted=True,
    ),
    "granite": Architecture(
        model_type="granite",
        model_class="GraniteForCausalLM",
        block=_BLOCK,
        fields=_RMS
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        permuted=True,
    ),
    "qwen2": Architecture(model_type="qwen2", model_class="Qwen2ForCausalLM", block=_BLOCK),
    "qwen3": Architecture(model_type="qwen3", model_class="Qwen3ForCausalLM", block=_BLOCK | _HEAD_NORMS),
    "qwen2moe": Architecture(
        model_type="qwen2_moe",
        model_class="Qwen2MoeForCausalLM",
        block=_ATTENTION | _NORMS | _SHARED | {"ffn_gate_inp": "mlp.gate"},
        experts=_EXPERTS,
        fields=_RMS | _MOE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        model_class="Qwen3MoeForCausalLM",
        block=_ATTENTION | _NORMS | _HEAD_NORMS | {"ffn_gate_inp": "mlp.gate"},
        experts=_EXPERTS,
        fields=_RMS | _MOE,
        constants={"norm_topk_prob": True},
    ),
    "gemma": Architecture(model_type="gemma", model_class="GemmaForCausalLM", block=_BLOCK, outer=_TIED, shifted=True),
    "gemma2": Architecture(
        model_type="gemma2",
        model_class="Gemma2ForCausalLM",
        block=_ATTENTION | _MLP | _FOUR_NORMS,
        outer=_TIED,
        fields=_RMS
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        shifted=True,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        block=_ATTENTION | _MLP | _FOUR_NORMS | _HEAD_NORMS,
        fields=_RMS
        | {
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        shifted=True,
    ),
    "phi3": Architecture(
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        block=_NORMS
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        fields=_RMS | {"attention.sliding_window": "sliding_window"},
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        model_class="GPT2LMHeadModel",
        block=_GPT2,
        outer=_GPT2_OUTER,
        prefix="transformer.h.",
        fields={
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "starcoder2": Architecture(
        model_type="starcoder2",
        model_class="Starcoder2ForCausalLM",
        block=_ATTENTION | _NORMS | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        fields={"attention.layer_norm_epsilon": "norm_epsilon"},
    ),
    "command-r": Architecture(
        model_type="cohere",
        model_class="CohereForCausalLM",
        block=_ATTENTION | _MLP | _HEAD_NORMS | {"attn_norm": "input_layernorm"},
        outer=_TIED,
        fields={"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
    ),
    "nemotron": Architecture(
        model_type="nemotron",
        model_class="NemotronForCausalLM",
        block=_ATTENTION | _NORMS | {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        fields={"attention.layer_norm_epsilon": "norm_eps"},
        shifted=True,
    ),
    "olmo2": Architecture(
        model_type="olmo2",
        model_class="Olmo2ForCausalLM",
        block=_ATTENTION
        | _MLP
        | _HEAD_NORMS
        | {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    ),
}
"""By the name of the architecture in the metadata; ``mixtral`` is a ``llama`` with experts."""

DIFFUSION = frozenset(
    {
        "flux", "sd1", "sd3", "sdxl", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image",
        "chroma", "z_image",
    }
)  # fmt: skip
"""Architectures of ComfyUI-GGUF, whose files keep the published names and layouts."""


def architecture_of_config(model_type: str | None) -> tuple[str, Architecture] | None:
    """Return llama.cpp's name of the architecture of a model in transformers, and the architecture; None if unknown."""
    if model_type == "mistral":
        model_type = "llama"
    found = ((name, each) for name, each in ARCHITECTURES.items() if each.model_type == model_type)
    name, each = next(found, (None, None))
    return None if name is None or each is None else ("llama" if name == "mixtral" else name, each)
