"""All families of denoisers, and lookups by names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache

from merging.maths.shapes import Shapes
from merging.sources.denoisers.cogvideox import COGVIDEOX
from merging.sources.denoisers.cosmos import COSMOS_FAMILIES
from merging.sources.denoisers.family import Family, NameRule, flat_name, name_pattern
from merging.sources.denoisers.flux import CHROMA, FLUX
from merging.sources.denoisers.flux2 import FLUX2
from merging.sources.denoisers.flux3 import FLUX3
from merging.sources.denoisers.hidream import HIDREAM
from merging.sources.denoisers.hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from merging.sources.denoisers.krea2 import KREA2
from merging.sources.denoisers.ltx import LTX2, LTX_VIDEO
from merging.sources.denoisers.lumina2 import LUMINA2
from merging.sources.denoisers.mochi import MOCHI
from merging.sources.denoisers.qwen_image import QWEN_IMAGE, QWEN_IMAGE_21
from merging.sources.denoisers.sd3 import SD3
from merging.sources.denoisers.stable_diffusion import UNETS
from merging.sources.denoisers.wan import WAN_FAMILIES
from merging.sources.denoisers.z_image import IDEOGRAM4, Z_IMAGE

__all__ = ["FAMILIES", "NUMBER", "dotted_name", "family_of", "partners", "respell"]

FAMILIES: tuple[Family, ...] = (
    FLUX3,
    FLUX2,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO,
    CHROMA,
    FLUX,
    SD3,
    QWEN_IMAGE_21,
    QWEN_IMAGE,
    HIDREAM,
    KREA2,
    *WAN_FAMILIES,
    LUMINA2,
    IDEOGRAM4,
    Z_IMAGE,
    *COSMOS_FAMILIES,
    MOCHI,
    LTX2,
    COGVIDEOX,
    LTX_VIDEO,
    *UNETS,
)
"""The families. A family with a name that another has too comes before it, if its marks are rarer."""

NUMBER = re.compile(r"(?:(?<=[._])|(?<=[._]block))\d+(?=[._])")
"""The number of a block, the first in a name, dotted or flat; Cosmos Predict 1 writes ``block0``."""

_SPELLINGS = tuple((re.compile(pattern), meant) for family in FAMILIES for pattern, meant in family.spellings)


def family_of(shapes: Shapes) -> Family | None:
    """Return the family of a denoiser by its tensors, None for an unknown one.

    The names are without a component, as in any set of names: dotted, or flat as in Kohya's files.
    """
    flat = {flat_name(name): shape for name, shape in shapes.items()}
    return next((family for family in FAMILIES if family.has_mark(flat)), None)


@lru_cache(maxsize=65536)
def respell(flat: str) -> str:
    """Return the usual flat name of a tensor for which some files have another."""
    for pattern, meant in _SPELLINGS:
        flat = pattern.sub(meant, flat)
    return flat


def dotted_name(family: Family, flat: str) -> str | None:
    """Return the name with dots of a tensor of a family, from its name in the normal form; None for an unknown one."""
    module, dot, leaf = flat.partition(".")
    for whole, pattern, name in _dotted_patterns(family.name):
        found = pattern.fullmatch(flat if whole else module)
        if found:
            return name.format(*found.groups()) + ("" if whole else dot + leaf)
    return None


@cache
def _dotted_patterns(family: str) -> list[tuple[bool, re.Pattern[str], str]]:
    """Return the expressions for the flat names of a family's tensors and modules, whether each is a tensor's, and the
    names with dots.
    """
    (known,) = (each for each in FAMILIES if each.name == family)
    names = dict.fromkeys(
        (*known.modules, *(name for rule in known.rules for name in (rule.published, *rule.diffusers)))
    )
    flat = {name: respell(flat_name(name)) for name in names}
    return [("." in flat[name], name_pattern(flat[name]), name) for name in names]


def _pairs(rule: NameRule) -> Iterator[tuple[str, str, bool]]:
    """Yield pairs of flat modules of a rule, and whether both are the same tensor."""
    same = len(rule.diffusers) == 1 and not rule.reordered
    for ours in rule.diffusers:
        if ours != rule.published:
            one, other = respell(rule.published.replace(".", "_")), ours.replace(".", "_")
            yield one, other, same
            yield other, one, same


_PARTNERS: defaultdict[str, dict[str, bool]] = defaultdict(dict)
for _family in FAMILIES:
    for _rule in _family.rules:
        for _one, _other, _same in _pairs(_rule):
            _PARTNERS[_one][_other] = _same


def partners(name: str) -> Mapping[str, bool]:
    """Return the names of a flat tensor in the other set of names, and whether each is all of the tensor."""
    module, dot, leaf = name.partition(".")
    found = NUMBER.search(module)
    others = _PARTNERS.get(module) or _PARTNERS.get(NUMBER.sub("{}", module, count=1), {})
    return {other.format(found[0] if found else "") + dot + leaf: same for other, same in others.items()}
