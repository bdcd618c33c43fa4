"""Names of diffusion models: what we say is one tensor, diffusers' own converters of single files make of another."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from merging.sources.diffusion_names import known_names, spellings
from merging.sources.fused_names import NameSet
from merging.sources.lora_names import normal_name

State = dict[str, Tensor]


def under(state: State, component: str, style: NameSet) -> State:
    """The tensors of a component under the names of a style, put together of the rows that these stand for."""
    return {
        known.name: torch.cat([state[part.name][part.start : part.start + part.length] for part in known.rows])
        for known in known_names({name: tuple(value.shape) for name, value in state.items()})
        if known.component == component and style in known.styles
    }


def check_equal(got: State, wanted: State) -> None:
    assert {name: value.shape for name, value in got.items()} == {name: value.shape for name, value in wanted.items()}
    assert all(torch.equal(_ends(got[name]), _ends(wanted[name])) for name in wanted)


def _ends(value: Tensor) -> Tensor:
    """The first and the last number of every row: rows are one number each, and millions long."""
    return value[..., [0, -1]] if value.dim() > 1 else value


def random(shapes: dict[str, tuple[int, ...]]) -> State:
    """A state of such weights, with biases; every row is one number, so that the large ones cost nothing."""
    torch.manual_seed(0)
    biases = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
    return {
        name: torch.randn(shape[0], *[1] * len(shape[1:])).expand(shape) for name, shape in (shapes | biases).items()
    }


FLUX_WIDTH = 3072
"""The width of Flux, which diffusers' converter takes for granted where it cuts the fused layer of single blocks."""


def flux() -> State:
    """The modules of Flux as published, two blocks of each kind; thin, but for the layer whose cuts depend on it."""
    shapes: dict[str, tuple[int, ...]] = {"final_layer.adaLN_modulation.1.weight": (8, 4)}
    for number in range(2):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            shapes |= {f"{block}_attn.qkv.weight": (12, 4), f"{block}_attn.proj.weight": (4, 4)}
            shapes |= {f"{block}_mlp.0.weight": (16, 4), f"{block}_mlp.2.weight": (4, 16)}
            shapes[f"{block}_mod.lin.weight"] = (24, 4)
        block = f"single_blocks.{number}"
        shapes |= {f"{block}.linear2.weight": (4, 20), f"{block}.modulation.lin.weight": (12, 4)}
        shapes[f"{block}.linear1.weight"] = (7 * FLUX_WIDTH if number else 3 * FLUX_WIDTH + 12288, FLUX_WIDTH)
    for name in ("img_in", "txt_in", "final_layer.linear"):
        shapes[f"{name}.weight"] = (4, 4)
    for name in ("time_in", "vector_in", "guidance_in"):
        shapes |= {f"{name}.in_layer.weight": (4, 3), f"{name}.out_layer.weight": (4, 4)}
    return random(shapes)


FLUX_NORMS = {
    f"{block}.{norm}.scale": torch.ones(2)
    for number in range(2)
    for block, norms in (
        (f"double_blocks.{number}.img_attn.norm", ("query_norm", "key_norm")),
        (f"double_blocks.{number}.txt_attn.norm", ("query_norm", "key_norm")),
        (f"single_blocks.{number}.norm", ("query_norm", "key_norm")),
    )
    for norm in norms
}
"""What the converter wants to find, and nobody trains."""


def test_flux() -> None:
    published = flux()
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers({**published, **FLUX_NORMS})
    diffusers = {name: value for name, value in converted.items() if ".norm_" not in name}
    check_equal(under(published, "transformer", "diffusers"), diffusers)
    check_equal(under(published, "transformer", "published"), published)
    check_equal(under(diffusers, "transformer", "published"), published)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in published.items()}
    check_equal(under(prefixed, "transformer", "diffusers"), diffusers)


