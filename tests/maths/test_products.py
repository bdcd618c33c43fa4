"""Products of matrices, by either library."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from merging.maths import products
from merging.maths.products import multiply, multiply_symmetric, row_products


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the library on any processor; oneDNN where torch has it."""
    onednn = request.param and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(products, "_prefers_onednn", lambda: onednn)


def assert_near(found: Tensor, left: Tensor, right: Tensor) -> None:
    """Compare a product with float64's."""
    assert found.dtype == left.dtype
    sizes = left.double().norm(dim=1)[:, None] * right.double().norm(dim=0)
    assert (
        float(((found.double() - left.double() @ right.double()) / sizes).abs().max()) < 4 * torch.finfo(left.dtype).eps
    )


@pytest.mark.parametrize(("rows", "others", "length"), [(1, 1, 1), (3, 5, 7), (65, 130, 1031)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_float64(rows: int, others: int, length: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(length)
    left, right = (torch.randn(count, length, generator=random).to(dtype) for count in (rows, others))
    assert_near(row_products(left, right), left, right.mT)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_products_of_nothing(shape: tuple[int, int, int]) -> None:
    rows, others, length = shape
    left, right = torch.ones(rows, length), torch.ones(others, length)
    for found in (row_products(left, right), multiply(left, right.mT)):
        assert torch.equal(found, torch.full((rows, others), float(length)))


def test_values_that_are_not_finite_stay() -> None:
    """Zero times infinity is no number either."""
    left, right = torch.ones(3, 9), torch.zeros(2, 9)
    right[1] = 1
    left[0, 4], left[1, 4] = torch.nan, torch.inf
    wanted = torch.tensor([[torch.nan, torch.nan], [torch.nan, torch.inf], [0, 9]])
    assert torch.equal(row_products(left, right).nan_to_num(-1, 1e9), wanted.nan_to_num(-1, 1e9))


def layouts(value: Tensor) -> list[Tensor]:
    """Return a matrix stored by rows, by columns, and within larger matrices."""
    rows, columns = value.shape
    wide = value.new_zeros(rows + 3, columns + 5)
    wide[1:-2, 2:-3] = value
    return [value, value.mT.contiguous().mT, wide[1:-2, 2:-3], wide.mT.contiguous().mT[1:-2, 2:-3]]


@pytest.mark.parametrize("shape", [(7, 5, 3), (3, 5, 70), (1, 6, 1), (6, 1, 4)])
def test_layouts(shape: tuple[int, int, int]) -> None:
    """However either matrix is stored."""
    rows, length, columns = shape
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, length, generator=random), torch.randn(length, columns, generator=random)
    for one in layouts(left):
        for other in layouts(right):
            assert_near(multiply(one, other), left, right)
            assert_near(row_products(one, other.mT), left, right)


def test_symmetric_products() -> None:
    value = torch.randn(600, 40, generator=torch.Generator().manual_seed(0))
    found = multiply_symmetric(value, value.mT)
    assert torch.equal(found.tril(-256), found.mT.tril(-256))
    assert_near(found, value, value.mT)


CHOICE = cast("Any", products._prefers_onednn).__wrapped__


@pytest.mark.parametrize(
    ("vectors", "name", "wanted"),
    [("AVX512", "AMD EPYC", True), ("AVX512", "Intel Xeon Platinum", False), ("AVX2", "AMD EPYC", False)],
)
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, vectors: str, name: str, wanted: bool) -> None:
    """Its name and vectors alone, never a measurement."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert CHOICE() == (wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
