"""Products of large matrices by the faster of the libraries that torch has on a processor."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["row_products"]


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of rows, ``left @ right^T``, ``[m, n]`` for matrices ``[m, k]`` and ``[n, k]``.

    On a CPU, float32 goes through oneDNN where torch has it. It uses the whole width of every processor's vectors. MKL,
    torch's own choice, does so on Intel's alone, and takes twice the time on AMD's.
    """
    length = left.shape[1]  # oneDNN refuses rows without elements
    if length and left.dtype == torch.float32 and left.device.type == "cpu" and _has_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, attr="none", scalars=[], algorithm="")
        return product
    return left @ right.mT


def _has_onednn() -> bool:
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
