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


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_products_of_nothing(shape: tuple[int, int, int]) -> None:
    rows, others, length = shape
    found = products.row_products(torch.ones(rows, length), torch.ones(others, length))
    assert torch.equal(found, torch.full((rows, others), float(length)))


@pytest.mark.parametrize("onednn", [True, False])
def test_values_that_are_not_finite_stay(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    """Zero times infinity is no number either."""
    if not onednn:
        monkeypatch.setattr(products, "_has_onednn", lambda: False)
    left, right = torch.ones(3, 9), torch.zeros(2, 9)
    right[1] = 1
    left[0, 4], left[1, 4] = torch.nan, torch.inf
    wanted = torch.tensor([[torch.nan, torch.nan], [torch.nan, torch.inf], [0, 9]])
    assert torch.equal(products.row_products(left, right).nan_to_num(-1, 1e9), wanted.nan_to_num(-1, 1e9))
