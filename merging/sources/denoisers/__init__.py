"""Families of denoisers, one file each: marks to recognize one, and its names as published and in diffusers.

To add a family, write its file and put it into the registry.
"""

from merging.sources.denoisers.detection import is_denoiser
from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules, flat_name
from merging.sources.denoisers.registry import FAMILIES, NUMBER, dotted_name, family_of, partners, respell

__all__ = [
    "FAMILIES",
    "NUMBER",
    "Family",
    "NameMark",
    "NameRule",
    "block_rules",
    "dotted_name",
    "family_of",
    "flat_name",
    "is_denoiser",
    "partners",
    "respell",
]
