"""Flat names of LoRA files carry their block: what goes by depth reads it, or refuses where no name tells any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merging
from merging.errors import OptionError
from merging.maths.delta import Dense
from merging.maths.layers import Stacks
from support.denoisers import write_lora

BLOCKS = 4
MODULES: dict[str, list[str]] = {
    "Wan": [f"blocks.{n}.{part}" for n in range(BLOCKS) for part in ("self_attn.q", "ffn.0")] + ["head.head"],
    "Flux": [
        *(f"double_blocks.{n}.img_attn.qkv" for n in range(2)),
        *(f"single_blocks.{n}.linear1" for n in range(3)),
        "img_in", "time_in.in_layer", "final_layer.linear",
    ],
    "Flux of diffusers": [
        *(f"transformer_blocks.{n}.attn.to_out.0" for n in range(2)),
        *(f"single_transformer_blocks.{n}.attn.to_q" for n in range(3)),
        "time_text_embed.timestep_embedder.linear_1", "proj_out",
    ],
    "U-Net of diffusers": [
        *(f"down_blocks.{n}.attentions.{m}.transformer_blocks.0.attn1.to_q" for n in range(3) for m in range(2)),
        "mid_block.attentions.0.proj_in", "mid_block.resnets.1.conv1", "up_blocks.1.resnets.2.conv1", "conv_in",
    ],
    "U-Net": [
        *(f"input_blocks.{n}.{m}.{part}" for n in (4, 5, 7) for m, part in ((0, "in_layers.2"), (1, "proj_in"))),
        "middle_block.1.transformer_blocks.3.ff.net.0.proj", "output_blocks.2.2.conv", "time_embed.2", "label_emb.0.0",
    ],
    "HiDream": [f"double_stream_blocks.{n}.block.ff_i.experts.{e}.w1" for n in range(3) for e in range(2)],
    "Z-Image": [f"layers.{n}.attention.to_q" for n in (0, 29)] + ["noise_refiner.1.feed_forward.w1", "x_embedder"],
}  # fmt: skip
TEXT = {
    "CLIP": [f"text_model.encoder.layers.{n}.self_attn.q_proj" for n in (0, 7, 11)],
    "T5": [
        f"encoder.block.{n}.layer.{m}.{part}" for n in range(3) for m, part in ((0, "SelfAttention.q"), (1, "wi_0"))
    ],
}
PREFIXES = {"lora_unet_": MODULES, "lora_unet__": MODULES, "lycoris_": MODULES, "lora_te_": TEXT, "lora_te2_": TEXT}
CASES = [(prefix, kind) for prefix, kinds in PREFIXES.items() for kind in kinds]


@pytest.mark.parametrize(("prefix", "kind"), CASES)
def test_flat_names_have_the_depth_of_dotted_ones(prefix: str, kind: str) -> None:
    names = PREFIXES[prefix][kind]
    dotted = [f"{name}.weight" for name in names]
    flat = [f"{prefix}{name.replace('.', '_')}.weight" for name in names]
    theirs, ours = (Stacks.from_names(each, complete=False) for each in (dotted, flat))
    for one, other in zip(dotted, flat, strict=True):
        wanted, got = theirs.position(one), ours.position(other)
        assert (got.layer, got.layers, got.after) == (wanted.layer, wanted.layers, wanted.after), other
    assert any(theirs.position(name).layer for name in dotted)


def test_both_stacks_of_flux_count_on() -> None:
    names = [f"lora_unet_{name.replace('.', '_')}.weight" for name in MODULES["Flux"][:5]]
    stacks = Stacks.from_names(names, complete=False)
    assert [stacks.position(name).layer for name in names] == [0, 1, 2, 3, 4]


WAN = {f"blocks.{n}.self_attn.q": (8, 8) for n in range(BLOCKS)}
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}


def flat(module: str, part: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}.{KOHYA[part]}"


def norms(tmp_path: Path, **options: Any) -> list[float]:
    """How much each block of the merge of two files changes, in units of their sum."""
    files = [write_lora(tmp_path / f"{s}.safetensors", WAN, flat, seed=s, alpha=2) for s in (1, 2)]  # scale 1
    merging.merge(files, output=tmp_path / "out.safetensors", **options)
    states = [load_file(path) for path in (*files, tmp_path / "out.safetensors")]
    ratios = []
    for module in WAN:
        one, two, merged = (state[flat(module, "up")] @ state[flat(module, "down")] for state in states)
        ratios.append(float(merged.norm() / (one + two).norm()))
        torch.testing.assert_close(merged, ratios[-1] * (one + two), atol=1e-5, rtol=1e-4)
    return ratios


def test_a_gradient_on_flat_names(tmp_path: Path) -> None:
    ratios = norms(tmp_path, method="task_arithmetic", scale="1:3")
    assert ratios == pytest.approx([1 + 2 * n / (BLOCKS - 1) for n in range(BLOCKS)], rel=1e-4)


def test_lines_on_flat_names(tmp_path: Path) -> None:
    """LiNeS around the sum of two: 1/2 + beta * depth, beta being 0.5."""
    ratios = norms(tmp_path, method="lines+task_arithmetic")
    assert ratios == pytest.approx([0.5 + 0.5 * n / (BLOCKS - 1) for n in range(BLOCKS)], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "needy"),
    [
        ({"method": "lines+task_arithmetic"}, "lines"),
        ({"method": "task_arithmetic", "scale": "1:3"}, "task_arithmetic.scale"),
        ({"method": "task_arithmetic", "scale": {"img_in": 1.0, "*": "1:3"}}, "task_arithmetic.scale"),
        ({"method": "ties", "density": "0.2:0.8", "scope": "tensor"}, "ties.density"),
    ],
)
def test_without_any_depth(tmp_path: Path, options: dict[str, Any], needy: str) -> None:
    modules = {"img_in": (8, 8), "txt_in": (8, 8)}
    files = [write_lora(tmp_path / f"{s}.safetensors", modules, flat, seed=s, alpha=2) for s in (1, 2)]
    with pytest.raises(OptionError, match=rf"^{needy} goes by the depth of each tensor.*lora_unet_img_in.*base="):
        merging.merge(files, output=tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_values_by_name_need_no_depth(tmp_path: Path) -> None:
    modules = {"img_in": (8, 8), "txt_in": (8, 8)}
    files = [write_lora(tmp_path / f"{s}.safetensors", modules, flat, seed=s, alpha=2) for s in (1, 2)]
    scale = {"img_in": 2.0, "*": 1.0}
    merging.merge(files, method="task_arithmetic", scale=scale, output=tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").exists()


def test_tensors_without_any_depth() -> None:
    with pytest.raises(OptionError, match=r"^lines goes by the depth of each tensor.*leave it out"):
        merging.merge_deltas([{"a.weight": Dense(torch.ones(2, 2))}] * 2, method="lines+task_arithmetic")
