"""Encodings of quantised outputs: every code comes back, and no number is further from its code than half a step."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.errors import InputError
from merging.maths.low_precision import E2M1, LIMITS, from_pairs, to_pairs
from merging.sources.dtypes import DTYPES
from merging.sources.quantized.dequantized_tensors import Mxfp4, Scaled
from merging.sources.quantized.scale_grid import ScaleGrid, scale_grid
from merging.sources.stored import MappedTensor, Stored
from merging.storage.encodings import Encoding, GroupEncoding, ScaledEncoding
from merging.storage.output_tensor import OutputTensor
from merging.storage.quantizing_writer import QuantizingWriter

GRIDS = [(3, 2), (300, 1), (1, 200), (1,)]
"""Scales of a matrix of 300 x 200: in blocks of 128 x 128, by row, by column, and for all."""


class Parts:
    """A writer that keeps what it receives."""

    def __init__(self, outs: tuple[OutputTensor, ...]) -> None:
        self.tensors = {out.name: torch.zeros(out.nbytes, dtype=torch.uint8) for out in outs}
        self.missing = {out.name: out.nbytes for out in outs}

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        data = values.view(torch.uint8)
        self.tensors[name][start * values.itemsize :][: len(data)] = data
        self.missing[name] -= len(data)


def stored(data: Tensor, out: OutputTensor) -> Stored:
    if out.dtype_name == "F8_E8M0":
        made = MappedTensor(data.view(out.shape), ("", 0))
        made.dtype_name = "F8_E8M0"
        return made
    return MappedTensor(data.view(DTYPES[out.dtype_name]).view(out.shape), ("", 0))


def encode(encoding: Encoding, values: Tensor, piece: int = 1 << 20) -> tuple[list[Stored], float]:
    """The codes and scales of values that arrive in pieces, and the relative error."""
    parts = Parts(encoding.outs)
    writer = QuantizingWriter(parts, {"w": encoding})
    flat = values.reshape(-1)
    for start in reversed(range(0, flat.numel(), piece)):
        writer.write("w", flat[start : start + piece], start)
    assert not any(parts.missing.values())
    return [stored(parts.tensors[out.name], out) for out in encoding.outs], writer.errors()["w"]


def scaled(shape: tuple[int, ...], kind: str, scales: tuple[int, ...], of: str = "F32", **more: Any) -> ScaledEncoding:
    return ScaledEncoding(
        name="w",
        shape=shape,
        codes=OutputTensor("w", kind, shape),
        scales=OutputTensor("w_scale", of, scales),
        grid=grid_of(shape, scales),
        label="FP8",
        **more,
    )


def grid_of(shape: tuple[int, ...], scales: tuple[int, ...]) -> ScaleGrid:
    grid = scale_grid(shape, scales, (128, 128))
    assert grid is not None
    return grid


def decoded(parts: list[Stored], encoding: ScaledEncoding) -> Tensor:
    return Scaled("F32", parts[0], parts[1], encoding.grid, encoding.factor).read()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# ---- codes of one byte

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "long tails": lambda x: x**9,
    "huge": lambda x: x * 1e37,
    "tiny": lambda x: x * 1e-37,
    "some zero blocks": lambda x: x * (torch.arange(300) >= 128)[:, None],
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("values", SHAPES)
@pytest.mark.parametrize(
    "kind", ["F8_E4M3", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in ("F8_E5M2", "I8"))]
)
@pytest.mark.parametrize("grid", GRIDS)
def test_no_number_is_further_than_half_a_step(grid: tuple[int, ...], kind: str, values: str) -> None:
    random = torch.Generator().manual_seed(1)
    numbers = SHAPES[values](torch.randn(300, 200, generator=random))
    for of in ("F32", "BF16", "F8_E8M0"):
        encoding = scaled((300, 200), kind, grid, of)
        parts, error = encode(encoding, numbers, 7777)
        got = decoded(parts, encoding).double()
        scale = Scaled("F32", MappedTensor(torch.ones(300, 200, dtype=torch.int8), ("", 0)), parts[1], encoding.grid)
        quotient = numbers.double() / scale.read().double()
        assert (torch.isfinite(got)).all()
        assert bool(((got - numbers.double()).abs() <= half_steps(quotient, kind) * scale.read().double()).all())
        norm = numbers.double().norm()
        assert error == pytest.approx(float((got - numbers.double()).norm() / norm) if norm else 0, rel=1e-3, abs=1e-9)


def half_steps(quotient: Tensor, kind: str) -> Tensor:
    """Half the distance of the codes around each number, in units of the scale, with float32's own rounding."""
    slack = 1 + 2**-20
    if kind == "I8":
        return torch.full_like(quotient, 0.5 * slack)
    bits_of_mantissa, smallest = (3, -6) if kind == "F8_E4M3" else (2, -14)
    exponent = torch.frexp(quotient.abs().clamp_max(LIMITS[kind])).exponent - 1
    return 2.0 ** (exponent.clamp_min(smallest) - bits_of_mantissa - 1).double() * slack


