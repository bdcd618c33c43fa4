"""Weights that bitsandbytes quantised and dequantised: started by the peer's own Python.

    python bitsandbytes_runner.py OUT.safetensors [wide]

Writes for each case the weight (``CASE/weight``), and the weight that its code for CPUs makes of it
(``CASE/cpu``). Of double quantisation it also writes what its code for all devices makes of it (``CASE/gpu``), whose
codes of scales are those of its kernels for GPUs. Small cases are the same on every processor: the sums of their
scales are exact. No shape has a multiple of 16 columns that is no multiple of the block: with AVX-512 the code for CPUs
of version 0.50.2 dequantises such weights with the scales of other blocks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SMALL = [
    ("nf4", "bfloat16", 64, (24, 64)),
    ("nf4", "float16", 32, (80, 128)),
    ("nf4", "float32", 64, (33, 65)),
    ("fp4", "bfloat16", 64, (24, 64)),
    ("fp4", "float16", 32, (7, 3)),
]
WIDE = [
    (format, dtype, block, shape)
    for format in ("nf4", "fp4")
    for dtype in DTYPES
    for block in (32, 64, 4096)
    for shape in ((512, 1024), (33, 65), (160, 120), (1500, 300), (1, 1))
]


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A weight with rows of different sizes, a row of zeros, and values of few bits, whose sums are exact."""
    random = torch.Generator().manual_seed(shape[0])
    rows = torch.randint(1, 4, (shape[0], 1), generator=random) / 64
    weight = (torch.randn(shape, generator=random) * rows).bfloat16()
    if shape[0] > 2:
        weight[2] = 0
    return weight.to(dtype)


def portable_quantizer() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The quantizer of scales of all devices without one of their own, which the library for CPUs hides."""
    from bitsandbytes import _ops

    found: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
    kept, _ops.register_kernel = (
        _ops.register_kernel,
        lambda name, device: lambda kernel: found.setdefault(name, kernel),
    )
    importlib.reload(importlib.import_module("bitsandbytes.backends.default.ops"))
    _ops.register_kernel = kept
    return found["bitsandbytes::quantize_blockwise"]


def rounded(cases: object) -> Iterator[tuple[str, Tensor]]:
    """Yield each case's weight and results by their names."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Int8Params

    portable = portable_quantizer()
    table = bnb.create_dynamic_map()
    for format, dtype, block, shape in cases:  # type: ignore[attr-defined]
        weight = weight_of(shape, DTYPES[dtype])
        name = f"{format}.{dtype}.{block}.{'x'.join(map(str, shape))}"
        for double in (False, True):
            codes, state = bnb.quantize_4bit(weight, compress_statistics=double, quant_type=format, blocksize=block)
            case = f"{name}.{'double' if double else 'single'}"
            yield f"{case}/weight", weight
            yield f"{case}/cpu", bnb.dequantize_4bit(codes, state)
            if double:
                _, single = bnb.quantize_4bit(weight, quant_type=format, blocksize=block)
                state.absmax, state.state2.absmax = portable(single.absmax - state.offset, table, 256)
                yield f"{case}/gpu", bnb.dequantize_4bit(codes, state)
        kept = Int8Params(weight.clone(), requires_grad=False).to("cpu")
        yield f"int8.{name}/weight", weight
        yield f"int8.{name}/cpu", bnb.int8_vectorwise_dequant(kept.CB, kept.SCB)


def main(out: Path, wide: bool) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    cases = WIDE if wide else SMALL
    save_file({name: value.contiguous().clone() for name, value in rounded(cases)}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "wide" in sys.argv[2:])
