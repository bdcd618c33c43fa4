"""Stacks and places from names: of real architectures, of published checkpoints, of adapters, and made-up traps."""

from __future__ import annotations

import time
import warnings
from functools import cache

import pytest
import torch
import transformers

from merging.maths import layers
from merging.maths.layers import LayerPosition, Stacks

# Default configs on the meta device: the names of the published base sizes.
ARCHITECTURES: dict[str, dict[str, int]] = {
    "AlbertForMaskedLM": {},
    "ASTForAudioClassification": {"audio_spectrogram_transformer.layers": 12},
    "BartForConditionalGeneration": {"model.encoder.layers": 12, "model.decoder.layers": 12},
    "BeitForImageClassification": {"beit.layers": 12},
    "BertForMaskedLM": {"bert.encoder.layer": 12},
    "Blip2ForConditionalGeneration": {
        "vision_model.encoder.layers": 39,
        "qformer.encoder.layer": 12,
        "language_model.model.decoder.layers": 12,
    },
    "BloomForCausalLM": {"transformer.h": 2},
    "CLIPModel": {"text_model.encoder.layers": 12, "vision_model.encoder.layers": 12},
    "ClapModel": {"text_model.encoder.layer": 12, "audio_model.audio_encoder.layers": 12},
    "ConvNextForImageClassification": {"convnext.encoder.stages": 18},
    "CvtForImageClassification": {"cvt.encoder.stages": 13},
    "DebertaV2ForMaskedLM": {"deberta.encoder.layer": 24},
    "DeepseekV3ForCausalLM": {"model.layers": 61},
    "Dinov2Model": {"encoder.layer": 12},
    "DistilBertForMaskedLM": {"distilbert.transformer.layer": 6},
    "EfficientNetForImageClassification": {"efficientnet.encoder.blocks": 55},
    "FalconForCausalLM": {"transformer.h": 32},
    "FocalNetForImageClassification": {"focalnet.encoder.stages": 12},
    "FunnelModel": {"encoder.blocks": 12, "decoder.layers": 2},
    "GPT2LMHeadModel": {"transformer.h": 12},
    "GPTNeoXForCausalLM": {"gpt_neox.layers": 44},
    "Gemma3ForConditionalGeneration": {
        "model.vision_tower.encoder.layers": 12,
        "model.language_model.layers": 26,
    },
    "GptOssForCausalLM": {"model.layers": 36},
    "HieraForImageClassification": {"hiera.encoder.stages": 24},
    "Idefics3ForConditionalGeneration": {"model.vision_model.encoder.layers": 12, "model.text_model.layers": 32},
    "JambaForCausalLM": {"model.layers": 32},
    "LlamaForCausalLM": {"model.layers": 32},
    "LlavaForConditionalGeneration": {"model.vision_tower.encoder.layers": 24, "model.language_model.layers": 32},
    "MambaForCausalLM": {"backbone.layers": 32},
    "MixtralForCausalLM": {"model.layers": 32},
    "MllamaForConditionalGeneration": {
        "model.vision_model.transformer.layers": 32,
        "model.vision_model.global_transformer.layers": 8,
        "model.language_model.layers": 40,
    },
    "MobileViTForImageClassification": {"mobilevit.encoder.layer": 5},
    "ModernBertForMaskedLM": {"model.layers": 22},
    "OPTForCausalLM": {"model.decoder.layers": 12},
    "Qwen2VLForConditionalGeneration": {"model.visual.blocks": 32, "model.language_model.layers": 80},
    "Qwen3MoeForCausalLM": {"model.layers": 24},
    "ResNetForImageClassification": {"resnet.encoder.stages": 16},
    "SegformerForSemanticSegmentation": {"segformer.stages": 8, "decode_head.linear_projections": 4},
    "SiglipModel": {"text_model.encoder.layers": 12, "vision_model.encoder.layers": 12},
    "SwinForImageClassification": {"swin.encoder.layers": 12},
    "SwitchTransformersForConditionalGeneration": {"encoder.block": 12, "decoder.block": 12},
    "T5ForConditionalGeneration": {"encoder.block": 6, "decoder.block": 6},
    "ViTForImageClassification": {"vit.layers": 12},
    "Wav2Vec2ForCTC": {"wav2vec2.feature_extractor.conv_layers": 7, "wav2vec2.encoder.layers": 12},
    "WhisperForConditionalGeneration": {"model.encoder.layers": 4, "model.decoder.layers": 4},
    "XLNetLMHeadModel": {"transformer.layer": 24},
}


