"""Products of large matrices by the faster of the libraries that torch has on a processor."""

from __future__ import annotations

from functools import cache

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["multiply", "multiply_symmetric", "row_products"]


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of rows, ``left @ right^T``, ``[m, n]`` for matrices ``[m, k]`` and ``[n, k]``.

    On a CPU with AVX-512 that is not Intel's, float32 goes through oneDNN, which uses the whole width of its vectors.
    MKL, torch's own choice, does so on Intel's alone, and takes twice the time on AMD's. The choice depends on the
    processor, never on a measurement, so that a machine always computes the same bits. Either way sums are float32.
    """
    if not _goes_through_onednn(left):
        return left @ right.mT
    dense = right if right.is_contiguous() or right.mT.is_contiguous() else right.contiguous()  # else a slow loop
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, dense, None, attr="none", scalars=[], algorithm="")
    return product


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` by :func:`row_products`.

    oneDNN is slow where the matrix on the left is stored by columns. It is then copied, or the transpose is computed.
    """
    if not _goes_through_onednn(left):
        return left @ right
    if left.stride(1) == 1:
        return row_products(left, right.mT)
    if left.numel() < right.numel():
        return row_products(left.contiguous(), right.mT)
    return row_products(right.mT.contiguous(), left).mT


def multiply_symmetric(one: Tensor, other: Tensor) -> Tensor:
    """Return ``one @ other``, known to be symmetric, by blocks of rows, the upper ones only: in little over half."""
    rows = len(one)
    step = max(256, -(-rows // 8))
    out = one.new_empty(rows, rows)
    for start in range(0, rows, step):
        out[start : start + step, start:] = multiply(one[start : start + step], other[:, start:])
        out[start : start + step, :start] = out[:start, start : start + step].mT
    return out


def _goes_through_onednn(left: Tensor) -> bool:
    """Return whether products with a matrix on the left are oneDNN's, which refuses rows without elements."""
    return bool(left.shape[1]) and left.dtype == torch.float32 and left.device.type == "cpu" and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    """Return whether oneDNN is there, and the processor is one on which it is faster than MKL.

    Versions of torch that do not name the processor count as not Intel's, where both are about as fast.
    """
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (there and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" not in str(capabilities.get("cpu_name"))
