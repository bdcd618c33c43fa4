"""GPUs that a test can have anywhere: memory apart from the host's, which the processor computes on.

Their tensors say that they are on ``lazy:0`` or ``lazy:1``, a kind of device that torch knows and no machine has. As on
a real GPU, an operation on tensors of two devices fails, and so does numpy. Each kind says whether it has float64.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from merging.engine.devices import Kind

WIDE = (torch.float64, torch.complex128)
_aten = torch.ops.aten
_MEETING = (_aten.to, _aten._to_copy, _aten.copy_, _aten.index)
"""Operations whose tensors may be on several devices."""


class StandInKind(Kind):
    """A kind of stand-in GPUs.

    Attributes:
        number: the number of GPUs.
        float64: whether they have float64.
        lacking: operations that torch does not have for them.
        room: the most elements of a tensor, beyond which a GPU has no memory.
        free: the bytes that are free, as the kind says; None for GPUs in the host's memory.
        used: the number of operations on each.
        events: the number of events of copies, and of those that were waited for.
    """

    def __init__(
        self,
        number: int = 1,
        *,
        float64: bool = True,
        lacking: tuple[Any, ...] = (),
        room: int = 1 << 60,
        free: int | None = None,
    ) -> None:
        super().__init__("lazy")
        self.number, self.float64, self.lacking, self.room, self.free = number, float64, lacking, room, free
        self.used: Counter[torch.device] = Counter()
        self.events: Counter[str] = Counter()
        self.lock = threading.Lock()

    def count(self) -> int:
        return self.number

    def has_float64(self, device: torch.device) -> bool:
        return self.float64

    def open_stream(self, device: torch.device) -> AbstractContextManager[object]:
        return _Thread(self)

    def mark(self, device: torch.device) -> Any:
        return _Event(self)

    def free_memory(self, device: torch.device) -> int | None:
        return self.free

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation as the devices of its tensors do."""
        leaves, spec = tree_flatten((args, kwargs))
        places = [leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and _is_bound(leaf)]
        there = [each for each in places if each.type == "lazy"]
        if len({*places}) > 1 and function.overloadpacket not in _MEETING:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {places} for {function}")
        target = there[0] if there else torch.device("cpu")
        if function is _aten.to.other:
            target = args[1].device
        elif kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
        if target.type != "lazy" and not there:
            return function(*args, **kwargs)
        if not self.float64 and target.type == "lazy" and any(leaf in WIDE for leaf in leaves if _is_dtype(leaf)):
            raise TypeError(f"the device has no float64, for {function}")
        if function in self.lacking:
            raise NotImplementedError(f"{function} is not implemented on the device")
        if target.type == "lazy":
            with self.lock:
                self.used[target] += 1
        plain = [leaf.held if isinstance(leaf, DeviceTensor) else leaf for leaf in leaves]
        plain = [torch.device("cpu") if isinstance(leaf, torch.device) else leaf for leaf in plain]
        given, named = tree_unflatten(plain, spec)
        made, form = tree_flatten(function(*given, **named))
        back = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, DeviceTensor)}
        wrapped = [
            each
            if not isinstance(each, torch.Tensor)
            else back[id(each)]
            if id(each) in back and back[id(each)].device == target
            else self.wrap(each, target)
            for each in made
        ]
        return tree_unflatten(wrapped, form)

    def wrap(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a tensor on a device."""
        if device.type != "lazy":
            return value
        if value.dtype in WIDE and not self.float64:
            raise TypeError("the device has no float64")
        if value.numel() > self.room:
            raise torch.OutOfMemoryError(f"tried to allocate {value.nbytes} bytes")
        return DeviceTensor(value, device, self)


class DeviceTensor(torch.Tensor):
    """A tensor that is on a stand-in GPU."""

    held: torch.Tensor
    kind: StandInKind

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device, kind: StandInKind) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("lazy", device.index or 0),
        )
        made.held, made.kind = held, kind
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __getitem__(self, index: Any) -> Any:
        # torch makes a tensor of a list's numbers on the device, where no mode sees it
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        kind = next(leaf.kind for leaf in leaves if isinstance(leaf, DeviceTensor))
        return kind.compute(func, args, kwargs or {})


class _Event:
    """The end of a copy."""

    def __init__(self, kind: StandInKind) -> None:
        self.kind = kind
        kind.events["marked"] += 1

    def synchronize(self) -> None:
        self.kind.events["waited for"] += 1


class _Thread(TorchDispatchMode):
    """Lets a thread make tensors on stand-in GPUs."""

    def __init__(self, kind: StandInKind) -> None:
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.kind.compute(func, args, kwargs or {})


def _is_bound(value: torch.Tensor) -> bool:
    """Return whether a tensor must be where the others are: a single number of the host may meet any device."""
    return isinstance(value, DeviceTensor) or value.dim() > 0


def _is_dtype(leaf: object) -> bool:
    return isinstance(leaf, torch.dtype)
