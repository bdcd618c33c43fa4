"""Object code of kernels: made of LLVM's language, and loaded and called without numba."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from merging.maths.lazy_torch import torch

__all__ = ["NativeKernel", "argument_kinds", "assemble", "describe_argument", "describe_machine"]

_DONE = (0, -2)
"""Codes with which numba's functions return that raise nothing: a value, and None."""

_PLAIN = {type(None): "none", bool: "int", int: "int", float: "float"}
"""Arguments of kernels that are no tensors. A look at their types alone is quick, and there are many calls."""


def describe_argument(argument: Any) -> str:
    """Return the type of a kernel's argument: ``f4.2`` for a float32 matrix, ``none``, ``int`` or ``float``.

    bfloat16 is ``u2`` and float16 is ``i2``, by which kernels tell them apart.

    Raises:
        ValueError: for a tensor that is not contiguous, as kernels take it to be.
    """
    plain = _PLAIN.get(type(argument))
    if plain is not None:
        return plain
    if not argument.is_contiguous():
        raise ValueError(f"a tensor {tuple(argument.shape)} is not contiguous")
    return f"{_codes()[argument.dtype]}.{argument.dim()}"


@cache
def _codes() -> dict[torch.dtype, str]:
    return {
        torch.bfloat16: "u2",
        torch.float16: "i2",
        torch.float32: "f4",
        torch.float64: "f8",
        torch.uint8: "u1",
        torch.int32: "i4",
        torch.int64: "i8",
    }


def argument_kinds(signature: Sequence[str]) -> list[str]:
    """Return the machine's types of a compiled function's arguments, as LLVM writes them.

    First come the places of its result and of its exception. An array is its owner and its parent, which are null here,
    the number of its elements, their size, their place, and its shape and strides.
    """
    kinds = ["ptr", "ptr"]
    for each in signature:
        code, _, axes = each.partition(".")
        if axes:
            kinds += ["ptr", "ptr", "i64", "i64", "ptr", *["i64"] * (2 * int(axes))]
        else:
            kinds.append({"none": "ptr", "int": "i64", "float": "double"}[code])
    return kinds


def _flatten(argument: Any) -> tuple[Any, ...]:
    """Return the machine's arguments for one argument of a kernel; tensors are contiguous."""
    if type(argument) in _PLAIN:
        return (argument,)
    size = argument.element_size()
    strides = (size * each for each in argument.stride())
    return None, None, argument.numel(), size, argument.data_ptr(), *argument.shape, *strides


class NativeKernel:
    """A function of object code, loaded into this process.

    Args:
        symbol: its name in the object code.
        signature: the types of its arguments.
        code: the object code.
    """

    def __init__(self, symbol: str, signature: Sequence[str], code: bytes) -> None:
        from llvmlite.binding import ObjectFileRef

        engine = _engine()
        engine.add_object_file(ObjectFileRef.from_data(code))
        engine.finalize_object()
        types = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "double": ctypes.c_double}
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, *(types[kind] for kind in argument_kinds(signature)))
        self._function = prototype(engine.get_function_address(symbol))
        self._outcome = (ctypes.c_void_p * 2)()
        self._place = ctypes.addressof(self._outcome)

    def __call__(self, arguments: Sequence[Any]) -> None:
        """Run the function. Other threads of Python run meanwhile."""
        flat = [part for argument in arguments for part in _flatten(argument)]
        code = self._function(self._place, self._place + ctypes.sizeof(ctypes.c_void_p), *flat)
        if code not in _DONE:
            raise ValueError(f"compiled code failed with {code}")


@cache
def _engine() -> Any:
    """Return LLVM's loader of object code, one a process."""
    from llvmlite.binding import create_mcjit_compiler, parse_assembly

    return create_mcjit_compiler(parse_assembly(""), _machine())


def _machine() -> Any:
    """Return this processor, with the settings that numba has for it."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


@cache
def describe_machine() -> str:
    """Return the processor and its features, for which object code is made."""
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return f"{binding.get_process_triple()} {binding.get_host_cpu_name()} {features}"


def assemble(symbol: str, signature: Sequence[str], text: str) -> bytes:
    """Return the object code of a module in LLVM's language.

    Raises:
        TypeError: for a function that is not called as kernels are, as another version of numba may make them.
        NotImplementedError: for a module that calls functions of numba or Python, which need not be there later.
    """
    from llvmlite.binding import parse_assembly

    module = parse_assembly(text)
    found = [str(each.type) for each in module.get_function(symbol).arguments]
    if found != argument_kinds(signature):
        raise TypeError(f"a compiled function has the arguments {', '.join(found)}")
    called = [each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")]
    if called:
        raise NotImplementedError(f"a compiled function calls {', '.join(called)}")
    return bytes(_machine().emit_object(module))