@pytest.mark.parametrize("of", ["F32", "BF16", "F16", "F8_E8M0"])
@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8"])
def test_every_code_comes_back(kind: str, of: str) -> None:
    """With the base's scales for any codes; with new ones where a block has the largest code."""
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every.view(DTYPES[kind]).float()
    codes = every[numbers.isfinite() & (numbers.abs() <= LIMITS[kind])]
    rows = torch.stack([codes.roll(shift) for shift in range(6)])
    scales = torch.tensor([0.5, 2.0**-9, 1.0, 2.0, 1024.0, 2.0**-3])[:, None]
    shape = tuple(rows.shape)
    out = OutputTensor("s", of, (6, 1))
    data = torch.tensor([126, 118, 127, 128, 137, 124]) if of == "F8_E8M0" else scales.to(DTYPES[of])
    former = stored(data.to(torch.uint8) if of == "F8_E8M0" else data, out)
    source = Scaled("F32", MappedTensor(rows.view(DTYPES[kind]), ("", 0)), former, grid_of(shape, (6, 1)))
    for base in (former, None):
        encoding = scaled(shape, kind, (6, 1), of, former=base)
        (found, scale), error = encode(encoding, source.read())
        assert torch.equal(bits(found.read()), bits(rows))
        assert of == "F8_E8M0" or torch.equal(bits(scale.read()), bits(former.read()))
        assert error == 0
    cut = torch.where(rows.view(DTYPES[kind]).float().abs() > 8, torch.zeros(()), rows.view(DTYPES[kind]).float())
    small = cut.to(DTYPES[kind])
    source = Scaled("F32", MappedTensor(small, ("", 0)), former, grid_of(shape, (6, 1)))
    (found, _), _ = encode(scaled(shape, kind, (6, 1), of, former=former), source.read())
    assert torch.equal(bits(found.read()), bits(small))


def test_scales_that_are_powers_of_two_in_float32() -> None:
    """As DeepSeek's ``scale_fmt: ue8m0`` states them: the smallest power that no number is too large for."""
    numbers = torch.randn(300, 200, generator=torch.Generator().manual_seed(5))
    parts, error = encode(scaled((300, 200), "F8_E4M3", (3, 2), powers=True), numbers)
    scales = parts[1].read()
    assert torch.equal(torch.frexp(scales).mantissa, torch.full((3, 2), 0.5))
    blocks = torch.nn.functional.pad(numbers.abs(), (0, 56, 0, 84)).view(3, 128, 2, 128).amax((1, 3))
    assert bool((blocks / scales <= 448).all())
    assert bool((blocks / scales > 224).all())
    assert error < 0.03


def test_matrices_of_experts_are_encoded_one_by_one() -> None:
    numbers = torch.randn(3, 256, 130, generator=torch.Generator().manual_seed(2))
    whole = encode(scaled((3, 256, 130), "F8_E4M3", (3, 2, 2)), numbers, 999)[0]
    for expert in range(3):
        alone = encode(scaled((256, 130), "F8_E4M3", (2, 2)), numbers[expert])[0]
        assert torch.equal(bits(whole[0].read()[expert]), bits(alone[0].read()))
        assert torch.equal(whole[1].read()[expert], alone[1].read())


def test_scales_of_a_type_that_is_too_small() -> None:
    with pytest.raises(InputError, match=r"w: the merged values are too large for scales in F16: write ordinary"):
        encode(scaled((4, 8), "F8_E4M3", (4, 1), "F16"), torch.full((4, 8), 1e30))


