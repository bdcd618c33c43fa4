"""One module under two names: brought to one name with a base and without, or refused where neither file tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import InputError
from merging.hub.open_model import open_model
from merging.plan.names.targets import adapter_targets
from merging.sources import Adapter
from merging.sources.changes import Change
from support.denoisers import Shape, applied_by_diffusers, build_denoiser, write_lora

Name = Callable[[str, str], str]


def dotted(prefix: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> Name:
    leaves = {"down": down, "up": up, "alpha": "alpha"}
    return lambda module, part: f"{prefix}{module}.{leaves[part]}"


def flat(prefix: str) -> Name:
    named = dotted("", "lora_down.weight", "lora_up.weight")
    return lambda module, part: prefix + named(module.replace(".", "_"), part)


UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PUBLISHED = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.7.self_attn.q_proj"
SAME: dict[str, tuple[tuple[Name, str], tuple[Name, str]]] = {
    "U-Net": ((flat("lora_unet_"), PUBLISHED), (flat("lora_unet_"), UNET)),
    "U-Net, resnets": (
        (flat("lora_unet_"), "output_blocks.2.0.in_layers.2"), (flat("lora_unet_"), "up_blocks.0.resnets.2.conv1")
    ),
    "U-Net, with dots": ((flat("lora_unet_"), PUBLISHED), (dotted("unet."), UNET)),
    "Wan Fun": ((flat("lora_unet__"), "blocks.0.ffn.0"), (flat("lora_unet_"), "blocks.0.ffn.0")),
    "SimpleTuner, wrapped": (
        (dotted("transformer.base_model.model."), "transformer_blocks.0.attn.to_q"),
        (dotted("transformer."), "transformer_blocks.0.attn.to_q"),
    ),
    "raw PEFT": (
        (dotted("base_model.model."), "transformer_blocks.0.attn.to_q"),
        (dotted("transformer."), "transformer_blocks.0.attn.to_q"),
    ),
    "ComfyUI": ((dotted("diffusion_model."), "layers.0.attention.to_q"), (dotted(""), "layers.0.attention.to_q")),
    "PEFT's default": (
        (dotted("", "lora_A.default.weight", "lora_B.default.weight"), "blocks.0.self_attn.q"),
        (dotted("diffusion_model."), "blocks.0.self_attn.q"),
    ),
    "LyCORIS": ((flat("lycoris_"), "layers.0.attn.to_q"), (flat("lora_unet_"), "layers.0.attn.to_q")),
    "Tencent": (
        (flat("Hunyuan_video_I2V_lora_"), "double_blocks.0.img_mlp.fc1"),
        (dotted("diffusion_model."), "double_blocks.0.img_mlp.0"),
    ),
    "Tencent, modulation": (
        (dotted("transformer."), "single_blocks.0.modulation.linear"),
        (dotted("diffusion_model."), "single_blocks.0.modulation.lin"),
    ),
    "Wan, native": (
        (dotted("diffusion_model."), "blocks.0.cross_attn.o"), (dotted("transformer."), "blocks.0.attn2.to_out.0")
    ),
    "Flux.2": (
        (dotted("diffusion_model."), "single_blocks.3.linear1"),
        (dotted("transformer."), "single_transformer_blocks.3.attn.to_qkv_mlp_proj"),
    ),
    "Lumina 2": (
        (dotted("diffusion_model."), "layers.1.feed_forward.w1"),
        (dotted("transformer."), "layers.1.feed_forward.linear_1"),
    ),
    "text encoder": ((flat("lora_te1_"), TEXT), (dotted("text_encoder."), TEXT.removeprefix("text_model."))),
    "second text encoder": ((flat("lora_te2_"), TEXT), (dotted("text_encoders.clip_g.transformer."), TEXT)),
}  # fmt: skip


def targets(*files: Path) -> dict[str, tuple[Change | None, ...]]:
    """What a merge of some files changes, by the names that it has for it."""
    return adapter_targets([model for file in files if isinstance(model := open_model(file), Adapter)], None).changes


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", SAME)
def test_one_module(tmp_path: Path, case: str, turned: bool) -> None:
    """Two names of one module are one target, under the first file's name."""
    pair = SAME[case][::-1] if turned else SAME[case]
    files = []
    for number, (name, module) in enumerate(pair):
        path = write_lora(tmp_path / f"{number}.safetensors", {module: (16, 16)}, name, seed=number)
        files.append(path)
    together = targets(*files)
    assert together.keys() == targets(files[0]).keys()
    ((first, second),) = together.values()
    assert first and second


