"""Tiny models of many architectures, made on the spot: real modelling code, random weights, some 20 ms each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

__all__ = ["ARCHITECTURES", "build"]

# Heads, groups and experts are counts larger than one wherever a layout could hide a mistake (grouped keys, fused
# projections, stacked experts), and no two sizes that could be confused are equal without need.
DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SPEECH = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def tiny(config: str, model: str, *groups: dict[str, Any], **settings: Any) -> Callable[[], PreTrainedModel]:
    """A builder of ``model`` from ``config`` with the settings of the groups; transformers imports it when called."""
    merged: dict[str, Any] = {}
    for group in (*groups, settings):
        merged.update(group)

    def make() -> PreTrainedModel:
        return getattr(transformers, model)(getattr(transformers, config)(**merged))

    return make


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny("LlamaConfig", "LlamaForCausalLM", DECODER),
    "llama-biases": tiny("LlamaConfig", "LlamaForCausalLM", DECODER, attention_bias=True, mlp_bias=True),
    "llama-tied": tiny("LlamaConfig", "LlamaForCausalLM", DECODER, tie_word_embeddings=True),
    "mistral": tiny("MistralConfig", "MistralForCausalLM", DECODER),
    "qwen2": tiny("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": tiny("Qwen3Config", "Qwen3ForCausalLM", DECODER, HEAD),
    "qwen3-biases": tiny("Qwen3Config", "Qwen3ForCausalLM", DECODER, HEAD, attention_bias=True),
    "gemma2": tiny("Gemma2Config", "Gemma2ForCausalLM", DECODER, HEAD),
    "gemma3": tiny("Gemma3TextConfig", "Gemma3ForCausalLM", DECODER, HEAD),
    "phi3": tiny("Phi3Config", "Phi3ForCausalLM", DECODER),
    "olmo2": tiny("Olmo2Config", "Olmo2ForCausalLM", DECODER),
    "cohere": tiny("CohereConfig", "CohereForCausalLM", DECODER, use_qk_norm=True),
    "stablelm": tiny("StableLmConfig", "StableLmForCausalLM", DECODER),
    "deepseek-v3": tiny(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        DECODER,
        num_key_value_heads=4,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=12,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "jamba": tiny(
        "JambaConfig",
        "JambaForCausalLM",
        DECODER,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "mixtral": tiny("MixtralConfig", "MixtralForCausalLM", DECODER, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": tiny("Qwen2MoeConfig", "Qwen2MoeForCausalLM", DECODER, EXPERTS, shared_expert_intermediate_size=40),
    "qwen3-moe": tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", DECODER, HEAD, EXPERTS),
    "qwen3-next": tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        DECODER,
        HEAD,
        EXPERTS,
        num_hidden_layers=4,
        shared_expert_intermediate_size=40,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "granite-moe": tiny(
        "GraniteMoeConfig", "GraniteMoeForCausalLM", DECODER, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt-oss": tiny("GptOssConfig", "GptOssForCausalLM", DECODER, HEAD, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": tiny("GPT2Config", "GPT2LMHeadModel", vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "gpt-neox": tiny("GPTNeoXConfig", "GPTNeoXForCausalLM", ENCODER),
    "gptj": tiny(
        "GPTJConfig", "GPTJForCausalLM", vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
    ),
    "opt": tiny(
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=96,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
    ),
    "bloom": tiny("BloomConfig", "BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon": tiny(
        "FalconConfig",
        "FalconForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=False,
        bias=True,
    ),
    "falcon-new": tiny(
        "FalconConfig",
        "FalconForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=False,
    ),
    "mamba": tiny("MambaConfig", "MambaForCausalLM", vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2),
    "bert": tiny("BertConfig", "BertForMaskedLM", ENCODER),
    "roberta": tiny("RobertaConfig", "RobertaForMaskedLM", ENCODER),
    "deberta-v2": tiny(
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        ENCODER,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=False,
        pos_att_type=["p2c", "c2p"],
        conv_kernel_size=3,
    ),
    "albert": tiny("AlbertConfig", "AlbertForMaskedLM", ENCODER, embedding_size=24),
    "distilbert": tiny(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        vocab_size=96,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
    ),
    "electra": tiny("ElectraConfig", "ElectraForPreTraining", ENCODER, embedding_size=24),
    "modernbert": tiny("ModernBertConfig", "ModernBertForMaskedLM", ENCODER, pad_token_id=0),
    "xlnet": tiny("XLNetConfig", "XLNetLMHeadModel", vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "t5": tiny("T5Config", "T5ForConditionalGeneration", T5, feed_forward_proj="relu"),
    "t5-gated": tiny(
        "T5Config", "T5ForConditionalGeneration", T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "bart": tiny("BartConfig", "BartForConditionalGeneration", SEQ2SEQ, max_position_embeddings=64),
    "whisper": tiny(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "wav2vec2": tiny("Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH, mask_time_prob=0.05),
    "hubert": tiny("HubertConfig", "HubertModel", SPEECH),
    "vit": tiny("ViTConfig", "ViTForImageClassification", VISION, num_labels=5),
    "dinov2": tiny("Dinov2Config", "Dinov2Model", VISION),
    "swin": tiny(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
    ),
    "convnext": tiny(
        "ConvNextConfig",
        "ConvNextForImageClassification",
        num_stages=2,
        hidden_sizes=[16, 24],
        depths=[2, 1],
        num_labels=5,
    ),
    "resnet": tiny(
        "ResNetConfig",
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[2, 1],
        layer_type="bottleneck",
        num_labels=5,
    ),
    "segformer": tiny(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[4, 1],
        hidden_sizes=[16, 24],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    ),
    "clip": tiny("CLIPConfig", "CLIPModel", text_config=ENCODER, vision_config=VISION, projection_dim=24),
    "siglip": tiny("SiglipConfig", "SiglipModel", text_config=ENCODER, vision_config=VISION),
    "llava": tiny(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        text_config={"model_type": "llama", **DECODER},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=90,
    ),
    "qwen2-vl": tiny(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        text_config={**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    ),
}


def build(name: str, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of that name, every saved number drawn from the seed: no zero bias or fresh statistic is left."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + 0.2)
            elif value.dtype != torch.bool:
                value.copy_(torch.randint(0, 60, value.shape, generator=generator))
    return model.to(dtype)
