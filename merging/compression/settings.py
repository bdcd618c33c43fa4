"""What is to become of a model: the method and its parameters, checked."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from merging.compression.bands import BandsSpec, parse_bands
from merging.errors import OptionError

__all__ = ["BANDS", "DENSITY", "Method", "Settings", "make_settings"]

Method = Literal["ternary", "bands"]

DENSITY = 0.2

BANDS = {"adapter": "*@4", "model": "20@8,180@4,800@2"}
"""Bands by default: of an adapter's few directions all in four bits, of a model's those that GraftLLM released."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The method, the share of entries that are kept, and what else it takes.

    ``density`` is that of all tensors (ternary), or of embeddings and heads of a full model (bands). ``alpha`` is the
    scale in standard deviations; without it scales are of least squares.
    """

    method: Method
    density: float = DENSITY
    bitmap: bool = False
    alpha: float | None = None
    bands: BandsSpec = ()
    told: str = ""


def make_settings(
    kind: Literal["adapter", "model"],
    method: str | None,
    density: float | None,
    coding: str | None,
    alpha: float | None,
    bands: str | None,
) -> Settings:
    """The settings for an adapter or a model. Raises :class:`~merging.errors.OptionError` for what makes no sense."""
    chosen = method or ("ternary" if kind == "adapter" else "bands")
    share = DENSITY if density is None else density
    if not 0 < share <= 1:
        raise OptionError(f"density = {share}: the share of the entries that are kept, above 0 and at most 1")
    if chosen == "bands":
        for name, value in (("coding", coding), ("alpha", alpha), ("density", density if kind == "adapter" else None)):
            if value is not None:
                raise OptionError(f"{name} is a setting of ternary packs, and these are bands: leave it out")
        written = bands or BANDS[kind]
        parsed = parse_bands(written)
        told = written if kind == "adapter" else f"{written}, {share:.4g} of embeddings and heads"
        return Settings("bands", share, bands=parsed, told=told)
    if chosen != "ternary":
        raise OptionError(f"method = {chosen!r}: choose ternary or bands")
    if bands is not None:
        raise OptionError("bands are a setting of the method bands: use it, or leave them out")
    if coding not in (None, "golomb", "bitmap"):
        raise OptionError(f"coding = {coding!r}: choose golomb or bitmap")
    if alpha is not None and not (alpha > 0 and isfinite(alpha)):
        raise OptionError(f"alpha = {alpha}: a scale in standard deviations, above 0")
    scale = "least squares" if alpha is None else f"alpha {alpha:.4g}"
    told = f"{share:.4g} of the entries kept, {scale}, {coding or 'golomb'}"
    return Settings("ternary", share, coding == "bitmap", alpha, told=told)
