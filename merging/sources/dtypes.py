"""Torch's dtypes by their names in safetensors files, and the names by dtype. The names are known without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merging.maths.lazy_torch import torch

__all__ = ["DTYPES", "DTYPE_NAMES", "plain_dtype"]

_ATTRIBUTES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""The names that torch has for the dtypes of safetensors files."""


_NAMES = {f"torch.{attribute}": name for name, attribute in _ATTRIBUTES.items()}


def plain_dtype(value: Any) -> Any:
    """Return the plain name of one of torch's dtypes (``"bfloat16"``), and any other value as it is."""
    return str(value).removeprefix("torch.") if str(value) in _NAMES else value


class _Dtypes(Mapping[str, "torch.dtype"]):
    """Torch's dtypes by their names in files. Whether there is one is known without torch."""

    def __init__(self) -> None:
        self._known: dict[str, torch.dtype] = {}

    def __getitem__(self, name: str) -> torch.dtype:
        dtype = self._known.get(name)
        if dtype is None:
            dtype = getattr(torch, _ATTRIBUTES[name])
            assert isinstance(dtype, torch.dtype)
            self._known[name] = dtype
        return dtype

    def __contains__(self, name: object) -> bool:
        return name in _ATTRIBUTES

    def __iter__(self) -> Iterator[str]:
        return iter(_ATTRIBUTES)

    def __len__(self) -> int:
        return len(_ATTRIBUTES)


class _DtypeNames(Mapping["torch.dtype", str]):
    """The names in files by torch's dtypes."""

    def __getitem__(self, dtype: torch.dtype) -> str:
        return _NAMES[str(dtype)]

    def __iter__(self) -> Iterator[torch.dtype]:
        return iter(DTYPES.values())

    def __len__(self) -> int:
        return len(_NAMES)


DTYPES: Mapping[str, torch.dtype] = _Dtypes()
"""Torch's dtypes by their names in safetensors files; torch has none for packed types (F4, F6) and bare exponents."""

DTYPE_NAMES: Mapping[torch.dtype, str] = _DtypeNames()
