"""When compiled kernels run instead of torch's formulas, and how they are called.

A kernel is a function of a module in this folder that numba compiles at its first call, once a machine: the compiled
code is kept on the disk. It has the bits of the torch formula next to its call, or it is not used. Nothing that happens
to numba or to its files fails a merge: torch computes what no kernel can.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["COMPILED_FROM", "SWITCH", "USED_FROM", "fuses", "kernel_types", "run_kernel", "switch_kernels", "usable"]

SWITCH = "MERGING_KERNELS"
"""The environment variable that switches kernels ``off``, or ``on`` for merges of any size."""

USED_FROM = 1 << 30
"""Bytes to read from which importing numba and loading compiled code pays, which take half a second."""

COMPILED_FROM = 1 << 34
"""Bytes to read from which it pays to compile a kernel for the first time."""

_log = logging.getLogger(__name__)


class _State:
    """Whether kernels are used in this process, and whether new ones are compiled."""

    used = False
    compiles = False
    failed = False


def switch_kernels(nbytes: int) -> bool:
    """Use kernels from now on if a merge that reads this many bytes gains by them, and return whether they are used.

    Once numba is imported, small merges of the same process gain too.
    """
    choice = os.environ.get(SWITCH, "").casefold()
    if choice in ("off", "0") or _State.failed or find_spec("numba") is None:
        _State.used = False
        return False
    always = choice in ("on", "1")
    _State.compiles = always or nbytes >= COMPILED_FROM
    _State.used = always or _State.used or nbytes >= USED_FROM
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
        arguments: tensors for which :func:`usable` holds, and numbers. Results are written into some of the tensors.
    """
    try:
        kernel = _find(name)
        if kernel is None or not (_State.compiles or kernel.signatures or _is_kept(kernel)):
            return False
        arrays = [_array(each) if isinstance(each, torch.Tensor) else each for each in arguments]
        try:
            kernel(*arrays)
        except OSError:  # compiled, but the disk is full or read-only
            kernel(*arrays)
    except Exception as error:  # whatever a library, its files or the compiler may raise
        _State.used, _State.failed = False, True
        _forget(name)
        _log.warning("compiled kernels are not used: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return False
    return True


@cache
def _find(name: str) -> Any:
    """Return a kernel, or None where it cannot be kept on the disk: to compile it in every process costs too much."""
    module, _, function = name.partition(".")
    try:
        return getattr(import_module(f"merging.maths.kernels.{module}"), function)
    except RuntimeError as error:  # numba found no folder to write to
        _log.info("compiled kernels are not used: %s", error)
        return None


@cache
def _is_kept(kernel: Any) -> bool:
    """Return whether compiled code of a kernel is on the disk."""
    return bool(_indexes(kernel))


def _indexes(kernel: Any) -> list[Path]:
    """Return the files that list the compiled code of a kernel."""
    code = kernel.py_func.__code__
    stem = f"{Path(code.co_filename).stem}.{kernel.py_func.__qualname__}-{code.co_firstlineno}."
    return list(Path(kernel.stats.cache_path).glob(f"{stem}*.nbi"))


def _forget(name: str) -> None:
    """Remove what is known of a kernel's compiled code, which may be damaged: the next process compiles it again."""
    with suppress(Exception):
        for path in _indexes(_find(name)):
            path.unlink(missing_ok=True)


def _array(tensor: Tensor) -> Any:
    """Return a tensor as an array: bfloat16 as uint16, and float16 as int16, by which kernels tell them apart."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("u2")
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.float16 else tensor.numpy()