FUSED: dict[str, tuple[tuple[Name, str], tuple[Name, str]]] = {
    "Flux": (
        (flat("lora_unet_"), "double_blocks.0.img_attn.qkv"), (dotted("transformer."), "transformer_blocks.0.attn.to_k")
    ),
    "SD3": (
        (flat("lora_unet_"), "joint_blocks.1.x_block.attn.qkv"),
        (flat("lora_transformer_"), "transformer_blocks.1.attn.to_q"),
    ),
    "Z-Image": (
        (dotted("diffusion_model."), "layers.0.attention.qkv"), (dotted("diffusion_model."), "layers.0.attention.to_v")
    ),
    "HunyuanVideo": (
        (dotted("transformer."), "double_blocks.0.txt_attn_qkv"),
        (dotted("transformer."), "transformer_blocks.0.attn.add_q_proj"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", FUSED)
def test_fused_beside_apart(tmp_path: Path, case: str, turned: bool) -> None:
    pair = FUSED[case][::-1] if turned else FUSED[case]
    files = [
        write_lora(tmp_path / f"{number}.safetensors", {module: (48, 16)}, name)
        for number, (name, module) in enumerate(pair)
    ]
    with pytest.raises(InputError, match=r"is a part of the other, or has its rows in another order.*base="):
        targets(*files)


@pytest.mark.parametrize("prefixes", [("transformer.", "transformer_2."), ("text_encoder.", "text_encoder_2.")])
def test_two_components_stay_two(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    """Two denoisers and two text encoders have modules of the same names."""
    files = []
    for number, prefix in enumerate(prefixes):
        shared = write_lora(tmp_path / "shared.safetensors", {"layers.0.to_q": (16, 16)}, dotted("unet."))
        own = write_lora(tmp_path / "own.safetensors", {"layers.0.to_q": (16, 16)}, dotted(prefix))
        save_file({**load_file(shared), **load_file(own)}, tmp_path / f"{number}.safetensors")
        files.append(tmp_path / f"{number}.safetensors")
    assert len(targets(*files)) == len({"unet", *prefixes})


def test_one_file_with_two_names(tmp_path: Path) -> None:
    one = load_file(write_lora(tmp_path / "a.safetensors", {PUBLISHED: (16, 16)}, flat("lora_unet_")))
    two = load_file(write_lora(tmp_path / "b.safetensors", {UNET: (16, 16)}, flat("lora_unet_")))
    save_file({**one, **two}, tmp_path / "c.safetensors")
    with pytest.raises(
        InputError, match=r"down_blocks_1_attentions_0.*input_blocks_4_1.*are one module under two names"
    ):
        targets(tmp_path / "b.safetensors", tmp_path / "c.safetensors")


def test_the_sum_is_that_of_one_module(tmp_path: Path) -> None:
    """Two trainers' names of a U-Net's module: their changes are added up."""
    one = write_lora(tmp_path / "a.safetensors", {PUBLISHED: (16, 16)}, flat("lora_unet_"), seed=1, alpha=1)
    two = write_lora(tmp_path / "b.safetensors", {UNET: (16, 16)}, flat("lora_unet_"), seed=2, alpha=3)
    merging.merge([one, two], method="task_arithmetic", weights=(0.5, 2.0), output=tmp_path / "out.safetensors")
    module = "lora_unet_" + PUBLISHED.replace(".", "_")
    got, first, second = (load_file(path) for path in (tmp_path / "out.safetensors", one, two))
    assert {name.partition(".")[0] for name in got} == {module}

    def product(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        down, alpha = state[f"{name}.lora_down.weight"], state[f"{name}.alpha"]
        return alpha / len(down) * state[f"{name}.lora_up.weight"] @ down

    other = "lora_unet_" + UNET.replace(".", "_")
    torch.testing.assert_close(product(got, module), 0.5 * product(first, module) + 2 * product(second, other))


# ---- with a base


WAN: dict[str, Shape] = {
    "blocks.0.self_attn.q": (16, 16),
    "blocks.0.cross_attn.o": (16, 16),
    "blocks.1.cross_attn.k": (16, 16),
    "blocks.1.ffn.0": (24, 16),
    "blocks.1.ffn.2": (16, 24),
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    build_denoiser("wan").save_pretrained(folder)  # type: ignore[operator]
    return folder


NAMES: dict[str, tuple[Name, float | None]] = {
    "ComfyUI": (dotted("diffusion_model."), None),
    "lightx2v": (dotted("diffusion_model.", "lora_down.weight", "lora_up.weight"), 1),
    "musubi-tuner": (flat("lora_unet_"), 1),
    "DiffSynth": (dotted("", "lora_A.default.weight", "lora_B.default.weight"), None),
}


@pytest.mark.parametrize("layout", NAMES)
def test_native_names_on_a_base_of_diffusers(wan: Path, tmp_path: Path, layout: str) -> None:
    name, alpha = NAMES[layout]
    lora = write_lora(tmp_path / "a.safetensors", WAN, name, alpha=alpha)
    merging.merge([lora], method="task_arithmetic", base=wan, kind="model", output=tmp_path / "out")
    got = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    comfy = write_lora(tmp_path / "comfy.safetensors", WAN, dotted("diffusion_model."))
    wanted, before = applied_by_diffusers("wan", comfy), build_denoiser("wan").state_dict()
    scale = 1 if alpha is None else alpha / 2
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], before[key] + scale * (value - before[key]), atol=2e-6, rtol=1e-5)
    assert sum(not torch.equal(got[key], before[key]) for key in before) == len(WAN)


def test_changes_in_full_on_a_base_of_diffusers(wan: Path, tmp_path: Path) -> None:
    """Norms, biases and modulations, which diffusers calls otherwise."""
    state = {
        "diffusion_model.blocks.0.diff_m": torch.full((1, 6, 16), 2.0),
        "diffusion_model.head.diff_m": torch.full((1, 2, 16), 3.0),
        "diffusion_model.blocks.1.norm3.diff": torch.full((16,), 4.0),
        "diffusion_model.blocks.1.self_attn.q.diff_b": torch.full((16,), 5.0),
        "diffusion_model.patch_embedding.diff_b": torch.full((16,), 6.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    files = [tmp_path / "a.safetensors"]
    merging.merge(files, method="task_arithmetic", base=wan, kind="model", output=tmp_path / "out")
    got, before = (
        load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"),
        build_denoiser("wan").state_dict(),
    )
    wanted = {
        "blocks.0.scale_shift_table": 2.0,
        "scale_shift_table": 3.0,
        "blocks.1.norm2.weight": 4.0,
        "blocks.1.attn1.to_q.bias": 5.0,
        "patch_embedding.bias": 6.0,
    }
    for key, value in before.items():
        torch.testing.assert_close(got[key], value + wanted.get(key, 0.0))


def test_the_second_of_two_denoisers(wan: Path, tmp_path: Path) -> None:
    """A file for Wan 2.2's second transformer fits that transformer's own folder."""
    modules = {"blocks.0.attn1.to_q": (16, 16)}
    lora = write_lora(tmp_path / "a.safetensors", modules, dotted("transformer_2."))
    merging.merge([lora], method="task_arithmetic", base=wan, kind="model", output=tmp_path / "out")
    got, before = (
        load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"),
        build_denoiser("wan").state_dict(),
    )
    assert [key for key in before if not torch.equal(got[key], before[key])] == ["blocks.0.attn1.to_q.weight"]


def test_wrapped_names_on_a_base(wan: Path, tmp_path: Path) -> None:
    modules = {"blocks.0.attn1.to_q": (16, 16)}
    outs = []
    for number, prefix in enumerate(("transformer.", "transformer.base_model.model.", "base_model.model.")):
        lora = write_lora(tmp_path / f"{number}.safetensors", modules, dotted(prefix))
        out = tmp_path / f"out{number}"
        merging.merge([lora], method="task_arithmetic", base=wan, kind="model", output=out)
        outs.append(load_file(out / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(outs[0][key], other[key]) for other in outs[1:] for key in outs[0])


def test_a_name_that_is_not_there(wan: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "a.safetensors", {**WAN, "blocks.7.self_attn.q": (16, 16)}, dotted("diffusion_model."))
    with pytest.raises(
        InputError, match=re.escape("diffusion_model.blocks.7.self_attn.q.weight is not a tensor of the base")
    ):
        merging.merge([lora], method="task_arithmetic", base=wan, kind="model", output=tmp_path / "out")
