"""Operations that a device lacks, done on the CPU: all on float64 on some GPUs, and those that torch does not have."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["MissingOperations"]


class MissingOperations:
    """Lets a thread compute on a device without float64 as if it had it: all methods and their maths, unchanged.

    Tensors in float64 are on the CPU, whatever device they are made for. An operation with one of them, or one that
    makes one, is done on the CPU, and so is an operation that torch does not have for the device. Results of another
    type go back to the device. A tensor that stayed on the CPU moves to the device when it meets tensors there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.device("cpu")

    def supply(self) -> AbstractContextManager[object]:
        """Return the context in which operations are looked at."""
        from torch.utils._python_dispatch import TorchDispatchMode

        do = self.do

        class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return do(func, args, kwargs or {})

        mode: AbstractContextManager[object] = Mode()  # type: ignore[no-untyped-call]
        return mode

    def do(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation of torch, where it can be done."""
        from torch.utils._pytree import tree_leaves

        leaves = tree_leaves((args, kwargs))
        there = [each for each in leaves if isinstance(each, Tensor) and self._is_there(each.device)]
        if not there and not any(isinstance(each, torch.device) and self._is_there(each) for each in leaves):
            return func(*args, **kwargs)
        if any(isinstance(each, torch.dtype) and _is_wide(each) for each in leaves) or _meets_wide(leaves, there):
            return self._do_at(self.host, func, args, kwargs)
        moves = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.to, torch.ops.aten._to_copy)
        if not moves and any(isinstance(each, Tensor) and _is_apart(each) for each in leaves):
            return self._do_at(self.device, func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            return self._do_at(self.host, func, args, kwargs)

    def _do_at(self, place: torch.device, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation on the CPU or the device, and put its results where their types belong."""
        from torch.utils._pytree import tree_map

        moved: list[tuple[Tensor, Tensor]] = []

        def move(value: Any) -> Any:
            if isinstance(value, torch.device):
                return place if self._is_there(value) else value
            if not isinstance(value, Tensor) or value.device.type == place.type:
                return value
            narrowed = _is_wide(value.dtype) and place != self.host  # a single number, in the precision of the others
            copy = value.to(place, torch.float32) if narrowed else value.to(place)
            moved.append((value, copy))
            return copy

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            for original, copy in moved:
                if copy is value:
                    return original
            return value if _is_wide(value.dtype) or place != self.host else value.to(self.device)

        result = func(*tree_map(move, args), **tree_map(move, kwargs))
        for value in _find_written(func, args, kwargs):
            for original, copy in moved:
                if original is value:
                    original.copy_(copy)
        return tree_map(put, result)

    def _is_there(self, device: torch.device) -> bool:
        return device.type == self.device.type


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype in (torch.float64, torch.complex128)


def _is_apart(value: Tensor) -> bool:
    """Return whether a tensor is on the CPU, and must not meet tensors of the device there."""
    return value.device.type == "cpu" and (value.dim() > 0 or _is_wide(value.dtype))


def _meets_wide(leaves: list[Any], there: list[Tensor]) -> bool:
    """Return whether a tensor is in float64. A single number next to floats of the device takes on their type."""
    wide = [each for each in leaves if isinstance(each, Tensor) and _is_wide(each.dtype)]
    floats = any(each.is_floating_point() for each in there)
    return any(each.dim() > 0 or not floats for each in wide)


def _find_written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operation writes into."""
    from torch.utils._pytree import tree_leaves

    declared = func._schema.arguments
    values = {each.name: value for each, value in zip(declared, args, strict=False)} | kwargs
    written = [
        values[each.name] for each in declared if each.name in values and each.alias_info and each.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]