def test_numbers_without_scales_that_are_too_large() -> None:
    grid = ScaleGrid(1, 1, 1, (1, 8), (1, 8))
    encoding = ScaledEncoding(
        name="w", shape=(8,), codes=OutputTensor("w", "F8_E4M3", (8,)), scales=None, grid=grid, label="FP8"
    )
    (codes,), error = encode(encoding, torch.tensor([448.0, -448, 0, 1, 2, 3, 4, 5]))
    assert (codes.read().float().tolist(), error) == ([448.0, -448, 0, 1, 2, 3, 4, 5], 0)
    with pytest.raises(InputError, match="beyond the range of F8_E4M3, which is stored without scales"):
        encode(encoding, torch.full((8,), 449.0))


# ---- MXFP4


def groups(shape: tuple[int, int, int], former: Stored | None = None) -> GroupEncoding:
    experts, inputs, outputs = shape
    return GroupEncoding(
        name="w",
        shape=shape,
        codes=OutputTensor("w_blocks", "U8", (experts, outputs, inputs // 32, 16)),
        scales=OutputTensor("w_scales", "U8", (experts, outputs, inputs // 32)),
        former=former,
        label="MXFP4",
    )


def test_every_pair_of_four_bits_comes_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pairs(from_pairs(every)), every)


def test_four_bits_round_to_the_nearest_and_halfway_to_the_even_code() -> None:
    numbers = torch.linspace(-9, 9, 20001)
    numbers = torch.cat([numbers, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), torch.zeros(2)])
    magnitudes = torch.tensor(E2M1)
    distance = (numbers.abs()[:, None] - magnitudes).abs()
    nearest = (distance == distance.amin(1, keepdim=True)).long()
    even = nearest * (1 + torch.tensor([1, 0] * 4))
    want = magnitudes[even.argmax(1)] * numbers.sign()
    assert torch.equal(from_pairs(to_pairs(numbers)), want)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_mxfp4_is_within_half_a_step(size: float) -> None:
    numbers = torch.randn(2, 96, 40, generator=torch.Generator().manual_seed(3)) ** 3 * size
    numbers[0, :32, 3] = 0
    numbers[1, 32, 5] = 7 * numbers[1, 32:64, 5].abs().max()
    (codes, scales), error = encode(groups((2, 96, 40)), numbers, 777)
    got = Mxfp4("F32", codes, scales).read().double()
    powers = 2.0 ** (scales.read().double() - 127).mT.repeat_interleave(32, 1)
    quotient = (numbers.double() / powers).abs()
    half = torch.where(quotient < 2, 0.25, torch.where(quotient < 4, 0.5, 1.0))
    assert bool(((got - numbers.double()).abs() <= half * powers).all())
    assert error == pytest.approx(float((got - numbers.double()).norm() / numbers.double().norm()), rel=1e-3)


def test_mxfp4_of_a_base_comes_back() -> None:
    """Whatever its exponents are, as several pairs of exponents and codes stand for the same numbers."""
    random = torch.Generator().manual_seed(4)
    shape = (3, 10, 4, 16)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    codes[0] = torch.where(codes[0] & 7 > 3, 1, 2).to(torch.uint8)  # small ones, for which a lower exponent would do
    scales = torch.randint(90, 150, shape[:-1], dtype=torch.uint8, generator=random)
    former = MappedTensor(scales, ("", 0))
    numbers = Mxfp4("F32", MappedTensor(codes, ("", 0)), former).read()
    (found, again), error = encode(groups((3, 128, 10), former), numbers)
    assert torch.equal(found.read(), codes)
    assert torch.equal(again.read(), scales)
    assert error == 0
    (found, again), error = encode(groups((3, 128, 10)), numbers)
    assert torch.equal(Mxfp4("F32", found, again).read(), numbers)
    assert prod(shape) == found.numel


def test_a_unit_waits_for_all_of_its_elements() -> None:
    encoding = scaled((300, 200), "F8_E4M3", (3, 2))
    parts = Parts(encoding.outs)
    writer = QuantizingWriter(parts, {"w": encoding})
    values = torch.randn(300 * 200)
    writer.write("w", values[:-1])
    assert encoding.unit(0) == (0, 300 * 200)
    assert parts.missing["w"] == 300 * 200
    writer.write("w", values[-1:], len(values) - 1)
    assert not any(parts.missing.values())