@cache
def names(architecture: str) -> tuple[str, ...]:
    kind = getattr(transformers, architecture)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = kind.config_class()
        if architecture.startswith("Idefics3"):
            config.text_config.pad_token_id = None  # transformers 5.18 has one that is not in the vocabulary
        return tuple(kind._from_config(config).state_dict())


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stacks_of(architecture):
    stacks = Stacks.from_names(names(architecture))
    assert stacks.lengths == ARCHITECTURES[architecture]
    seen = {prefix: set() for prefix in stacks.lengths}
    for name in names(architecture):
        position = stacks.position(name)
        if position.stack is not None:
            assert (
                name.startswith(f"{position.stack}.")
                and position.layers == stacks.lengths[position.stack]
                and not position.after
            )
            seen[position.stack].add(position.layer)
    assert seen == {prefix: set(range(length)) for prefix, length in stacks.lengths.items()}


def test_a_shuffled_model_has_the_same_stacks():
    for architecture in ("SwinForImageClassification", "BertForMaskedLM"):
        assert Stacks.from_names(sorted(names(architecture))) == Stacks.from_names(names(architecture)[::-1])


def layer(architecture: str, name: str) -> int | None:
    assert name in names(architecture)
    return Stacks.from_names(names(architecture)).position(name).layer


def test_stages_are_flattened_in_order():
    swin = "SwinForImageClassification"  # 2, 2, 6 and 2 blocks, a downsampling behind each stage but the last
    assert layer(swin, "swin.encoder.layers.0.blocks.1.layernorm_before.weight") == 1
    assert layer(swin, "swin.encoder.layers.2.blocks.3.layernorm_before.weight") == 7
    assert layer(swin, "swin.encoder.layers.2.downsample.norm.weight") == 9
    assert layer(swin, "swin.encoder.layers.3.blocks.1.layernorm_before.weight") == 11
    convnext = "ConvNextForImageClassification"  # 3, 3, 9 and 3 blocks, a downsampling before each stage but the first
    assert layer(convnext, "convnext.encoder.stages.2.downsampling_layer.1.weight") == 6
    assert layer(convnext, "convnext.encoder.stages.2.layers.8.dwconv.weight") == 14
    segformer = "SegformerForSemanticSegmentation"  # an embedding before each stage, a norm behind it
    assert layer(segformer, "segformer.stages.1.patch_embeddings.proj.weight") == 2
    assert layer(segformer, "segformer.stages.1.layer_norm.weight") == 3


def test_stages_whose_blocks_have_no_name():
    stacks = Stacks.from_names(
        f"segformer.encoder.block.{stage}.{block}.{part}.weight"
        for stage, depth in enumerate((3, 4, 6, 3))
        for block in range(depth)
        for part in ("layer_norm_1", "attention.self.query", "mlp.dense1")
    )
    assert stacks.lengths == {"segformer.encoder.block": 16}
    assert stacks.position("segformer.encoder.block.2.5.mlp.dense1.weight").layer == 12


def test_blocks_numbered_through_all_stages():
    stacks = Stacks.from_names(
        f"blocks.{i // 10}.{i}.{part}.weight" for i in range(40) for part in ("norm1", "attn.qkv")
    )
    assert [stacks.position(f"blocks.{i // 10}.{i}.attn.qkv.weight").layer for i in range(40)] == list(range(40))


def test_parts_of_a_t5_block_are_not_blocks():
    stacks = Stacks.from_names(names("T5ForConditionalGeneration"))
    assert stacks.position("decoder.block.3.layer.2.DenseReluDense.wi.weight") == LayerPosition("decoder.block", 3, 6)
    assert stacks.position("decoder.block.5.layer.0.SelfAttention.q.weight").depth == 1.0
    assert stacks.position("encoder.block.0.layer.1.layer_norm.weight").depth == 0.0


def test_only_the_whole_number_of_the_block_counts():
    stacks = Stacks.from_names(f"model.layers.{i}.mlp.experts.{e}.w1.weight" for i in range(12) for e in range(8))
    assert stacks.lengths == {"model.layers": 12}
    assert stacks.position("model.layers.3.mlp.experts.5.w1.weight") == LayerPosition("model.layers", 3, 12)
    assert [stacks.position(f"model.layers.{i}.mlp.w").layer for i in (1, 11)] == [1, 11]
    assert stacks.position("model.layers.11.self_attn.q_proj.weight").depth == 1.0
    assert stacks.position("other.model.layers.3.mlp.w1.weight").stack is None
    assert stacks.position("model.layers_2.3.mlp.w1.weight").stack is None


