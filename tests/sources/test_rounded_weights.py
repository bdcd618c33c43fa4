"""Weights rounded as bitsandbytes quantises and dequantises them, held against its own numbers, bit for bit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merging.sources.dtypes import DTYPE_NAMES
from merging.sources.quantized.bitsandbytes_codes import FourBitFormat, quantize_blocks, value_table
from merging.sources.quantized.rounded_weights import FourBitRounded, FourBitScheme, Int8Rounded, TurnedRounded
from merging.sources.stored import MappedTensor, Stored
from support.paths import TESTS

RECORDED = load_file(TESTS / "golden" / "rounded.safetensors")
"""Weights, and what bitsandbytes 0.50.2 makes of them, by ``tests/peer/bitsandbytes_runner.py``."""

PEER = os.environ.get("BITSANDBYTES_PYTHON")


def cases(recorded: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name in recorded if not name.endswith("/weight"))


def stored(weight: Tensor) -> MappedTensor:
    return MappedTensor(weight, ("", 0))


def rounded(recorded: Mapping[str, Tensor], case: str) -> Stored:
    name, _, device = case.partition("/")
    weight = recorded[f"{name}/weight"]
    if name.startswith("int8."):
        return Int8Rounded(stored(weight))
    format, _, block, _, double = name.split(".")
    assert format in ("nf4", "fp4")
    scheme = FourBitScheme(
        format="nf4" if format == "nf4" else "fp4",
        block=int(block),
        double=double == "double",
        dtype_name=DTYPE_NAMES[weight.dtype],
        nearest=device == "gpu",
    )
    return FourBitRounded(stored(weight), scheme)


def in_pieces(stored: Stored, sizes: tuple[int, ...] = (1, 7, 64, 1000)) -> Tensor:
    """A stored tensor, read from front to back by pieces of changing sizes."""
    whole, position, turn = torch.empty(stored.numel, dtype=stored.dtype), 0, 0
    while position < stored.numel:
        size = min(sizes[turn % len(sizes)], stored.numel - position)
        stored.read_into(whole[position : position + size], position)
        position, turn = position + size, turn + 1
    return whole.view(stored.shape)


@pytest.mark.parametrize("case", cases(RECORDED))
def test_it_is_what_bitsandbytes_makes_of_a_weight(case: str) -> None:
    assert torch.equal(rounded(RECORDED, case).read(), RECORDED[case])


def test_no_case_is_trivial() -> None:
    """Weights change, and the two ways to find codes of scales differ."""
    assert len(RECORDED) == 5 * 7
    assert not any(
        torch.equal(RECORDED[case], RECORDED[f"{case.partition('/')[0]}/weight"]) for case in cases(RECORDED)
    )
    double = [case.partition("/")[0] for case in cases(RECORDED) if case.endswith("/gpu")]
    assert any(not torch.equal(RECORDED[f"{name}/cpu"], RECORDED[f"{name}/gpu"]) for name in double)


@pytest.mark.parametrize("case", [case for case in cases(RECORDED) if "80x128" not in case])
def test_pieces_are_parts_of_the_whole(case: str) -> None:
    assert torch.equal(in_pieces(rounded(RECORDED, case)), RECORDED[case])


def test_larger_weights_than_a_piece() -> None:
    """Blocks are the same however a tensor is read, and the mean of scales is of the whole tensor."""
    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    scheme = FourBitScheme(format="nf4", double=True, dtype_name="BF16")
    whole = FourBitRounded(stored(weight), scheme).read()
    assert torch.equal(in_pieces(FourBitRounded(stored(weight), scheme), (5000, 300_000)), whole)
    assert torch.equal(in_pieces(Int8Rounded(stored(weight)), (5000, 300_000)), Int8Rounded(stored(weight)).read())


@pytest.mark.parametrize("case", ["nf4.bfloat16.64.24x64.double/gpu", "int8.nf4.bfloat16.64.24x64/cpu"])
def test_weights_stored_as_inputs_by_outputs_are_rounded_as_outputs_by_inputs(case: str) -> None:
    weight, wanted = RECORDED[f"{case.partition('/')[0]}/weight"], RECORDED[case]
    scheme = FourBitScheme(format="nf4", double=True, dtype_name="BF16")
    rounding = Int8Rounded if case.startswith("int8") else partial(FourBitRounded, scheme=scheme)
    turned = TurnedRounded(stored(weight.mT.contiguous()), rounding)
    for _ in range(2):
        assert torch.equal(in_pieces(turned), wanted.mT)
        assert turned._whole is None  # released once all of it was read


def test_it_is_rounded_from_the_type_in_which_it_was_loaded() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    scheme = FourBitScheme(format="nf4", double=False, dtype_name="BF16")
    assert torch.equal(
        FourBitRounded(stored(weight), scheme).read(), FourBitRounded(stored(weight.bfloat16()), scheme).read()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_values_that_are_not_finite_are_not_hidden(format: str, value: float) -> None:
    weight = torch.ones(4, 64)
    weight[1, 3] = value
    scheme = FourBitScheme(format="nf4" if format == "nf4" else "fp4", double=False, dtype_name="F32")
    found = (Int8Rounded(stored(weight)) if format == "int8" else FourBitRounded(stored(weight), scheme)).read()
    assert not found[1].isfinite().all()
    assert found[0].isfinite().all()


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_each_value_gets_the_nearest_code(format: FourBitFormat) -> None:
    """Also next to the bounds between two codes, of which the lower one has the bound itself."""
    table = value_table(format).sort().values
    bounds = (table[:-1] + table[1:]) / 2
    near = [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0)), table]
    values = torch.cat([*near, torch.linspace(-1, 1, 5000), torch.tensor([1.0])])
    codes, scales = quantize_blocks(values, len(values), format)
    assert scales.tolist() == [1]
    assert torch.equal(value_table(format)[codes], table[torch.bucketize(values, bounds)])


@pytest.mark.exhaustive
@pytest.mark.skipif(not PEER, reason="BITSANDBYTES_PYTHON does not name a Python that has bitsandbytes")
def test_many_weights_are_what_bitsandbytes_makes_of_them(tmp_path: Path) -> None:
    """Both on one thread, since it sums scales in float32."""
    runner = TESTS / "peer" / "bitsandbytes_runner.py"
    subprocess.run([str(PEER), str(runner), str(tmp_path / "wide.safetensors"), "wide"], check=True, timeout=600)
    wide = load_file(tmp_path / "wide.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert [case for case in cases(wide) if not torch.equal(rounded(wide, case).read(), wide[case])] == []
    finally:
        torch.set_num_threads(threads)
    assert len(wide) > 500
