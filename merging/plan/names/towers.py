"""Names of models that also see or hear, whose parts have had different prefixes in versions of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from merging.maths.shapes import Shape
from merging.plan.names.placement import Match
from merging.sources import Adapter
from merging.sources.regions import whole

__all__ = ["match_towers"]

_PREFIX = re.compile(
    r"(?:model\.)?(?:(?P<tower>visual|vision_tower|vision_model|audio_tower|multi_modal_projector|connector)\."
    r"(?:vision_model\.)?|(?:language_model\.(?:model\.)?)?)"
)
"""The prefix of a part: ``model.language_model.``, ``language_model.model.``, ``model.visual.``."""


def match_towers(adapter: Adapter, shapes: Mapping[str, Shape]) -> Match | None:
    """Match an adapter with tensors of these ``shapes`` by names without the prefixes of the parts.

    Return None if a target has no place, or if two names are the same without prefixes.
    """
    if not adapter.names_modules:
        return None
    known = {_without_prefix(name): name for name in shapes}
    if len(known) < len(shapes):
        return None
    names: dict[str, str] = {}
    for target, change in adapter.changes.items():
        name = known.get(_without_prefix(target))
        if name is not None and change.fits(shapes[name]):
            names[target] = name
        elif not change.optional:
            return None
    if len(set(names.values())) < len(names):
        return None
    pieces = {target: [whole(name, shapes[name])] for target, name in names.items()}
    fitting = {target: shapes[name] for target, name in names.items()}
    return Match(pieces, fitting, "their names in another version of the library, part by part")


def _without_prefix(name: str) -> str:
    found = _PREFIX.match(name)
    prefix = found[0] if found else ""
    tower = f"{found['tower']}." if found and found["tower"] else ""
    return tower + name[len(prefix) :]
