"""American spelling of options and values; the spelling of earlier versions is accepted too."""

from __future__ import annotations

__all__ = ["to_american"]

_AMERICAN = {
    "dequantise": "dequantize",
    "licence": "license",
    "normalise": "normalize",
    "orthogonalise": "orthogonalize",
    "quantise": "quantize",
}


def to_american(name: str) -> str:
    """Return the name of an option or a value as it is listed, for click's ``token_normalize_func``."""
    for british, american in _AMERICAN.items():
        name = name.replace(british, american)
    return name
