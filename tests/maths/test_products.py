"""Products of rows, by either library."""

from __future__ import annotations

import pytest
import torch

from merging.maths import products


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("rows", "others", "length"), [(1, 1, 1), (3, 5, 7), (65, 130, 1031)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_float64(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, rows: int, others: int, length: int, dtype: torch.dtype
) -> None:
    if not onednn:
        monkeypatch.setattr(products, "_has_onednn", lambda: False)
    random = torch.Generator().manual_seed(length)
    left, right = (torch.randn(count, length, generator=random).to(dtype) for count in (rows, others))
    found = products.row_products(left, right)
    assert found.dtype == dtype
    wanted = left.double() @ right.double().T
    sizes = left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)
    assert float(((found.double() - wanted) / sizes).abs().max()) < 4 * torch.finfo(dtype).eps
