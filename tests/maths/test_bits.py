"""Masks in one bit an element."""

from __future__ import annotations

import pytest
import torch

from merging.maths.bits import pack_bits, unpack_bits


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 1001), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_masks_come_back(shape, dtype):
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4).to(dtype)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape, dtype), mask)
