"""Compiling kernels by numba."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from merging.maths.kernels.object_code import assemble

__all__ = ["compile_kernel"]


def compile_kernel(name: str, signature: Sequence[str]) -> tuple[str, bytes]:
    """Return the name of a compiled kernel in its object code, and the object code, which takes about a second.

    Args:
        name: the kernel, ``module.function`` of this folder.
        signature: the types of its arguments, as
            :func:`~merging.maths.kernels.object_code.describe_argument` returns them.
    """
    import numba
    import numpy

    plain = {"none": numba.types.none, "int": numba.int64, "float": numba.float64}
    types = []
    for each in signature:
        code, _, axes = each.partition(".")
        array = axes and numba.types.Array(numba.from_dtype(numpy.dtype(code)), int(axes), "C")
        types.append(array or plain[code])
    module, _, function = name.partition(".")
    kernel = getattr(import_module(f"merging.maths.kernels.{module}"), function)
    kernel.compile(tuple(types))
    (compiled,) = (kernel.overloads[each] for each in kernel.signatures if each == tuple(types))
    symbol = compiled.fndesc.llvm_func_name
    return symbol, assemble(symbol, signature, compiled.library.get_llvm_str())
