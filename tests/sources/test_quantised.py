"""Quantised checkpoints: the simple kinds dequantised while they are read, held against transformers' own code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import merging
from merging.api.inspect import inspect
from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.sources.checkpoint import Checkpoint
from support.paths import TESTS
from support.tiny import CONFIG, identical, load, model, save

FP8 = torch.float8_e4m3fn
NAME = "model.layers.0.mlp.up_proj.weight"


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path) -> Checkpoint:
    found = open_model(folder, dequantize=True)
    assert isinstance(found, Checkpoint)
    return found


def quantised_folder(folder: Path, tensors: dict[str, Tensor], stated: dict[str, Any] | None, **config: Any) -> Path:
    """A small model with more tensors, as its quantised ones."""
    rest = {name: value.bfloat16() for name, value in model(1).items() if name != NAME}
    settings = CONFIG | config | ({} if stated is None else {"quantization_config": stated})
    return save(folder, rest | tensors, settings)


def fp8_codes(seed: int, *shape: int) -> Tensor:
    return (random(seed, *shape) * 100).to(FP8)


def scales(seed: int, *shape: int) -> Tensor:
    return random(seed, *shape).abs() * 0.01 + 0.001


def in_pieces(stored: Any, sizes: tuple[int, ...] = (1, 7, 64, 1000)) -> Tensor:
    """A stored tensor, read from front to back by pieces of changing sizes."""
    whole, position, turn = torch.empty(stored.numel, dtype=stored.dtype), 0, 0
    while position < stored.numel:
        size = min(sizes[turn % len(sizes)], stored.numel - position)
        stored.read_into(whole[position : position + size], position)
        position, turn = position + size, turn + 1
    return whole.view(stored.shape)


# ---- numbers


@pytest.mark.parametrize("exponents", [False, True], ids=["float32", "exponents"])
@pytest.mark.parametrize("shape", [(256, 384), (200, 150), (130, 64), (3, 256, 128)])
def test_fp8_blocks_are_what_transformers_makes_of_them(
    tmp_path: Path, shape: tuple[int, ...], exponents: bool
) -> None:
    """Bit for bit, also where the last blocks are cut, and for experts side by side."""
    codes = fp8_codes(1, *shape)
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale = scales(2, *grid)
    if exponents:
        scale = (torch.randint(100, 140, grid, dtype=torch.uint8)).view(torch.float8_e8m0fnu)
    folder = quantised_folder(
        tmp_path / "m",
        {NAME: codes, NAME + "_scale_inv": scale},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    blocks = scale.float().repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]
    want = (codes.float() * blocks).bfloat16()
    if hasattr(finegrained_fp8, "_dequantize_fp8_weight"):  # not in the first versions of transformers 5
        theirs = finegrained_fp8._dequantize_fp8_weight(codes, scale.float(), [128, 128], torch.float32)
        assert torch.equal(want, theirs.bfloat16())
        if shape[-2] % 128 == shape[-1] % 128 == 0:
            own_op = finegrained_fp8.Fp8Dequantize(None)
            assert torch.equal(want, own_op._dequantize_one(codes, scale, torch.bfloat16))
    stored = opened(folder).tensors[NAME]
    assert (stored.dtype_name, stored.shape) == ("BF16", shape)
    assert torch.equal(stored.read(), want)
    assert torch.equal(in_pieces(stored), want)
    assert NAME + "_scale_inv" not in opened(folder).tensors


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("grid", [(), (1,), (24, 1), (24,), (1, 40)])
def test_scales_for_all_a_row_or_a_column(tmp_path: Path, dtype: torch.dtype, grid: tuple[int, ...]) -> None:
    codes = (random(1, 24, 40) * 50).to(dtype)
    scale = scales(2, *grid).bfloat16()
    beside = {"model.layers.0.mlp.up_proj.input_scale": torch.tensor(1.5)}
    stated = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    folder = quantised_folder(tmp_path / "m", {NAME: codes, NAME + "_scale": scale, **beside}, stated)
    per_row = scale[:, None] if grid == (24,) else scale
    want = (codes.double() * per_row.double()).to(torch.bfloat16)
    found = opened(folder)
    assert torch.equal(found.tensors[NAME].read(), want)
    assert torch.equal(in_pieces(found.tensors[NAME]), want)
    assert found.tensors.keys() == model(1).keys()


def test_bitsandbytes_8_bit(tmp_path: Path) -> None:
    """By its own formula, in the type that the config states."""
    codes = torch.randint(-127, 128, (24, 40), dtype=torch.int8)
    absmax = scales(2, 24) * 100
    tensors = {NAME: codes, NAME.replace("weight", "SCB"): absmax}
    tensors[NAME.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found = opened(quantised_folder(tmp_path / "m", tensors, stated, torch_dtype="float16"))
    want = (codes.double() * absmax.double()[:, None] / 127).half()
    assert torch.equal(found.tensors[NAME].read(), want)
    assert found.tensors.keys() == model(1).keys()


RECORDED = load_file(TESTS / "golden" / "bitsandbytes.safetensors")
"""Weights that bitsandbytes 0.50.2 quantised on a CPU, and its own dequantised numbers."""

FOUR_BIT = sorted({name.partition("/")[0] for name in RECORDED} - {"int8"})


def four_bit(case: str) -> dict[str, Tensor]:
    """The tensors of a weight, as transformers saves them."""
    return {
        NAME + name.removeprefix(f"{case}/weight"): value
        for name, value in RECORDED.items()
        if name.startswith(f"{case}/weight")
    }


@pytest.mark.parametrize("case", FOUR_BIT)
def test_bitsandbytes_4_bit_is_what_bitsandbytes_makes_of_it(tmp_path: Path, case: str) -> None:
    """Bit for bit, NF4 and FP4, scales in float32 and quantised twice, stored as bytes and as bfloat16."""
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = opened(quantised_folder(tmp_path / "m", four_bit(case), stated))
    stored, want = found.tensors[NAME], RECORDED[f"{case}/wanted"]
    assert stored.dtype == want.dtype
    assert torch.equal(stored.read(), want)
    assert torch.equal(in_pieces(stored), want)
    stored.advise(0, stored.numel)
    assert found.tensors.keys() == model(1).keys()


def test_bitsandbytes_8_bit_is_what_bitsandbytes_makes_of_it(tmp_path: Path) -> None:
    tensors = {NAME: RECORDED["int8/weight"], NAME.replace("weight", "SCB"): RECORDED["int8/SCB"]}
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    got = opened(quantised_folder(tmp_path / "m", tensors, stated, torch_dtype="float32")).tensors[NAME].read()
    assert torch.equal(got, RECORDED["int8/wanted"])


BROKEN: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "absmax": lambda parts: parts.pop(NAME + ".absmax"),
    "nested_absmax": lambda parts: parts.pop(NAME + ".nested_absmax"),
    "quant_map": lambda parts: parts.update({NAME + ".quant_map": torch.ones(8)}),
    "codes": lambda parts: parts.update({NAME: torch.ones(7, 1, dtype=torch.uint8)}),
    "state": lambda parts: parts.update({STATE: torch.tensor(list(b'{"dtype": "int4"}'), dtype=torch.uint8)}),
}
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("part", BROKEN)
def test_four_bits_with_missing_or_foreign_parts(tmp_path: Path, part: str) -> None:
    tensors = four_bit("nf4.bfloat16.double.uint8")
    BROKEN[part](tensors)
    folder = quantised_folder(tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(FormatError, match=f"{NAME} is quantised by bitsandbytes, and its {part} is missing or does"):
        opened(folder)


@pytest.mark.parametrize("outputs", [24, 5])
def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path, outputs: int) -> None:
    blocks = torch.randint(0, 256, (3, outputs, 4, 16), dtype=torch.uint8)
    exponents = torch.randint(90, 150, (3, outputs, 4), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name + "_blocks": blocks, name + "_scales": exponents}
    stored = opened(quantised_folder(tmp_path / "m", tensors, {"quant_method": "mxfp4"})).tensors[name]
    want = convert_moe_packed_tensors(blocks, exponents)
    assert want.shape == stored.shape == (3, 128, outputs)
    assert torch.equal(stored.read(), want)
    assert torch.equal(in_pieces(stored), want)


# ---- merges


def mean(one: Tensor, other: Tensor) -> Tensor:
    return ((one.double() + other.double()) / 2).to(one.dtype)


def test_a_quantised_model_merges_with_an_ordinary_one(tmp_path: Path) -> None:
    codes, scale = fp8_codes(1, 16, 8), scales(2, 1, 1)
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    text = {"model_type": "llama", "quantization_config": stated}
    folder = quantised_folder(tmp_path / "q", {NAME: codes, NAME + "_scale_inv": scale}, stated, text_config=text)
    plain = {name: value.bfloat16() for name, value in model(2).items()}
    merged = merging.merge(
        [folder, save(tmp_path / "p", plain)], method="linear", dequantise=True, output=tmp_path / "out"
    )
    ours = {name: value.bfloat16() for name, value in model(1).items()}
    ours[NAME] = (codes.double() * scale.double()).bfloat16()
    assert identical(load(merged.path), {name: mean(ours[name], plain[name]) for name in ours})
    assert "quantization_config" not in (merged.path / "config.json").read_text()


def gpt_oss(folder: Path, seed: int) -> tuple[Path, Path]:
    """A tiny gpt-oss whose experts are MXFP4, and the same model as transformers dequantises it."""
    settings = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 2}
    torch.manual_seed(seed)
    made = GptOssForCausalLM(GptOssConfig(**settings, **heads, num_experts_per_tok=2)).bfloat16()
    made.save_pretrained(folder / "plain")
    tensors = load(folder / "plain")
    packed: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        packed[name + "_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        packed[name + "_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(packed[name + "_blocks"], packed[name + "_scales"])
    save_file(tensors, folder / "plain" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "plain" / "config.json").read_text())
    stored = {name: value for name, value in tensors.items() if name + "_blocks" not in packed} | packed
    return save(
        folder / "packed", stored, config | {"quantization_config": {"quant_method": "mxfp4"}}
    ), folder / "plain"


def test_gpt_oss_comes_out_as_an_ordinary_model(tmp_path: Path) -> None:
    """Two MXFP4 models merge to the bytes of their dequantised twins, and transformers loads them."""
    pairs = [gpt_oss(tmp_path / str(seed), seed) for seed in (1, 2)]
    merged = merging.merge([p for p, _ in pairs], method="linear", dequantise=True, output=tmp_path / "out")
    plain = merging.merge([p for _, p in pairs], method="linear", output=tmp_path / "plain")
    assert identical(load(merged.path), load(plain.path))
    _, report = AutoModelForCausalLM.from_pretrained(merged.path, output_loading_info=True)
    assert not any(report.values())


def test_reading_ahead_and_memory_are_told(tmp_path: Path) -> None:
    packed, _ = gpt_oss(tmp_path, 1)
    stored = opened(packed).tensors["model.layers.0.mlp.experts.down_proj"]
    stored.advise(0, stored.numel)
    assert stored.scratch == stored.numel // 2 // 2
    assert len(stored.made_of) == 2


# ---- refused


def stated_kind(**stated: Any) -> Callable[[Path], Path]:
    return lambda folder: quantised_folder(folder, {NAME: model(1)[NAME]}, stated)


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "vptq": (stated_kind(quant_method="vptq"), r"\(vptq, says its config\): .*merge the model it was made from"),
    "sparse": (stated_kind(quant_method="compressed-tensors", format="marlin-24"), "run_compressed=False"),
    "modelopt": (stated_kind(quant_method="modelopt", quant_algo="W4A8_AWQ"), "modelopt"),
    "mlx": (stated_kind(group_size=64, bits=4), "MLX.*mlx_lm"),
    "hqq": (stated_kind(quant_method="hqq"), "hqq"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_stay_refused(tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(FormatError, match=message):
        open_model(make(tmp_path / "m"), dequantize=True)


def test_the_message_names_the_flag_where_it_helps(tmp_path: Path) -> None:
    codes = {NAME: fp8_codes(1, 16, 8), NAME + "_scale_inv": scales(2, 1, 1)}
    for stated in ({"quant_method": "fp8"}, None):
        with pytest.raises(
            FormatError, match=r"use dequantize=True to merge it as ordinary numbers, or merge the model"
        ):
            open_model(quantised_folder(tmp_path / "m", codes, stated))
    for stated in ({"quant_method": "aqlm"}, {"quant_method": "hqq"}):
        with pytest.raises(FormatError) as refused:
            open_model(quantised_folder(tmp_path / "m", codes, stated))
        assert "dequantize=" not in str(refused.value)


@pytest.mark.parametrize("grid", [(3, 1), (16, 2, 1), (2, 2)])
def test_scales_of_another_shape(tmp_path: Path, grid: tuple[int, ...]) -> None:
    tensors = {NAME: fp8_codes(1, 16, 8), NAME + "_scale_inv": scales(2, *grid)}
    folder = quantised_folder(tmp_path / "m", tensors, {"quant_method": "fp8"})
    with pytest.raises(FormatError, match=re.escape(f"its scales {grid} in F32, which is none of the kinds")):
        open_model(folder, dequantize=True)


def test_zero_points_and_codes_without_scales(tmp_path: Path) -> None:
    for beside, message in (
        ({NAME + "_zero_point": torch.zeros(16, 1, dtype=torch.int8), NAME + "_scale": scales(2, 16, 1)}, "quantised"),
        ({}, r"holds I8 codes, so the model is quantised: dequantize=True does not understand"),
    ):
        tensors = {NAME: torch.zeros(16, 8, dtype=torch.int8), **beside}
        with pytest.raises(FormatError, match=message):
            open_model(quantised_folder(tmp_path / "m", tensors, None), dequantize=True)


def test_inspect_tells_what_would_be_dequantised(tmp_path: Path) -> None:
    packed, _ = gpt_oss(tmp_path, 1)
    facts = inspect(packed)
    assert (facts["dequantised"], facts["dtypes"]) == (4, {"BF16": facts["tensors"]})


# ---- ComfyUI's files, and FP8 without scales


def comfy(path: Path, seed: int, style: str, kind: torch.dtype = FP8, **more: Tensor) -> tuple[Path, Tensor]:
    """A diffusion model's file in one of ComfyUI's styles, and the numbers that its one FP8 layer stands for."""
    codes, scale, name = (random(seed, 24, 16) * 100).to(kind), scales(seed + 1, 1)[0], "model.diffusion_model.proj"
    tensors = {f"{name}.weight": codes, f"{name}.bias": random(seed + 2, 24).half()}
    if style == "markers":
        marker = json.dumps({"format": str(kind).removeprefix("torch."), "full_precision_matrix_mult": False}).encode()
        tensors |= {f"{name}.comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}
        tensors |= {f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(1.0)}
    elif style == "scaled_fp8":
        tensors |= {"model.diffusion_model.scaled_fp8": torch.zeros(2).to(kind)}
        tensors |= {f"{name}.scale_weight": scale, f"{name}.scale_input": torch.tensor(1.0)}
    save_file(tensors | more, path)
    factor = 1.0 if style == "none" else scale
    return path, codes.float() * factor


@pytest.mark.parametrize("kind", [FP8, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("style", ["markers", "scaled_fp8", "none"])
def test_fp8_of_diffusion_models_is_read_as_numbers_when_asked(tmp_path: Path, style: str, kind: torch.dtype) -> None:
    """Weights are codes times scale, whatever the scale is called; no marker is left that would have them cast."""
    one, first = comfy(tmp_path / "a.safetensors", 1, style, kind)
    two, second = comfy(tmp_path / "b.safetensors", 5, style, kind)
    with pytest.raises(FormatError, match="use dequantize=True to merge it as ordinary numbers"):
        open_model(one)
    out = tmp_path / "out.safetensors"
    merging.merge([one, two], method="linear", dequantize=True, dtype="float32", output=out)
    found = load(out)
    assert set(found) == {"model.diffusion_model.proj.weight", "model.diffusion_model.proj.bias"}
    # each file's numbers are those of bfloat16, the type of ordinary weights
    mean = (first.bfloat16().float() + second.bfloat16().float()) / 2
    assert torch.equal(found["model.diffusion_model.proj.weight"], mean)


def test_fp8_without_scales_is_read_by_pieces(tmp_path: Path) -> None:
    path, numbers = comfy(tmp_path / "a.safetensors", 1, "none")
    stored = opened(path).tensors["model.diffusion_model.proj.weight"]
    assert torch.equal(in_pieces(stored), numbers.bfloat16())


def test_markers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """Blocks of MXFP8 lie in an order of their own, which scales of the right shape do not tell."""
    marker = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    path, _ = comfy(tmp_path / "a.safetensors", 1, "none", **{"model.diffusion_model.proj.comfy_quant": marker})
    with pytest.raises(FormatError, match=r"'mxfp8', says model.diffusion_model.proj.comfy_quant.*merge the model it"):
        open_model(path, dequantize=True)


def test_fp8_whose_scales_are_not_understood_is_no_plain_fp8(tmp_path: Path) -> None:
    path, _ = comfy(
        tmp_path / "a.safetensors", 1, "none", **{"model.diffusion_model.proj.weight_scale_2": torch.ones(1)}
    )
    with pytest.raises(FormatError, match="does not understand"):
        open_model(path, dequantize=True)


def test_both_spellings_of_dequantize(tmp_path: Path) -> None:
    path, _ = comfy(tmp_path / "a.safetensors", 1, "none")
    spelled = [
        merging.merge([path], method="linear", output=tmp_path / f"{word}.safetensors", **{word: True})
        for word in ("dequantize", "dequantise")
    ]
    assert spelled[0].path.read_bytes() == spelled[1].path.read_bytes()


@pytest.mark.parametrize("kind", [torch.int32, torch.bool])
def test_scales_that_are_no_numbers(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {NAME: fp8_codes(1, 16, 8), NAME + "_scale_inv": torch.ones(1, 1, dtype=kind)}
    folder = quantised_folder(tmp_path / "m", tensors, {"quant_method": "fp8"})
    with pytest.raises(FormatError, match=r"its scales \(1, 1\) in (I32|BOOL), which is none of the kinds"):
        open_model(folder, dequantize=True)
