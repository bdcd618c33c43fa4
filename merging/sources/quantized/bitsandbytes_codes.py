"""The tables and formulas of bitsandbytes, for weights that it quantised and for weights as it would quantise them."""

from __future__ import annotations

from functools import cache
from typing import Literal

from merging.maths.lazy_torch import Tensor, torch

__all__ = [
    "FourBitFormat",
    "block_scales",
    "dequantize_blocks",
    "dequantize_scales",
    "quantize_blocks",
    "quantize_scales",
    "value_table",
]

FourBitFormat = Literal["nf4", "fp4"]
"""The formats of 4 bits: quantiles of the normal distribution, and floating-point numbers."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
"""Values by code; the values of FP4 are divided by the largest."""

_SMALLEST = 1e-38
"""The smallest scale by which values are divided, so that a block of zeros stays zeros."""

_CELLS = 1 << 11
_EVEN = 1 << 16
"""The number of places in the table by which the library for CPUs finds codes."""


@cache
def value_table(format: FourBitFormat) -> Tensor:
    """Return the values of the 16 codes, in float32."""
    return torch.tensor(_NF4) if format == "nf4" else torch.tensor(_FP4).div_(12.0)


@cache
def _search_tables(format: FourBitFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tables by which codes are found, three times as fast as by torch.bucketize.

    Returns:
        The number of bounds below each cell, where no cell of the range from -1 to 1 has more than one bound in it; the
        bounds between neighboring values, and infinity; and the codes in the order of their values.
    """
    table = value_table(format)
    order = torch.argsort(table)
    bounds = _middles(table[order])
    edges = (torch.arange(_CELLS + 1).double() - 0.5) / (_CELLS // 2) - 1  # half a cell lower, whatever is rounded
    below = torch.bucketize(edges, bounds.double(), out_int32=True)
    return below, torch.cat([bounds, torch.tensor([torch.inf])]), order.int()


@cache
def _scale_table() -> Tensor:
    """Return the values of the 256 codes of scales: the dynamic data type of Dettmers et al. 2021, arXiv 2110.02861.

    Of its seven decades the smallest has one value of each sign, and each further one twice as many: the middles of
    equal parts of the range from 0.1 to 1. Their edges are rounded as by torch.linspace with AVX, on every processor.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade
        start, place = torch.tensor(0.1), torch.arange(parts + 1).double()
        step = ((1 - start) / parts).double()
        edges = torch.where(place < (parts + 1) // 2, start.double() + step * place, 1 - step * (parts - place)).float()
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


def quantize_blocks(values: Tensor, block: int, format: FourBitFormat) -> tuple[Tensor, Tensor]:
    """Quantise values in blocks that share a scale.

    Args:
        values: float32 ``[n]``, from the beginning of a block on.
        block: the number of values in a block; the last one may be shorter.
        format: the format of the codes.

    Returns:
        The codes, int32 ``[n]``, and the scales, the largest magnitude of each block, float32.
    """
    scales = block_scales(values, block)
    full = len(values) - len(values) % block
    inverse = 1.0 / scales.clamp(min=_SMALLEST)
    scaled = (values[:full].view(-1, block) * inverse[: full // block, None]).view(-1)
    if full < len(values):
        # bitsandbytes divides the last block, where it multiplies the others
        scaled = torch.cat([scaled, values[full:] / scales[-1].clamp(min=_SMALLEST)])
    scaled = scaled.clamp_(-1, 1).nan_to_num_()  # of a block with NaN, whose scale is NaN
    below, bounds, order = _search_tables(format)
    places = below.index_select(0, ((scaled + 1) * (_CELLS // 2)).int())
    places += scaled > bounds.index_select(0, places)
    return (places if format == "nf4" else order.index_select(0, places)), scales


def block_scales(values: Tensor, block: int) -> Tensor:
    """Return the largest magnitude of each block of values, in float32; the last block may be shorter."""
    full = len(values) - len(values) % block
    scales = values[:full].view(-1, block).abs().amax(dim=1)
    return torch.cat([scales, values[full:].abs().amax()[None]]) if full < len(values) else scales


def dequantize_blocks(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """Return ``table[codes] * scales``, in float32; ``scales`` has one for each code."""
    return table.float().index_select(0, codes).mul_(scales)


def quantize_scales(scales: Tensor, group: int, offset: Tensor, *, nearest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise scales again, in groups that share a scale of theirs.

    Args:
        scales: float32 ``[n]``, from the beginning of a group on.
        group: the number of scales in a group.
        offset: the mean of all scales of the tensor.
        nearest: whether each gets the nearest code, as on GPUs; else one of a table that is even over the range, as in
            the library for CPUs.

    Returns:
        The codes, int64 ``[n]``, the table of their values, and the scale of each group.
    """
    table, places = _scale_table(), torch.arange(len(scales)) // group
    centered = scales - offset
    groups = torch.stack([each.abs().max() for each in torch.split(centered, group)])
    scaled = (centered * (1.0 / groups.clamp(min=_SMALLEST))[places]).clamp_(-1, 1)
    if nearest:
        return torch.bucketize(scaled, _middles(table)), table, groups
    return _even_codes()[((scaled + 1.0) * 0.5 * (_EVEN - 1) + 0.5).long()], table, groups


def _middles(table: Tensor) -> Tensor:
    return (table[:-1] + table[1:]) / 2


@cache
def _even_codes() -> Tensor:
    """Return the codes of the values that divide the range from -1 to 1 evenly."""
    return torch.bucketize(torch.arange(_EVEN) / (_EVEN - 1) * 2 - 1, _middles(_scale_table()))


def dequantize_scales(codes: Tensor, table: Tensor, groups: Tensor, offset: float | Tensor) -> Tensor:
    """Return ``table[codes] * groups + offset``, in float32; ``groups`` has one for each code."""
    return table.float()[codes].mul_(groups).add_(offset)