def sd3() -> State:
    """The modules of Stable Diffusion 3.5 as published: two blocks, of which the last ends the stream of the text."""
    shapes: dict[str, tuple[int, ...]] = {"x_embedder.proj.weight": (4, 3, 2, 2), "context_embedder.weight": (4, 5)}
    for number in range(2):
        for stream in ("x_block", "context_block"):
            block, last = f"joint_blocks.{number}.{stream}", number == 1 and stream == "context_block"
            shapes |= {f"{block}.attn.qkv.weight": (12, 4)}
            shapes |= {f"{block}.adaLN_modulation.1.weight": (8, 4) if last else (24, 4)}
            if not last:
                shapes |= {f"{block}.attn.proj.weight": (4, 4)}
                shapes |= {f"{block}.mlp.fc1.weight": (16, 4), f"{block}.mlp.fc2.weight": (4, 16)}
    shapes |= {"joint_blocks.0.x_block.attn2.qkv.weight": (12, 4), "joint_blocks.0.x_block.attn2.proj.weight": (4, 4)}
    for name in ("t_embedder", "y_embedder"):
        shapes |= {f"{name}.mlp.0.weight": (4, 6), f"{name}.mlp.2.weight": (4, 4)}
    return random(shapes | {"final_layer.linear.weight": (4, 4), "final_layer.adaLN_modulation.1.weight": (8, 4)})


def test_sd3() -> None:
    published = sd3()
    convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    diffusers = convert({**published, "pos_embed": torch.zeros(1, 4, 4)})
    del diffusers["pos_embed.pos_embed"]
    check_equal(under(published, "transformer", "diffusers"), diffusers)
    check_equal(under(diffusers, "transformer", "published"), published)


UNETS = {
    "attention below": {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    "attention above": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "one resnet a level": {"layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                           "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    "as SDXL": {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
                "projection_class_embeddings_input_dim": 32, "transformer_layers_per_block": (1, 2),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNETS)
def test_unet(kind: str) -> None:
    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 16), "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4}
    unet = UNet2DConditionModel(**settings, **UNETS[kind])
    diffusers = unet.state_dict()
    published = under(diffusers, "unet", "published")
    assert published.keys().isdisjoint(diffusers)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in published.items()}
    config = {**unet.config, "class_embed_type": None, "addition_embed_type": unet.config.addition_embed_type}
    check_equal(single_file_utils.convert_ldm_unet_checkpoint(dict(prefixed), config), diffusers)
    check_equal(under(prefixed, "unet", "diffusers"), diffusers)
    check_equal(under(published, "unet", "diffusers"), diffusers)


def test_open_clip() -> None:
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=9,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        block = f"transformer.resblocks.{layer}"
        shapes |= {f"{block}.attn.in_proj.weight": (24, 8), f"{block}.attn.out_proj.weight": (8, 8)}
        shapes |= {f"{block}.mlp.c_fc.weight": (12, 8), f"{block}.mlp.c_proj.weight": (8, 12)}
        shapes |= {f"{block}.ln_1.weight": (8,), f"{block}.ln_2.weight": (8,)}
    state = {name.replace("in_proj.", "in_proj_"): value for name, value in random(shapes).items()}
    prefix = "conditioner.embedders.1.model."
    single = {prefix + name: value for name, value in state.items()}
    text_projection = {f"{prefix}text_projection": torch.zeros(8, 8)}
    convert = single_file_utils.convert_open_clip_checkpoint
    theirs = convert(CLIPTextModel(config), {**single, **text_projection}, prefix)
    got = under(single, "text_encoder_2", "diffusers")
    check_equal(got, {name: value for name, value in theirs.items() if "projection" not in name})


def test_spellings() -> None:
    """One tensor of each component, as the programs that write LoRA files spell it."""
    names = {
        "unet.down_blocks.1.attentions.0.proj_in.weight": (
            "lora_unet_down_blocks_1_attentions_0_proj_in.weight",
            "lora_unet_input_blocks_4_1_proj_in.weight",
            "diffusion_model.input_blocks.4.1.proj_in.weight",
            "down_blocks.1.attentions.0.proj_in.weight",
            "lycoris_down_blocks_1_attentions_0_proj_in.weight",
        ),
        "text_encoder.encoder.layers.0.self_attn.q_proj.weight": (
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.weight",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.weight",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight",
        ),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight": (
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.weight",
            "text_encoder_2.encoder.layers.0.mlp.fc1.weight",
        ),
        "transformer.single_transformer_blocks.3.proj_out.weight": (
            "lora_unet_single_blocks_3_linear2.weight",
            "lora_transformer_single_transformer_blocks_3_proj_out.weight",
            "diffusion_model.single_blocks.3.linear2.weight",
        ),
    }
    known = known_names(dict.fromkeys(names, (4, 4)))
    for name, wanted in names.items():
        spelled = {each for k in known if k.rows[0].name == name for each in spellings(k)}
        assert {each: normal_name(each) in spelled for each in wanted} == dict.fromkeys(wanted, True)
