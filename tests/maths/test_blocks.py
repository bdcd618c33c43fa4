"""Blocks of real models, held against tables that other programs gave for every key.

``block_tables.json.xz`` was recorded by running their code on the keys of Stable Diffusion 1.5, SDXL and Flux.1 (of
sd-mecha's model configs and diffusers' models) and of LoRAs on all of their modules: SuperMerger 0b1c491, MBW
(sdweb-merge-block-weighted-gui) 8a62a75, LBW (sd-webui-lora-block-weight) b403cb7 behind the names of
stable-diffusion-webui, and sd-scripts 48d368f. ``none`` and ``Not Merge`` are keys that a program leaves out.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from merging.maths.block_weights import BlockWeights
from merging.maths.blocks import LISTS, BlockRange, describe_blocks, find_block
from merging.maths.elements import find_parts
from merging.maths.layers import Stacks
from merging.maths.site import Site, site_of
from merging.sources.unet_names import diffusers_name

SD1 = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
FLUX = ["CLIP", "T5", "IN", *(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38)), "OUT"]
SDXL = ["BASE", *(f"IN{n:02}" for n in range(9)), "M00", *(f"OUT{n:02}" for n in range(9))]


@cache
def recorded() -> dict[str, Any]:
    return json.loads(lzma.decompress((Path(__file__).parent / "block_tables.json.xz").read_bytes()))


def sites(names: list[str], complete: bool = True) -> list[Site]:
    stacks = Stacks.from_names(names, complete=complete)
    return [site_of(name, (2, 2), stacks) for name in names]


def checkpoint_keys(model: str) -> list[str]:
    """Return the keys of a published checkpoint."""
    return [key for keys in recorded()["tables"][f"{model} checkpoint: SuperMerger"].values() for key in keys]


@cache
def checkpoint_sites(model: str) -> list[Site]:
    return sites(checkpoint_keys(model))


@cache
def diffusers_sites(model: str) -> list[Site]:
    return sites(recorded()["diffusers"][model])


def tensor_name(key: str) -> str:
    return key if "." in key else f"{key}.weight"


TABLES = [
    *("sd1 checkpoint: SuperMerger", "sd1 checkpoint: MBW", "sdxl checkpoint: SuperMerger"),
    *("flux checkpoint: SuperMerger", "sd1 LoRA: LBW", "sd1 LoRA: sd-scripts", "sdxl LoRA: LBW"),
    *("sdxl LoRA: sd-scripts", "sdxl LoRA, diffusers names: LBW", "flux LoRA: LBW"),
]


@pytest.mark.parametrize("title", TABLES)
def test_every_key_has_the_block_of_the_other_program(title: str) -> None:
    """Numbers from 0 on, one a block, give each key the number that the program gives it."""
    table = recorded()["tables"][title]
    theirs = {tensor_name(key): block.replace("MID", "M00") for block, keys in table.items() for key in keys}
    order = FLUX if title.startswith("flux") else SD1
    weights = BlockWeights.read([float(number) for number in range(len(order))])
    found = sites(list(theirs), complete="LoRA" not in title)
    assert found[0].position.layout == title.split()[0].rstrip(",")
    for site in found:
        block = theirs[site.name]
        # sd-scripts trains no output layer; two keys of averaged weights lost their dots
        if block in ("none", "Not Merge", "OUT09" if "sdxl" in title else "") or "modeltime_embed" in site.name:
            continue
        assert weights.at(site) == order.index(block), site.name
    assert len(found) > 300
    assert set(TABLES) == set(recorded()["tables"])


def test_lists_are_theirs() -> None:
    """12, 17, 20, 26 and 61 numbers of LBW and sd-scripts, and what SuperMerger makes of 26 for SDXL."""
    for count, theirs in recorded()["lists"].items():
        layout = "sdxl" if count in ("12", "20", "26 for SDXL") else "flux" if count == "61" else "sd1"
        own = [describe_blocks([label]) for label in LISTS[layout][int(count.split()[0])]]
        if count == "26 for SDXL":
            own = [name for name in own if name in SDXL]
        assert own == theirs


def test_presets_are_theirs() -> None:
    """As LBW applies them; ALL and ALL0.5 are one number everywhere, also where LBW's list has no block."""
    blocks = {str(find_block(site.name, site.position)): site for site in checkpoint_sites("sd1")}
    presets = recorded()["presets"]
    assert presets.keys() == {"NONE", "ALL", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL", "ALL0.5"}
    for preset, wanted in presets.items():
        weights = BlockWeights.read(preset)
        for block, site in blocks.items():
            own = {"ALL": 1, "ALL0.5": 0.5}.get(preset, wanted[block.replace("VAE", "BASE")])
            assert weights.at(site) == own, (preset, block)


@pytest.mark.parametrize(("model", "layout"), [("sd", "sd1"), ("sdxl", "sdxl")])
def test_both_layouts_of_a_unet_have_the_same_blocks_and_elements(model: str, layout: str) -> None:
    """A tensor has one block and the same elements, by its published name and by diffusers' name."""
    names = checkpoint_keys(layout)
    prefix = "model.diffusion_model."
    pairs = {name: diffusers_name(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
    assert {theirs for theirs in pairs.values() if theirs} == set(recorded()["diffusers"][model])
    published = {site.name: site for site in checkpoint_sites(layout)}
    converted = {site.name: site for site in diffusers_sites(model)}
    for name, theirs in pairs.items():
        if theirs:
            one, other = published[name], converted[theirs]
            assert find_block(one.name, one.position) == find_block(other.name, other.position)
            assert find_parts(name) == find_parts(theirs), (name, theirs)


def test_both_layouts_of_flux_have_the_same_blocks() -> None:
    names = recorded()["diffusers"]["flux"]
    found = sites([f"transformer.{name}" for name in names])
    assert {site.position.layout for site in found} == {"flux"}
    blocks = {str(find_block(site.name, site.position)) for site in found}
    assert blocks == set(FLUX) - {"CLIP", "T5"}


@pytest.mark.parametrize(
    ("text", "names", "others"),
    [
        ("IN08", ["IN08"], ["IN07", "OUT08", "D08"]),
        ("in8", ["IN08"], ["IN07"]),
        ("MID", ["M00"], ["IN00"]),
        ("IN05-OUT02", ["IN05", "IN11", "M00", "OUT00", "OUT02"], ["IN04", "OUT03", "BASE", "VAE"]),
        ("OUT02-IN05", ["IN05", "OUT02"], ["IN04", "OUT03"]),
        ("IN05-OUT", ["IN05", "M00", "OUT00", "OUT11"], ["IN04", "VAE"]),
        ("OUT-IN", ["IN00", "IN11", "M00", "OUT11"], ["BASE", "VAE"]),
        ("D-S", ["D00", "D18", "S00", "S37"], ["OUT11"]),
        ("MID-OUT02", ["M00", "OUT02"], ["IN11", "OUT03"]),
        ("IN05-", ["IN05", "IN11"], ["IN04", "M00"]),
        ("IN05-IN", ["IN05", "IN11"], ["IN04", "M00"]),
        ("IN05-LAST", [], ["IN05", "M00", "OUT00", "VAE"]),
        ("IN0[4-6]", ["IN04", "IN06"], ["IN07", "OUT04"]),
        ("D00-03", ["D00", "D03"], ["D04", "S00"]),
        ("OUT", ["OUT00", "OUT11"], ["M00"]),
        ("IN*", ["IN00", "IN11"], ["OUT00"]),
        ("*", ["BASE", "IN00", "VAE"], []),
        ("BASE", ["BASE", "VAE"], ["IN00"]),
        ("VAE", ["VAE"], ["BASE"]),
        ("input_blocks.4", ["IN04"], ["IN05", "OUT04"]),
        ("down_blocks.1", ["IN04", "IN05", "IN06"], ["IN03", "IN07"]),
        ("mid_block", ["M00"], ["IN00"]),
        ("up_blocks.1-3", ["OUT03", "OUT11"], ["OUT02"]),
    ],
)
def test_names_of_blocks(text: str, names: list[str], others: list[str]) -> None:
    every = [*checkpoint_sites("sd1"), *diffusers_sites("flux")]
    blocks = {find_block(site.name, site.position) for site in every}
    held = {str(block) for block in blocks if BlockRange(text).holds(block)}
    assert set(names) <= held
    assert not held & set(others)


LLAMA = [f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")]
TOWERS = [f"model.visual.blocks.{layer}.attn.qkv.weight" for layer in range(3)]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("layers.0-1:0", "model.layers.0 model.layers.1"),
        ("model.layers.3:0", "model.layers.3"),
        ("layers:0", "model.layers.0 model.layers.1 model.layers.2 model.layers.3"),
        ("visual.blocks.2-9:0", "model.visual.blocks.2"),
        ("blocks.0 layers.0:0", "model.layers.0 model.visual.blocks.0"),
        ("NOT layers:0", "IN OUT model.visual.blocks.0 model.visual.blocks.1 model.visual.blocks.2"),
        ("BASE:0", "IN OUT"),
    ],
)
def test_blocks_of_other_models_are_layers_of_their_stacks(text: str, held: str) -> None:
    found = sites([*LLAMA, *TOWERS, "model.embed_tokens.weight", "lm_head.weight"])
    zero = {str(find_block(s.name, s.position)) for s in found if BlockWeights.read(text).at(s) == 0}
    assert sorted(zero) == held.split()


WAN = [f"lora_unet_blocks_{number}_self_attn_q.weight" for number in range(3)]


def test_flat_names_of_unknown_families() -> None:
    assert [BlockWeights.read("blocks.1-2:0.5").at(site) for site in sites(WAN, complete=False)] == [1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.weight"], "sd1"),
        (["lora_unet_down_blocks_1_attentions_0_proj_in.weight"], "unet"),
        (["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.weight"], "unet"),
        (["lora_unet_up_blocks_3_attentions_1_transformer_blocks_0_attn1_to_q.weight"], "sd1"),
        (["lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q.weight"], "sdxl"),
        (["unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight"], "sdxl"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1.weight", "lora_unet_middle_block_1_proj_in.weight"], "sdxl"),
        (["lora_unet_double_blocks_3_img_attn_qkv.weight"], "flux"),
        (["lora_unet_double_blocks_19_img_attn_qkv.weight"], "mmdit"),
        (["transformer.single_transformer_blocks.3.attn.to_q.weight"], "flux"),
        (["transformer.single_transformer_blocks.3.attn.to_qkv_mlp_proj.weight"], "mmdit"),
        (["transformer.transformer_blocks.3.attn.to_q.weight"], ""),
        (["model.layers.0.mlp.up_proj.weight"], ""),
    ],
)
def test_layouts_of_adapters_that_show_a_part(names: list[str], layout: str) -> None:
    assert Stacks.from_names(names, complete=False).layout == layout


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("double_blocks.0.img_attn.qkv.weight", ["attn q self_attn", "attn k self_attn", "attn self_attn v"]),
        ("single_blocks.0.linear2.weight", ["attn out self_attn", "mlp"]),
        ("single_transformer_blocks.0.proj_mlp.weight", ["mlp"]),
        ("transformer_blocks.0.norm1.linear.weight", ["mod"]),
        ("transformer_blocks.0.attn.norm_q.weight", ["attn norm self_attn"]),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.weight", ["attn cross_attn k"]),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.weight", [""]),
        ("model.layers.0.self_attn.o_proj.weight", ["attn out self_attn"]),
        ("model.layers.0.mlp.gate_proj.bias", ["bias mlp"]),
        ("transformer.h.0.attn.c_attn.weight", ["attn q self_attn", "attn k self_attn", "attn self_attn v"]),
        ("encoder.layer.0.output.dense.weight", ["mlp"]),
        ("blocks.0.cross_attn.k_img.weight", ["attn cross_attn k"]),
        ("decoder.block.0.layer.1.EncDecAttention.o.weight", ["attn cross_attn out"]),
        ("model.norm.weight", ["norm"]),
        ("model.embed_tokens.weight", [""]),
    ],
)
def test_elements(name: str, parts: list[str]) -> None:
    assert [" ".join(sorted(part)) for part in find_parts(name)] == parts
