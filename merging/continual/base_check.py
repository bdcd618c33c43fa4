"""Checks that a model was trained from the base of a store: by its words, by the base's name, and by its values."""

from __future__ import annotations

import re
from math import inf
from pathlib import Path

from merging.continual.manifest import Manifest
from merging.engine.sanity import UNRELATED, relative_changes
from merging.errors import InputError, option
from merging.plan import Plan
from merging.plan.checks import same_base
from merging.sources import Adapter, Checkpoint

__all__ = ["check_distance", "check_not_base", "check_stated_base"]

_CACHED = re.compile(r"models--([\w.-]+)--([\w.-]+)")
"""The folder of a repository in the Hub's cache."""


def check_not_base(source: Checkpoint, base: Checkpoint) -> None:
    """Refuse a revision of the base itself, which a query for an author's models on the Hub finds as well.

    Raises :class:`~merging.errors.InputError`.
    """
    one, other = source.origin, base.origin
    if one and other and (one.repo, one.path) == (other.repo, other.path):
        raise InputError(
            f"{source.path}: is the base of the store itself, in this or another revision: use "
            f"{option('allow_different_bases', True)} to add it all the same"
        )


def check_distance(plan: Plan) -> None:
    """Refuse a full model, alone in ``plan``, that is too far from the base for a fine-tune of it.

    Raises :class:`~merging.errors.InputError`.
    """
    (source,), base = plan.models, plan.base
    assert base is not None
    change = relative_changes(plan)[0]
    if UNRELATED < change < inf:  # values without a sum are refused by name, by the step
        raise InputError(
            f"{source.path} differs from the base {base.path} by {change:.0%} of its norm, so it is hardly a fine-tune "
            f"of it: use {option('allow_different_bases', True)} to add it all the same"
        )


def check_stated_base(source: Adapter, base: Checkpoint, manifest: Manifest) -> list[str]:
    """Compare the base that an adapter states with the names of the store's, and with what earlier ones stated.

    A folder may be called anything, so that its name confirms and never contradicts; a name on the Hub does both.
    Return notices of doubts. Raise :class:`~merging.errors.InputError`.
    """
    stated = source.base
    if not stated:
        return []
    advice = f"if they are the same model under two names, use {option('allow_different_bases', True)}"
    earlier = [step.stated_base for step in manifest.steps if step.stated_base]
    other = next((name for name in earlier if not same_base(name, stated)), None)
    if other:
        raise InputError(f"{source.path} was trained on {stated}, and earlier ones on {other}: {advice}")
    known = _hub_name(base)
    if known and not same_base(known, stated):
        raise InputError(f"{source.path} was trained on {stated}, and the base of the store is {known}: {advice}")
    likely = [known, base.path.name, base.config.get("_name_or_path")]
    if earlier or any(isinstance(name, str) and same_base(name, stated) for name in likely):
        return []
    return [
        f"{source.path} says that it was trained on {stated}, and the base of the store is {base.path}: make sure that "
        f"they are the same model"
    ]


def _hub_name(base: Checkpoint) -> str | None:
    """Return the base's name on the Hub, if it came from there."""
    if base.origin is not None:
        return base.origin.repo
    cached = [_CACHED.fullmatch(part) for part in Path(base.path).resolve().parts]
    return next(("/".join(found.groups()) for found in cached if found), None)
