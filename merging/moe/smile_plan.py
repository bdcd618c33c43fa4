"""placeholder"""

from __future__ import annotations

from merging.moe.plan import MoePlan
from merging.moe.recipe import MoeRecipe

__all__ = ["plan_smile"]


def plan_smile(recipe: MoeRecipe) -> MoePlan:
    raise NotImplementedError
