"""Packed weights: held against compressed-tensors' own numbers, and the published code of GPTQ, AWQ and modelopt."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources.checkpoint import Checkpoint
from merging.sources.stored import Stored
from support.packed_cases import PACKED, make_packed
from support.paths import TESTS
from support.tiny import CONFIG, identical, load, model, save

MODULE = "model.layers.0.mlp.up_proj"
RECORDED = load_file(TESTS / "golden" / "compressed_tensors.safetensors")
"""Weights that compressed-tensors 0.20.1 compressed, and the numbers that it decompresses them to."""


def folder_of(folder: Path, parts: dict[str, Tensor], stated: dict[str, Any] | None, **config: Any) -> Path:
    """A small model with one packed weight."""
    rest = {name: value.bfloat16() for name, value in model(1).items() if not name.startswith(MODULE)}
    settings = CONFIG | config | ({} if stated is None else {"quantization_config": stated})
    return save(folder, rest | {f"{MODULE}.{name}": part for name, part in parts.items()}, settings)


def opened(folder: Path) -> Stored:
    found = open_model(folder, dequantize=True)
    assert isinstance(found, Checkpoint)
    assert found.tensors.keys() == model(1).keys()
    assert "quantization_config" not in found.config
    return found.tensors[f"{MODULE}.weight"]


def in_pieces(stored: Stored) -> Tensor:
    whole, position, sizes = torch.empty(stored.numel, dtype=stored.dtype), 0, (1, 7, 64, 333)
    while position < stored.numel:
        size = min(sizes[position % 4], stored.numel - position)
        stored.read_into(whole[position : position + size], position)
        position += size
    return whole.view(stored.shape)


def assert_reads(folder: Path, wanted: Tensor) -> None:
    stored = opened(folder)
    assert torch.equal(stored.read(), wanted)
    assert torch.equal(in_pieces(stored), wanted)


# ---- compressed-tensors


def recorded(case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}/"): value for name, value in RECORDED.items() if name.startswith(f"{case}/")}


def statement(case: str) -> dict[str, Any]:
    format, settings = PACKED[case]
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
    }


@pytest.mark.parametrize("case", PACKED)
def test_numbers_of_compressed_tensors(tmp_path: Path, case: str) -> None:
    parts = recorded(case)
    wanted = parts.pop("wanted")
    assert_reads(folder_of(tmp_path / "m", parts, statement(case)), wanted)


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("case", PACKED)
def test_compressed_tensors_still_says_so(case: str) -> None:
    assert identical(make_packed(case), recorded(case))


def test_order_of_activations(tmp_path: Path) -> None:
    """The group of each input is stored where compressed-tensors orders inputs by their activations."""
    parts = recorded("int4.group")
    wanted = parts.pop("wanted")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(64) // 16
    scale, plain = parts["weight_scale"].float(), wanted.float()
    codes = (plain / scale[:, groups]).round()
    wanted = (codes * scale[:, groups[order]]).bfloat16()
    assert_reads(
        folder_of(tmp_path / "m", parts | {"weight_g_idx": groups[order].int()}, statement("int4.group")), wanted
    )
    assert_reads(
        folder_of(tmp_path / "n", parts | {"weight_g_idx": -torch.ones(64).int()}, statement("int4.group")),
        plain.bfloat16(),
    )


# ---- modelopt


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    """The scales of groups times the scale of the tensor, in float32, as modelopt multiplies them."""
    parts = recorded("nvfp4")
    scale, whole = parts["weight_scale"], torch.tensor(0.0137)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = parts["weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(24, 64)
    wanted = (values[codes.long()] * (scale.float() * whole).repeat_interleave(16, 1)).bfloat16()
    stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(1.0)}
    assert_reads(folder_of(tmp_path / "m", stored, {"quant_method": "modelopt", "quant_algo": "NVFP4"}), wanted)


# ---- GPTQ


def gptq(bits: int, groups: int = 4, inputs: int = 64, outputs: int = 32, more: int = 1) -> dict[str, Tensor]:
    """The parts of a weight, packed as AutoGPTQ packs it, and ``wanted`` by the formula of its torch kernel."""
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=random)
    zeros = torch.randint(1, 2**bits, (groups, outputs), generator=random)
    scales = (torch.rand(groups, outputs, generator=random) * 0.02).half()
    g_idx = (torch.arange(inputs) // (inputs // groups))[torch.randperm(inputs, generator=random)]
    wanted = scales.float()[g_idx] * (codes - zeros[g_idx]).float()
    each = 32 // bits
    qweight = torch.zeros(inputs // each, outputs, dtype=torch.int64)
    qzeros = torch.zeros(groups, outputs // each, dtype=torch.int64)
    for j in range(inputs):
        qweight[j // each] |= codes[j] << (bits * (j % each))
    for j in range(outputs):
        qzeros[:, j // each] |= (zeros[:, j] - more) << (bits * (j % each))
    words = {"qweight": qweight, "qzeros": qzeros}
    return {
        **{name: value.to(torch.uint32).view(torch.int32) for name, value in words.items()},
        "scales": scales,
        "g_idx": g_idx.int(),
        "wanted": wanted.T.half(),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, version: str) -> None:
    """Also with inputs in the order of their activations; the second version does not lower the zeros by one."""
    parts = gptq(bits, more=1 if version == "gptq" else 0)
    wanted = parts.pop("wanted")
    stated = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": True, "checkpoint_format": version}
    assert_reads(folder_of(tmp_path / "m", parts, stated, torch_dtype="float16"), wanted)


@pytest.mark.parametrize("group", [99, -1])
def test_a_group_without_scales(group: int, tmp_path: Path) -> None:
    parts = without(gptq(4), "")
    parts["g_idx"][3] = group
    stored = opened(folder_of(tmp_path / "m", parts, {"quant_method": "gptq", "bits": 4}))
    with pytest.raises(FormatError, match=rf"an input of a quantised weight is of the group {group}, and"):
        stored.read()


# ---- AWQ


def awq(groups: int = 4, inputs: int = 64, outputs: int = 32) -> dict[str, Tensor]:
    """The parts of a weight in random words, and ``wanted`` by AutoAWQ's ``dequantize_gemm``."""
    random = torch.Generator().manual_seed(9)
    words = {"qweight": (inputs, outputs // 8), "qzeros": (groups, outputs // 8)}
    parts = {name: torch.randint(-(2**31), 2**31, shape, generator=random).int() for name, shape in words.items()}
    scales = (torch.rand(groups, outputs, generator=random) * 0.02).half()
    shifts = torch.arange(0, 32, 4)
    unpacked = [torch.bitwise_right_shift(each[:, :, None], shifts).view(len(each), -1) for each in parts.values()]
    reverse = torch.arange(outputs).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
    codes, zeros = (each[:, reverse] & 15 for each in unpacked)
    spread = [each.repeat_interleave(inputs // groups, 0) for each in (zeros, scales)]
    return {**parts, "scales": scales, "wanted": ((codes - spread[0]).half() * spread[1]).T.contiguous()}


def test_awq(tmp_path: Path) -> None:
    parts = awq()
    wanted = parts.pop("wanted")
    stated = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    assert_reads(folder_of(tmp_path / "m", parts, stated, torch_dtype="float16"), wanted)


# ---- merged, and refused


def test_packed_weights_are_merged_and_not_written(tmp_path: Path) -> None:
    parts = awq()
    wanted = parts.pop("wanted")
    stated = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    one = folder_of(tmp_path / "one", parts, stated, torch_dtype="float16")
    with pytest.raises(FormatError, match=r"is quantised \(awq, says its config\): use dequantize=True to merge it"):
        merging.merge([one], method="linear", output=tmp_path / "out")
    plain = {name: value.bfloat16() for name, value in model(1).items()} | {f"{MODULE}.weight": wanted * 2}
    two = save(tmp_path / "two", plain)
    out = merging.merge([one, two], method="linear", output=tmp_path / "out", quantize="none", dtype="float32")
    assert torch.equal(load(out.path)[f"{MODULE}.weight"], wanted.float() * 1.5)
    with pytest.raises(InputError, match=rf"{MODULE}.weight changes, and quantize=\"keep\" does not write its format"):
        merging.merge([one, two], method="linear", output=tmp_path / "kept", quantize="keep")


def without(parts: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in parts.items() if key not in (name, "wanted")}


GPTQ = {"quant_method": "gptq", "bits": 4}
AWQ = {"quant_method": "awq", "bits": 4}
INT4 = statement("int4.group")
BROKEN: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "no scales": (without(gptq(4), "scales"), GPTQ, "its scales is missing: get the model again"),
    "no zeros": (without(awq(), "qzeros"), AWQ, "its qzeros is missing"),
    "scales": (
        without(gptq(4), "") | {"scales": torch.ones(4, 31).half()},
        GPTQ,
        r"has the shape \(8, 32\) and its scales \(4, 31\), which does not fit",
    ),
    "groups": (without(gptq(4), "") | {"g_idx": torch.zeros(5).int()}, GPTQ, r"its g_idx \(5,\), which does not fit"),
    "3 bits": (without(gptq(4), ""), GPTQ | {"bits": 3}, r"\(gptq, 3 bits, gptq, says .*does not understand this"),
    "marlin": (without(gptq(4), ""), GPTQ | {"checkpoint_format": "marlin"}, r"\(gptq, 4 bits, marlin, says"),
    "gemv": (without(awq(), ""), AWQ | {"version": "gemv"}, r"\(AWQ, version gemv, 4 bits, says"),
    "packed": (without(recorded("int4.group"), "weight_shape"), INT4, "its weight_shape is missing"),
    "packed shape": (
        without(recorded("int4.group"), "") | {"weight_shape": torch.tensor([24, 1 << 40])},
        INT4,
        r"its weight_shape \(2,\), which does not fit",
    ),
    "packed scale": (
        without(recorded("int4.group"), "") | {"weight_scale": torch.ones(24, 5)},
        INT4,
        r"its weight_scale \(24, 5\), which does not fit",
    ),
    "global scale": (
        without(recorded("nvfp4"), "") | {"weight_global_scale": torch.ones(2)},
        statement("nvfp4"),
        r"its weight_global_scale \(2,\), which does not fit",
    ),
    "nvfp4 scale": (
        without(recorded("nvfp4"), "weight_scale"),
        statement("nvfp4"),
        "its weight_scale is missing",
    ),
    "float scales": (
        without(recorded("nvfp4"), "") | {"weight_scale": torch.ones(24, 4)},
        statement("nvfp4"),
        r"\(codes of 4 bits with scales in F32, says",
    ),
}
"""Parts of a weight, the config's statement, and what the refusal says."""


@pytest.mark.parametrize("kind", BROKEN)
def test_parts_that_are_missing_or_do_not_fit(tmp_path: Path, kind: str) -> None:
    parts, stated, message = BROKEN[kind]
    with pytest.raises(FormatError, match=message):
        open_model(folder_of(tmp_path / "m", parts, stated), dequantize=True)
