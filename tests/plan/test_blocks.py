"""Weights by block for LoRAs: merged, resized and baked, and the blocks that ``merge inspect`` lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.api.inspect import inspect
from support.commands import ok, refused

SD1 = {
    "BASE": "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "IN01": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "IN05": "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_ff_net_2",
    "M00": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
    "OUT03": "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v",
    "OUT11": "lora_unet_up_blocks_3_attentions_2_proj_out",
}
SDXL = {
    "BASE": "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    "IN04": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "M00": "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k",
    "OUT00": "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_v",
    "OUT05": "lora_unet_output_blocks_5_1_proj_out",
}
FLUX = {
    "D00": "lora_unet_double_blocks_0_img_attn_qkv",
    "D05": "lora_unet_double_blocks_5_txt_mlp_0",
    "S30": "lora_unet_single_blocks_30_linear2",
    "CLIP": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
}
MODULES = {"sd1": SD1, "sdxl": SDXL, "flux": FLUX}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRAs of three models, two of each, as Kohya's files in the working folder."""
    monkeypatch.chdir(tmp_path)
    drawn = torch.Generator().manual_seed(0)
    for model, modules in MODULES.items():
        for number in "12":
            tensors: dict[str, Tensor] = {}
            for name in modules.values():
                tensors[f"{name}.lora_down.weight"] = torch.randn(2, 6, generator=drawn)
                tensors[f"{name}.lora_up.weight"] = torch.randn(6, 2, generator=drawn)
                tensors[f"{name}.alpha"] = torch.tensor(1.0)
            save_file(tensors, f"{model}-{number}.safetensors")


