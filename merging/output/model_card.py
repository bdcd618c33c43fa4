"""The model card of an output: the README with the metadata that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from merging.output.licences import Source, licence_sentence, source_of, strictest
from merging.output.markdown import card, code, code_block, prose, sources_listed
from merging.plan.merge_plan import Plan
from merging.sources import Adapter, Checkpoint

__all__ = ["HUB_ID", "model_card"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""The form of a model's name on the Hub."""


def model_card(plan: Plan, remarks: Sequence[str] = ()) -> str:
    """Return the README of the output: metadata for the Hub, sources, remarks on the values, and the recipe."""
    facts: dict[str, Any] = {}
    ids = _hub_ids(plan)
    if ids:
        facts["base_model"] = ids
        facts["base_model_relation"] = "adapter" if plan.output == "adapter" else "merge"
    full = plan.reference.library if plan.reference else "transformers"
    peft = all(isinstance(model, Adapter) and model.names_modules for model in plan.models)
    own = "gguf" if plan.format == "gguf" else "peft" if plan.format == "peft" or peft else "diffusers"
    facts["library_name"] = full if plan.output == "model" else own
    licence = strictest([each.licence for each in _sources(plan)])
    if licence:
        facts["license"] = licence
    facts["tags"] = ["merge", *(["lora"] if plan.output == "adapter" else []), *plan.recipe.method.chain.split("+")]
    named = sum(each.role != "base" for each in _sources(plan))
    count = named if plan.leaves else len(plan.recipe.models)
    parts = [
        f"{count} {'model' if count == 1 else 'models'} merged by {code(plan.recipe.method.chain)}:",
        sources_listed(_sources(plan)),
        prose(licence_sentence(licence)),
        *(prose(f"Note: {remark.removeprefix('warning: ')}.") for remark in remarks),
        "## Recipe",
        code_block(plan.recipe.to_yaml(), "yaml"),
    ]
    return card(facts, f"Merged {plan.output}", parts)


def _sources(plan: Plan) -> list[Source]:
    """Return the sources of the output, the base last."""
    if plan.leaves:
        base = plan.base.path if plan.base else None
        return [source_of(model, "base" if model.path == base else "") for model in plan.leaves]
    return [source_of(model) for model in plan.models] + ([source_of(plan.base, "base")] if plan.base else [])


def _hub_ids(plan: Plan) -> list[str]:
    """Return the Hub names of the output's origins: the base of an adapter, the models of a model."""
    stated: list[object]
    if plan.output == "adapter":
        stated = [plan.base.origin.repo] if plan.base and plan.base.origin else []
        stated += [model.base for model in plan.models if isinstance(model, Adapter)]
        stated = stated[:1]
    else:
        models = [model for model in plan.leaves or [*plan.models, plan.base] if model]
        stated = [
            model.origin.repo if model.origin else model.config.get("_name_or_path")
            for model in models
            if isinstance(model, Checkpoint) or model.origin
        ]
    names = [name for name in stated if isinstance(name, str) and HUB_ID.fullmatch(name)]
    return list(dict.fromkeys(names))