@pytest.mark.parametrize(
    "indices, suffix",
    [((0,), "a.weight"), ((0, 2), "a.weight"), ((1, 2), "a.weight"), ((0, 1), "weight")],
    ids=["one", "a gap", "from one", "bare layers"],
)
def test_what_is_no_stack(indices, suffix):
    stacks = Stacks.from_names(f"model.mlp.{i}.{suffix}" for i in indices)
    assert stacks.lengths == {}
    assert stacks.position(f"model.mlp.{indices[0]}.{suffix}") == LayerPosition(after=True)


def test_experts_are_no_stack():
    assert Stacks.from_names(f"moe.experts.{i}.w1.weight" for i in range(8)).lengths == {}
    assert Stacks.from_names([f"moe.experts.{i}.w1.weight" for i in range(8)], complete=False).lengths == {}


def test_a_number_in_front_is_a_container():
    found = [f"0.auto_model.encoder.layer.{i}.output.dense.weight" for i in range(6)]
    stacks = Stacks.from_names([*found, "0.auto_model.embeddings.LayerNorm.weight", "1.linear.weight"])
    assert stacks.lengths == {"0.auto_model.encoder.layer": 6}
    assert stacks.position(found[2]).layer == 2


def test_absurd_numbers_do_no_harm():
    absurd = [
        f"model.layers.{'9' * 5000}.mlp.weight",
        "model.layers.٣.mlp.weight",
        "",
        ".",
        "..",
        ".0.",
        "3",
        "a.-1.b.c",
    ]
    assert Stacks.from_names(absurd, complete=False).lengths == {}
    assert all(Stacks.from_names([]).position(name).layer is None for name in absurd)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(
    "double, single", [("transformer_blocks", "single_transformer_blocks"), ("double_blocks", "single_blocks")]
)
def test_a_double_stack_counts_on(prefix, double, single):
    first = [f"{prefix}{double}.{i}.attn.to_q.weight" for i in range(19)]
    second = [f"{prefix}{single}.{i}.attn.to_q.weight" for i in range(38)]
    stacks = Stacks.from_names(second + first)
    assert stacks.lengths == {prefix + double: 19, prefix + single: 38}
    assert {stacks.position(name).layers for name in first + second} == {57}
    assert [stacks.position(name).layer for name in first + second] == list(range(57))
    assert Stacks.from_names(second).position(second[3]).layer == 3


BEFORE = [
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "shared.weight",
    "gpt_neox.embed_in.weight",
    "bert.embeddings.LayerNorm.weight",
    "vit.embeddings.cls_token",
    "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.weight",
    "model.encoder.conv1.weight",
    "visual.conv1.weight",
    "visual.class_embedding",
    "visual.positional_embedding",
    "stem.0.weight",
    "wav2vec2.encoder.pos_conv_embed.conv.bias",
    "wav2vec2.feature_projection.projection.weight",
    "pos_embed",
    "patch_embed.proj.weight",
    "transformer.word_embeddings_layernorm.weight",
    "model.encoder.layernorm_embedding.bias",
    "x_embedder.weight",
    "query_tokens",
    "mobilevit.conv_stem.convolution.weight",
    "transformer.mask_emb",
    "bn1.weight",
    "vision_model.layernorm_pre.weight",
    "vision_model.embeddings.position_embedding.weight",
]

AFTER = [
    "model.norm.weight",
    "lm_head.weight",
    "transformer.ln_f.weight",
    "encoder.final_layer_norm.weight",
    "bert.pooler.dense.weight",
    "visual_projection.weight",
    "text_projection.weight",
    "classifier.1.weight",
    "score.weight",
    "cls.predictions.transform.dense.weight",
    "embed_out.weight",
    "vision_model.post_layernorm.weight",
    "visual.ln_post.weight",
    "model.multi_modal_projector.linear_1.weight",
    "logit_scale",
    "final_logits_bias",
    "visual.merger.mlp.0.weight",
    "norm_out.linear.weight",
    "proj_out.weight",
    "unembed.weight",
    "vision_model.head.probe",
    "lm_head.conv1.weight",
    "model.multi_modal_projector.image_position_embed.weight",
    "decode_head.linear_fuse.weight",
    "vision_encoder.neck.conv1.weight",
    "composer.weight",
]