def changes(path: str) -> dict[str, Tensor]:
    """Return the change of each module of a LoRA."""
    tensors = load_file(path)
    found = {}
    for name in {key.partition(".")[0] for key in tensors}:
        down, up = (tensors[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
        found[name] = up @ down * tensors[f"{name}.alpha"] / len(down)
    return found


def scales(path: str, model: str, number: str = "1") -> dict[str, float]:
    """Return what the change of each block was multiplied by; a module that is not there was multiplied by 0."""
    got, before = changes(path), changes(f"{model}-{number}.safetensors")
    found = {}
    for block, name in MODULES[model].items():
        ratio = got[name] / before[name] if name in got else torch.zeros(1)
        assert ratio.max() - ratio.min() < 1e-3
        found[block] = round(float(ratio.mean()), 4)
    return found


def counting(count: int) -> str:
    """Return this many numbers, each a sixteenth larger than the one before it."""
    return ",".join(str(number / 16) for number in range(count))


@pytest.mark.parametrize(
    ("model", "blocks", "wanted"),
    [
        ("sd1", counting(17), {"BASE": 0, "IN01": 1, "IN05": 4, "M00": 7, "OUT03": 8, "OUT11": 16}),
        ("sd1", counting(26), {"BASE": 0, "IN01": 2, "IN05": 6, "M00": 13, "OUT03": 17, "OUT11": 25}),
        ("sd1", counting(25), {"BASE": 0, "IN01": 1, "IN05": 5, "M00": 12, "OUT03": 16, "OUT11": 24}),
        ("sd1", "MIDD", {"BASE": 16, "IN01": 0, "IN05": 16, "M00": 16, "OUT03": 16, "OUT11": 0}),
        ("sdxl", counting(12), {"BASE": 0, "IN04": 1, "M00": 5, "OUT00": 6, "OUT05": 11}),
        ("sdxl", counting(20), {"BASE": 0, "IN04": 5, "M00": 10, "OUT00": 11, "OUT05": 16}),
        ("sdxl", counting(26), {"BASE": 0, "IN04": 5, "M00": 13, "OUT00": 14, "OUT05": 19}),
        ("sdxl", "OUTALL", {"BASE": 16, "IN04": 0, "M00": 0, "OUT00": 16, "OUT05": 16}),
        ("flux", counting(57), {"D00": 0, "D05": 5, "S30": 49, "CLIP": 0}),
        ("flux", counting(58), {"D00": 1, "D05": 6, "S30": 50, "CLIP": 0}),
        ("flux", counting(61), {"D00": 3, "D05": 8, "S30": 52, "CLIP": 0}),
        ("flux", "double_blocks.0-5:0.5,S:2", {"D00": 8, "D05": 8, "S30": 32, "CLIP": 16}),
    ],
)  # fmt: skip
def test_resized_blocks(model: str, blocks: str, wanted: dict[str, int]) -> None:
    """Each module is multiplied by the number of its block, and left out where it is 0."""
    ok("resize", f"{model}-1.safetensors", "--blocks", blocks, "-o", "out.safetensors")
    assert scales("out.safetensors", model) == {block: number / 16 for block, number in wanted.items()}


def test_merged_blocks_of_each_lora() -> None:
    """Two LoRAs, each with its weights: their sum has the first in some blocks, the second in others."""
    ok("-m", "task_arithmetic", "sd1-1.safetensors", "sd1-2.safetensors", "--blocks", "NONE,IN:1,M00:0.5", "--blocks",
       "ALL,IN:0,M00:0.5", "-o", "out.safetensors")  # fmt: skip
    got, first, second = (changes(f"{name}.safetensors") for name in ("out", "sd1-1", "sd1-2"))
    for block, name in SD1.items():
        wanted = {"IN01": first[name], "IN05": first[name], "M00": (first[name] + second[name]) / 2}
        torch.testing.assert_close(got[name], wanted.get(block, second[name]))
    plain = merging.merge(["sd1-1.safetensors", "sd1-2.safetensors"], method="ties", rank=4, output="plain.safetensors")
    ones = merging.merge(
        ["sd1-1.safetensors", "sd1-2.safetensors"], method="ties", rank=4, blocks="ALL", output="ones.safetensors"
    )
    assert plain.rank == ones.rank
    assert all(
        torch.equal(value, load_file("ones.safetensors")[name])
        for name, value in load_file("plain.safetensors").items()
    )


def test_baked_blocks() -> None:
    """Into a checkpoint with published names, whose blocks have the numbers of the LoRA's."""
    base = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
        **{f"model.diffusion_model.{name}.weight": torch.zeros(6, 6) for name in (
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "output_blocks.3.1.transformer_blocks.0.attn1.to_v"
        )},
    }  # fmt: skip
    save_file(base, "base.safetensors")
    kept = {k: v for k, v in load_file("sd1-1.safetensors").items() if k.startswith((SD1["IN01"], SD1["OUT03"]))}
    save_file(kept, "lora.safetensors")
    ok(
        "bake",
        "lora.safetensors",
        "--base",
        "base.safetensors",
        "--blocks",
        "IN01:0.5,OUT03:0",
        "-o",
        "out.safetensors",
    )
    got, change = load_file("out.safetensors"), changes("lora.safetensors")
    one, other = [name for name in base if "attn1" in name]
    torch.testing.assert_close(got[one], change[SD1["IN01"]] / 2)
    assert not got[other].any()


@pytest.mark.parametrize(
    ("model", "words", "error"),
    [
        ("sdxl", ("--blocks", "INS"), "the preset INS is for Stable Diffusion 1 and 2: this model takes NONE, ALL, "),
        ("sdxl", ("--blocks", "1,1,1"), "SDXL takes 12 numbers (BASE, IN04-IN05, IN07-IN08, M00, OUT00-OUT05), 20 "),
        (
            "flux",
            ("--blocks", ",".join("1" * 26)),
            "26 numbers by block do not fit this model: Flux.1 takes 57 numbers",
        ),
        ("flux", ("--blocks", "IN04:1"), "'IN04' names no block"),
        ("flux", ("--blocks", "double_block.3:1"), "'double_block.3' names no block"),
        ("flux", ("--elements", "q:0.5"), "holds attn, k, q, v in one tensor, and these have different values"),
        ("sd1", ("--blocks", "NONE"), "the weights of all blocks are 0, so that no change is left to write"),
        ("sd1", ("--blocks", ""), "'' is neither a number nor a preset"),
    ],
)
def test_refused(model: str, words: tuple[str, ...], error: str) -> None:
    message = refused("resize", f"{model}-1.safetensors", *words, "-o", "out.safetensors")
    assert error in " ".join(message.split())
    assert not Path("out.safetensors").exists()


def test_a_lora_that_shows_no_architecture_takes_names_alone() -> None:
    kept = {name: value for name, value in load_file("sd1-1.safetensors").items() if name.startswith(SD1["M00"])}
    save_file(kept, "middle.safetensors")
    message = refused("resize", "middle.safetensors", "--blocks", ",".join("1" * 17), "-o", "out.safetensors")
    assert "give the base, or name blocks, as in IN08:0.5" in " ".join(message.split())
    ok("resize", "middle.safetensors", "--blocks", "MID:0.5", "-o", "out.safetensors")


def test_inspect_lists_blocks() -> None:
    shown = ok("inspect", "--blocks", "sdxl-1.safetensors").output
    assert "IN04" in shown
    assert "12 numbers of SDXL: BASE, IN04-IN05, IN07-IN08, M00, OUT00-OUT05" in shown
    (facts,) = json.loads(ok("inspect", "--blocks", "--json", "flux-1.safetensors").output)
    assert [block["name"] for block in facts["by_block"]["blocks"]] == ["CLIP", "D00", "D05", "S30"]
    assert facts["by_block"]["blocks"][3]["elements"] == {"attn": 1, "mlp": 1, "out": 1, "self_attn": 1}
    assert list(facts["by_block"]["lists"]) == ["57", "58", "61"]
    assert "by_block" not in inspect("flux-1.safetensors")
