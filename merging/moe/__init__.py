"""Mixtures of experts of dense models and adapters, made without training: routers from prompts, or SMILE."""

from __future__ import annotations

from merging.moe.make import MixtureOfExperts, make_moe, preview_moe
from merging.moe.recipe import MoeRecipe, load_moe_recipe

__all__ = ["MixtureOfExperts", "MoeRecipe", "load_moe_recipe", "make_moe", "preview_moe"]