@pytest.mark.parametrize("after, name", [(False, name) for name in BEFORE] + [(True, name) for name in AFTER])
def test_sides_of_the_blocks(after, name):
    position = Stacks.from_names(names("BertForMaskedLM")).position(name)
    assert position == LayerPosition(None, None, 0, after)
    assert position.depth == 0.0


def test_layers_for_multi_token_prediction_lie_at_depth_one():
    deepseek = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(62)]
    stacks = Stacks.from_names(deepseek).limit(61)
    assert stacks.lengths == {"model.layers": 61}
    assert [stacks.position(deepseek[i]).depth for i in (0, 30, 60, 61)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "text, vision, config, expected",
    [
        (28, 32, 28, (28, 32)),  # Qwen2-VL 2B: a deeper tower, and a config that fits the language model
        (47, 50, 46, (46, 50)),
        (47, 24, 46, (46, 24)),
        (12, 24, 40, (12, 24)),
        (12, 24, 5, (12, 24)),  # a number of something else
    ],
)
def test_the_config_shortens_the_main_stack_alone(text, vision, config, expected):
    own = [f"model.layers.{i}.mlp.up.weight" for i in range(text)] + [f"v.blocks.{i}.fc.weight" for i in range(vision)]
    assert Stacks.from_names(own).limit(config).lengths == dict(
        zip(("model.layers", "v.blocks"), expected, strict=True)
    )


def test_stages_are_not_shortened():
    assert Stacks.from_names(names("SwinForImageClassification")).limit(11).lengths == {"swin.encoder.layers": 12}


def test_the_users_number_of_layers():
    stacks = Stacks.from_names(names("WhisperForConditionalGeneration")).with_layers(7)
    assert stacks.lengths == {"model.encoder.layers": 7, "model.decoder.layers": 7}
    assert stacks.position("model.encoder.layers.3.fc1.weight").depth == 0.5
    assert stacks.with_layers(1).position("model.encoder.layers.0.fc1.weight").depth == 1.0
    for change in (stacks.with_layers, stacks.limit):
        with pytest.raises(ValueError, match="at least one layer, and 0"):
            change(0)


def test_an_adapter_may_cover_few_layers():
    stacks = Stacks.from_names(
        ["encoder.layer.3.attention.self.query.weight", "encoder.layer.9.attention.self.query.weight"], complete=False
    )
    assert stacks.lengths == {"encoder.layer": 10}
    assert stacks.position("encoder.layer.3.attention.self.query.weight") == LayerPosition("encoder.layer", 3, 10)
    assert stacks.position("encoder.layer.4.output.dense.weight").layer == 4
    assert stacks.with_layers(12).position("encoder.layer.9.attention.self.query.weight").depth == 9 / 11


def test_module_paths_of_an_adapter():
    found = [f"model.layers.{i}.{part}" for i in (4, 7) for part in ("self_attn.q_proj", "mlp.experts.11.w1")]
    stacks = Stacks.from_names(found, complete=False)
    assert stacks.lengths == {"model.layers": 8}
    assert [stacks.position(name).layer for name in found] == [4, 4, 7, 7]


def test_an_adapter_of_stages():
    depths = (2, 2, 6, 2)
    found = [
        f"swin.encoder.layers.{s}.blocks.{b}.attention.self.query.weight" for s in range(4) for b in range(depths[s])
    ]
    stacks = Stacks.from_names(found, complete=False)
    assert [stacks.position(name).layer for name in found] == list(range(12))
    assert stacks.position("swin.encoder.layers.3.blocks.9.attention.self.query.weight").depth == 1.0


def test_an_adapter_of_t5():
    found = [
        f"decoder.block.{i}.layer.{s}.{a}.q.weight" for i in (0, 5) for s, a in enumerate(("SelfAttention", "Cross"))
    ]
    stacks = Stacks.from_names(found, complete=False)
    assert stacks.lengths == {"decoder.block": 6}
    assert stacks.position(found[-1]).depth == 1.0


def test_fifty_thousand_names_take_no_time():
    found = [f"model.layers.{i}.mlp.experts.{e}.{w}.weight" for i in range(62) for e in range(269) for w in "abc"]
    start = time.process_time()
    stacks = Stacks.from_names(found)
    placed = [stacks.position(name).layer for name in found]
    # a second is ten times what it takes; a search through all names for each would take minutes
    assert time.process_time() - start < 1.0
    assert placed == [i for i in range(62) for _ in range(269 * 3)]


def test_public_names():
    assert all(hasattr(layers, name) for name in layers.__all__)
