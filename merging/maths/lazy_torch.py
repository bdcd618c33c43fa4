"""Torch, imported at its first use: commands that only read headers answer without it, in a fraction of the time."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _LazyModule(ModuleType):
        """A module whose names are taken from the real one, which is imported for the first of them."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_module(self.__name__), name)
            setattr(self, name, value)
            return value

        def __reduce__(self) -> tuple[Any, ...]:
            return _LazyModule, (self.__name__,)

    class _TensorType(type):
        """The type of a class whose instances are torch's tensors; there are none before torch is imported."""

        def __instancecheck__(cls, value: object) -> bool:
            loaded = sys.modules.get("torch")
            return loaded is not None and isinstance(value, loaded.Tensor)

    class Tensor(metaclass=_TensorType):
        """Stand-in for ``torch.Tensor`` in checks and in fields of pydantic."""

        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            from pydantic_core import core_schema

            return core_schema.is_instance_schema(cls)

    torch = _LazyModule("torch")
