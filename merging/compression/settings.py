"""The settings of a pack: the method and its parameters, checked."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from merging.errors import OptionError
from merging.sources.packs.grouped import BITS

__all__ = ["BANDS", "DENSITY", "BandsSpec", "PackMethod", "PackSettings", "make_settings", "parse_bands"]

PackMethod = Literal["ternary", "bands"]

BandsSpec = tuple[tuple[int | None, int], ...]
"""Counts of directions and their bits. A count of None means all that are left."""

DENSITY = 0.2

BANDS = {"adapter": "*@4", "model": "20@8,180@4,800@2"}
"""The default bands: all of an adapter's few directions in four bits; for models, the bands that GraftLLM released."""


@dataclass(frozen=True, slots=True)
class PackSettings:
    """The method of a pack and its parameters.

    Attributes:
        method: ``"ternary"`` or ``"bands"``.
        density: The share of entries that are kept: of all tensors (ternary), or of embeddings and heads (bands).
        bitmap: Whether positions are two bitmaps instead of a Golomb code.
        alpha: The scale in standard deviations. Without it scales are least squares.
        keeps_norm: Whether scales are increased so that every change keeps its norm.
        bands: Counts of directions and their bits.
        summary: The settings in words.
    """

    method: PackMethod
    density: float = DENSITY
    bitmap: bool = False
    alpha: float | None = None
    keeps_norm: bool = False
    bands: BandsSpec = ()
    summary: str = ""


def parse_bands(text: str) -> BandsSpec:
    """Parse bands such as ``20@8,180@4,*@2``: counts of directions and their bits.

    Raises :class:`~merging.errors.OptionError`.
    """
    bands: list[tuple[int | None, int]] = []
    for part in text.split(","):
        count, _, bits = part.strip().partition("@")
        known = bits in map(str, BITS) and (count == "*" or (count.isdecimal() and 0 < int(count) < 1 << 31))
        if not known or (bands and bands[-1][0] is None):
            raise OptionError(
                f"bands = {text!r}: write directions and their bits (8, 4, 2 or 1), as in 20@8,180@4,800@2; * is all "
                f"that are left, and comes last"
            )
        bands.append((None if count == "*" else int(count), int(bits)))
    return tuple(bands)


def make_settings(
    kind: Literal["adapter", "model"],
    *,
    method: str | None,
    density: float | None,
    coding: str | None,
    alpha: float | None,
    scale: str | None,
    bands: str | None,
) -> PackSettings:
    """Return the settings for an adapter or a model. Raises :class:`~merging.errors.OptionError` for wrong values."""
    chosen = method or ("ternary" if kind == "adapter" else "bands")
    share = DENSITY if density is None else density
    if not 0 < share <= 1:
        raise OptionError(f"density = {share}: the share of the entries that are kept, above 0 and at most 1")
    if chosen == "bands":
        ternary = {"coding": coding, "alpha": alpha, "scale": scale, "density": density if kind == "adapter" else None}
        for name, value in ternary.items():
            if value is not None:
                raise OptionError(f"{name} is a setting of ternary packs, and these are bands: leave it out")
        written = bands or BANDS[kind]
        summary = written if kind == "adapter" else f"{written}, {share:.4g} of embeddings and heads"
        return PackSettings("bands", share, bands=parse_bands(written), summary=summary)
    if chosen != "ternary":
        raise OptionError(f"method = {chosen!r}: choose ternary or bands")
    if bands is not None:
        raise OptionError("bands are a setting of the method bands: use it, or leave them out")
    return _ternary_settings(share, coding, alpha, scale)


def _ternary_settings(density: float, coding: str | None, alpha: float | None, scale: str | None) -> PackSettings:
    if coding not in (None, "golomb", "bitmap"):
        raise OptionError(f"coding = {coding!r}: choose golomb or bitmap")
    if alpha is not None and not (alpha > 0 and isfinite(alpha)):
        raise OptionError(f"alpha = {alpha}: a scale in standard deviations, above 0")
    if scale not in (None, "least-squares", "norm"):
        raise OptionError(f"scale = {scale!r}: choose least-squares or norm")
    if scale is not None and alpha is not None:
        raise OptionError("alpha is a scale itself: leave one of alpha and scale out")
    scaling = "scales that keep the norm" if scale == "norm" else "least squares"
    if alpha is not None:
        scaling = f"alpha {alpha:.4g}"
    return PackSettings(
        method="ternary",
        density=density,
        bitmap=coding == "bitmap",
        alpha=alpha,
        keeps_norm=scale == "norm",
        summary=f"{density:.4g} of the entries kept, {scaling}, {coding or 'golomb'}",
    )
