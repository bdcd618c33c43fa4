"""The model card of a mixture of experts."""

from __future__ import annotations

from typing import Any

from merging.display.tables import plural
from merging.moe.plan import MoePlan
from merging.output.licences import Source, licence_sentence, source_of, strictest
from merging.output.markdown import card, code, code_block, prose, sources_listed
from merging.output.model_card import HUB_ID

__all__ = ["moe_card"]


def moe_card(plan: MoePlan) -> str:
    """Return the README of a mixture: metadata for the Hub, its sources, and the recipe."""
    sources = [*_sources(plan, "expert"), *_sources(plan, "base")]
    licence = strictest([each.licence for each in sources])
    facts: dict[str, Any] = {}
    names = list(dict.fromkeys(each.name.partition("@")[0] for each in sources if HUB_ID.match(each.name)))
    if names:
        facts |= {"base_model": names, "base_model_relation": "merge"}
    facts["library_name"] = "transformers"
    if licence:
        facts["license"] = licence
    facts["tags"] = ["merge", "moe", *(["custom_code"] if plan.code else [])]
    count = len(plan.recipe.experts)
    parts = [
        f"A mixture of {plural(count, 'expert')} ({plan.architecture}); each token reaches "
        f"{plan.recipe.experts_per_token}. Routers by {code(plan.recipe.gate_mode)}. Made of:",
        sources_listed(sources),
        prose(licence_sentence(licence)),
        *(["Load it with `trust_remote_code=True`: the model's class is in this folder."] if plan.code else []),
        "## Recipe",
        code_block(plan.recipe.to_yaml(), "yaml"),
    ]
    return card(facts, "Mixture of experts", parts)


def _sources(plan: MoePlan, role: str) -> list[Source]:
    """Return the models with this role, each once."""
    named = plan.experts if role == "expert" else (plan.base,)
    models = [model for each in named for model in (each.checkpoint, each.adapter) if model is not None]
    if role == "expert" and any(each.adapter for each in named):
        models = [model for model in models if model is not plan.base.checkpoint]
    return list({str(model.path): source_of(model, role) for model in models}.values())
