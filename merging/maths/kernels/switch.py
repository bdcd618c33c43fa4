"""When compiled kernels run instead of torch's formulas, and how they are called.

A kernel is a function of a module in this folder that numba compiles once a machine: the compiled code is kept on the
disk, and loaded without numba. It has the bits of the torch formula next to its call, or it is not used. Nothing that
happens to numba or to its files fails a merge: torch computes what no kernel can.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any, ClassVar

from merging.maths.kernels.kept_code import any_code_kept, read_code, write_code
from merging.maths.kernels.object_code import NativeKernel, describe_argument
from merging.maths.lazy_torch import Tensor, torch

__all__ = ["COMPILED_FROM", "SWITCH", "USED_FROM", "fuses", "kernel_types", "run_kernel", "switch_kernels", "usable"]

SWITCH = "MERGING_KERNELS"
"""The environment variable that switches kernels ``off``, or ``on`` for merges of any size."""

USED_FROM = 1 << 27
"""Bytes to read from which loading compiled code pays, which takes a few hundredths of a second."""

COMPILED_FROM = 1 << 32
"""Bytes to read from which it pays to import numba, and to compile a kernel for the first time."""

_log = logging.getLogger(__name__)


class _State:
    """Whether kernels are used in this process, whether new ones are compiled, and the ones that are loaded."""

    used = False
    compiles = False
    failed = False
    lock = Lock()
    loaded: ClassVar[dict[tuple[str, ...], NativeKernel]] = {}
    missing: ClassVar[set[tuple[str, ...]]] = set()


def switch_kernels(nbytes: int) -> bool:
    """Use kernels from now on if a merge that reads this many bytes gains by them, and return whether they are used.

    Once some are loaded, small merges of the same process gain too.
    """
    choice = os.environ.get(SWITCH, "").casefold()
    if choice in ("off", "0") or _State.failed or find_spec("numba") is None:
        _State.used = False
        return False
    always = choice in ("on", "1")
    _State.compiles = always or nbytes >= COMPILED_FROM
    _State.used = _State.compiles or ((_State.used or nbytes >= USED_FROM) and any_code_kept())
    return _State.used


def usable(*tensors: Tensor | None) -> bool:
    """Return whether kernels can take these tensors: contiguous, on the CPU, without gradients, of a known type."""
    return _State.used and all(
        each is None
        or (
            each.device.type == "cpu"
            and each.is_contiguous()
            and not each.requires_grad
            and each.dtype in kernel_types()
        )
        for each in tensors
    )


@cache
def kernel_types() -> tuple[torch.dtype, ...]:
    """Return the types of tensors that kernels take; float16 where the processor converts it by itself."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    converts = features.get("f16c") or features.get("fullfp16") or features.get("neon")
    return (torch.float32, torch.bfloat16, *([torch.float16] if converts else []))


@cache
def fuses() -> bool:
    """Return whether torch's sums with a factor (``add`` with ``alpha``, ``addcmul``) round once, as this CPU may."""
    product, total = torch.tensor([1 + 2**-12]), torch.tensor([-1.0])
    return float(torch.add(total, product, alpha=1 + 2**-12)) != float(product * (1 + 2**-12) + total)


def run_kernel(name: str, *arguments: Any) -> bool:
    """Run a kernel, and return whether it ran: if not, torch must compute the result.

    Args:
        name: the kernel, ``module.function`` of this folder.
        arguments: contiguous tensors on the CPU, and numbers. Results are written into some of the tensors.
    """
    if not _State.used:
        return False
    try:
        kernel = _find(name, *map(describe_argument, arguments))
        if kernel is not None:
            kernel(arguments)
    except Exception as error:  # whatever a library, its files or the compiler may raise
        _State.used, _State.failed = False, True
        _log.warning("compiled kernels are not used: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return False
    return kernel is not None


def _find(name: str, *signature: str) -> NativeKernel | None:
    """Return a kernel for arguments of some types; None where it is not kept, and this process compiles none."""
    key = (name, *signature)
    with _State.lock:
        if key not in _State.loaded and (_State.compiles or key not in _State.missing):
            found = read_code(name, signature) or (_compile(name, signature) if _State.compiles else None)
            if found is None:
                _State.missing.add(key)
            else:
                _State.loaded[key] = NativeKernel(found[0], signature, found[1])
        return _State.loaded.get(key)


def _compile(name: str, signature: Sequence[str]) -> tuple[str, bytes]:
    """Compile a kernel, and keep its object code."""
    from merging.maths.kernels.compiling import compile_kernel

    symbol, code = compile_kernel(name, signature)
    write_code(name, signature, symbol, code)
    return symbol, code
