"""The config.json of a mixture, from the dense base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.errors import InputError
from merging.moe.architectures import MoeArchitecture
from merging.moe.recipe import MoeRecipe
from merging.moe.source import MoeSource
from merging.sources.checkpoint import config_layers

__all__ = ["moe_config"]

_STATED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Fields in whose defaults types of models differ, so that each must be stated."""

_LEFT_OUT = ("_name_or_path", "auto_map", "transformers_version")

_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base--"
"""The repository of the code that transformers runs such a model with."""


def moe_config(recipe: MoeRecipe, architecture: MoeArchitecture, base: MoeSource) -> dict[str, Any]:
    """Return the config of a mixture.

    Raises :class:`~merging.errors.InputError` for a base with settings that the mixture's type does not have.
    """
    config = {key: value for key, value in base.checkpoint.config.items() if key not in _LEFT_OUT}
    config |= _defaults(config)
    layers = config_layers(config) or 0
    sliding = _sliding_layers(config, layers)
    _check_sliding(architecture, base, sliding, layers)
    experts = {"num_experts": len(recipe.experts), "moe_intermediate_size": config["intermediate_size"]}
    routing = {"num_experts_per_tok": recipe.experts_per_token, "norm_topk_prob": True}
    losses = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
    config |= {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    if architecture.model_type == "mixtral":
        config |= {"num_local_experts": len(recipe.experts), "num_experts_per_tok": recipe.experts_per_token, **losses}
        config["sliding_window"] = config.get("sliding_window")
    elif architecture.model_type == "deepseek":
        config |= _deepseek(recipe, config)
    else:
        config |= {**experts, **routing, **losses, "decoder_sparse_step": 1, "mlp_only_layers": []}
        config["use_sliding_window"] = bool(sliding)
        config["sliding_window"] = config.get("sliding_window") if sliding else None
    if architecture.model_type == "qwen2_moe":
        config["shared_expert_intermediate_size"] = config["intermediate_size"]
        config["qkv_bias"] = any(name.endswith("q_proj.bias") for name in base.checkpoint.tensors)
        config["layer_types"] = ["sliding_attention" if i in sliding else "full_attention" for i in range(layers)]
    else:
        config.pop("layer_types", None)
    if recipe.dtype:
        config |= {key: recipe.dtype for key in ("dtype", "torch_dtype") if key in config or key == "dtype"}
    return config


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a dense config leaves to its type's defaults, and that the mixture's type must state."""
    missing = [key for key in _STATED if key not in config]
    rope = not ({"rope_theta", "rope_parameters"} & config.keys())
    if not missing and not rope:
        return {}
    from transformers import AutoConfig

    dense = AutoConfig.for_model(**config)
    stated = {key: getattr(dense, key, None) for key in missing}
    found = {key: value for key, value in stated.items() if value is not None}
    return found | ({"rope_theta": dense.rope_parameters["rope_theta"]} if rope else {})


def _sliding_layers(config: Mapping[str, Any], layers: int) -> set[int]:
    """Return the layers of a dense model whose attention is limited to a window."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return set()
    types = config.get("layer_types")
    if isinstance(types, list):
        return {index for index, each in enumerate(types) if each == "sliding_attention"}
    if config.get("model_type") == "mistral":
        return set(range(layers))
    # Qwen's window is off unless it is switched on, and then begins at a layer
    return set(range(config.get("max_window_layers", 28), layers)) if config.get("use_sliding_window") else set()


def _check_sliding(architecture: MoeArchitecture, base: MoeSource, sliding: set[int], layers: int) -> None:
    possible = {"deepseek": (0,), "mixtral": (0, layers), "qwen3_moe": (0, layers)}
    if len(sliding) not in possible.get(architecture.model_type, (len(sliding),)):
        words = "in no layer" if architecture.model_type == "deepseek" else "in all layers or none"
        raise InputError(
            f"{base.name}: limits the attention of {len(sliding)} of its {layers} layers to a window, and a "
            f"{architecture.title} mixture can do so {words}"
        )


def _deepseek(recipe: MoeRecipe, config: Mapping[str, Any]) -> dict[str, Any]:
    classes = {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    return {
        "n_routed_experts": len(recipe.experts),
        "n_shared_experts": len(recipe.shared_experts) or None,
        "num_experts_per_tok": recipe.experts_per_token,
        "moe_intermediate_size": config["intermediate_size"],
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "auto_map": {key: _DEEPSEEK_CODE + name for key, name in classes.items()},
    }
