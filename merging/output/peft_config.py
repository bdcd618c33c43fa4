"""PEFT's config of a merged adapter, and the files next to its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.output.model_card import model_card
from merging.plan.items import Item
from merging.plan.merge_plan import Plan
from merging.plan.names.peft_names import PREFIX
from merging.sources import Adapter
from merging.sources.changes import Change, ExtractedChange, LoraChange
from merging.sources.token_rows import TokenTable

__all__ = ["NO_VARIANTS", "SAVED", "adapter_config", "lora_config", "rank_patterns", "write_adapter_companions"]

NO_VARIANTS: Mapping[str, Any] = {
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Fields of PEFT's config that say: nothing but factors, with one rank and one alpha for all modules."""

SAVED: Mapping[str, Any] = {
    "auto_mapping": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
}
"""Fields that PEFT writes for any saved LoRA, at the values for one that is to be loaded as it is."""

_FIELDS = (
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "modules_to_save",
)
"""The order of the fields in files."""

_KEPT_BIAS = ".base_layer.bias"
"""The ending of the name of a bias in full, of a module with factors."""

_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT saves a head, and refuses an adapter without a head."""


def lora_config(*, rank: int, target_modules: Iterable[str], **fields: Any) -> dict[str, Any]:
    """Return PEFT's config of a plain LoRA whose every scale is in its factors: alpha is equal to the rank.

    Args:
        rank: The rank of all modules, and their alpha.
        target_modules: The adapted modules. They are sorted.
        **fields: Further fields of the config, such as :data:`NO_VARIANTS` and :data:`SAVED`.

    Returns:
        The fields in the order in which files have them.
    """
    stated: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted(target_modules),
        **fields,
    }
    return {name: stated[name] for name in _FIELDS if name in stated} | stated


def write_adapter_companions(plan: Plan, folder: Path, remarks: Sequence[str] = ()) -> None:
    """Write the config that PEFT reads, and the card.

    ``remarks`` are sentences about the merged values, for the card.
    """
    if plan.format == "peft":
        _write(folder / "adapter_config.json", json.dumps(adapter_config(plan), indent=2) + "\n")
    _write(folder / "README.md", model_card(plan, remarks))


def adapter_config(plan: Plan) -> dict[str, Any]:
    """Return PEFT's config of a merged adapter: alphas equal to the ranks, and no variants of LoRA."""
    adapters = [model for model in plan.models if isinstance(model, Adapter)]
    extracted = any(isinstance(change, ExtractedChange) for item in plan.items for change in item.inputs)
    changes = [change for item in plan.items if item.form == "factors" for change in item.inputs if change]
    saved = _saved_modules(plan, adapters)
    fields = {
        **NO_VARIANTS,
        **SAVED,
        "base_model_name_or_path": next(
            (a.base for a in adapters if a.base and a.names_modules),
            _base_name(plan) if extracted else None,
        ),
        "revision": next((a.config["revision"] for a in adapters if a.config.get("revision")), None),
        "task_type": _task_type(adapters, saved),
        "fan_in_fan_out": any(
            isinstance(c, (LoraChange, ExtractedChange)) and c.kind == "linear" and c.transposed for c in changes
        ),
        "modules_to_save": saved or None,
    }
    patterns = _find_patterns(plan)
    fields |= {"rank_pattern": patterns, "alpha_pattern": patterns}
    config = lora_config(rank=plan.rank, target_modules=_target_modules(plan, adapters), **fields)
    if any(out.name.endswith(_KEPT_BIAS) for out in plan.outs):
        config["bias"] = "all"
    if any(item.form == "delta" for item in plan.items):
        config["lora_bias"] = True
    if parameters := _parameters(plan, adapters):
        config["target_parameters"] = parameters
        config["peft_version"] = "0.19.0"  # the first that reads experts' factors this way round
    tokens = _tokens(plan)
    if tokens and plan.rank:
        config["trainable_token_indices"] = tokens
    elif tokens:
        kept = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode")
        indices = next(iter(tokens.values()))
        return {
            **{key: config[key] for key in kept},
            "peft_type": "TRAINABLE_TOKENS",
            "target_modules": sorted(tokens),
            "token_indices": indices,
        }
    return config


def _base_name(plan: Plan) -> str | None:
    """Return the name of the base by which PEFT finds it."""
    if plan.base is not None and plan.base.origin is not None:
        return plan.base.origin.repo
    return plan.recipe.base if isinstance(plan.recipe.base, str) else None


def _find_patterns(plan: Plan) -> dict[str, int]:
    """Return the ranks of the modules and parameters of a merged adapter, where they differ from the largest."""
    ranks: dict[str, int] = {}
    for item in plan.items:
        rank = plan.ranks.get(item.site.name)
        if item.form != "factors" or rank is None:
            continue
        if _is_experts(item):
            ranks |= {each.target: rank for each in item.inputs if isinstance(each, Change)}
        else:
            ranks |= {name: out.shape[0] for out in item.outs if (name := _module_of_factor(out.name)) is not None}
    return rank_patterns(ranks, plan.rank)


def rank_patterns(ranks: Mapping[str, int], most: int) -> dict[str, int]:
    """Return PEFT's rank_pattern of modules with these ranks, where the rank of all others is ``most``.

    PEFT takes the first name in which a module's name ends. So longer names are first, and a name that ends in another
    one has an entry of its own.
    """
    others = {name for name, rank in ranks.items() if rank != most}
    listed = {name for name in ranks if name in others or any(part in others for part in _endings(name))}
    return {name: ranks[name] for name in sorted(listed, key=lambda each: (-len(each), each))}


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _module_of_factor(name: str) -> str | None:
    """Return the module that a lower factor belongs to, None for other tensors."""
    leaf = next((each for each in (".lora_A.weight", ".lora_embedding_A") if name.endswith(each)), None)
    return name.removeprefix(PREFIX).removesuffix(leaf) if leaf else None


def _task_type(adapters: list[Adapter], saved: list[str]) -> str | None:
    """Return the task of the inputs, None if their heads are left out, as PEFT would look for heads."""
    headless = not saved and any(adapter.config.get("modules_to_save") for adapter in adapters)
    task = next((adapter.config["task_type"] for adapter in adapters if adapter.config.get("task_type")), None)
    return None if headless and task in _WITH_HEADS else task


def _is_experts(item: Item) -> bool:
    """Whether an item is a parameter of stacked experts."""
    return not item.placings and any(isinstance(each, Change) and each.kind == "experts" for each in item.inputs)


def _parameters(plan: Plan, adapters: list[Adapter]) -> list[str]:
    """Return the adapted parameters of experts, by the inputs' short names if these mean all of them."""
    experts = [item.inputs for item in plan.items if item.form == "factors" and _is_experts(item)]
    names = {next(each.target for each in inputs if isinstance(each, Change)) for inputs in experts}
    short = {name for adapter in adapters for name in adapter.config.get("target_parameters") or ()}
    return _shorten(names, short)


def _shorten(names: Iterable[str], short: Iterable[str]) -> list[str]:
    """Return the short names in which the names end, if every name ends in one; else the names themselves."""
    ends = {name: {end for end in short if name == end or name.endswith(f".{end}")} for name in names}
    return sorted(set().union(*ends.values()) if all(ends.values()) else ends)


def _tokens(plan: Plan) -> dict[str, list[int]]:
    """Return the indices of the rows that are written, by module."""
    found: dict[str, list[int]] = {}
    for item in plan.items:
        if isinstance(item.base, TokenTable):
            module = item.outs[0].name.removeprefix(PREFIX).rpartition(".")[0].removesuffix(".token_adapter")
            found[module] = list(item.base.indices)
    return found


def _target_modules(plan: Plan, adapters: list[Adapter]) -> list[str]:
    """Return the adapted modules, by the inputs' short names if these together mean exactly the adapted modules.

    A short name means all modules that end in it. This holds for the merge if it holds for every input. Else the
    modules are named in full.
    """
    short: set[str] = set()
    for adapter in adapters:
        named = adapter.config.get("target_modules")
        narrowed = any(adapter.config.get(key) for key in ("layers_to_transform", "exclude_modules"))
        if not isinstance(named, list) or narrowed or not all(isinstance(name, str) for name in named):
            return sorted(_modules(plan))
        short.update(named)
    short |= _expert_leaves(plan)
    return _shorten(_modules(plan), short)


def _expert_leaves(plan: Plan) -> set[str]:
    """Return the last names of experts' projections that are written one by one, unless other modules share them."""
    stacks = (
        item for item in plan.items if any(c and c.kind == "experts" for c in item.inputs if isinstance(c, Change))
    )
    apart = {each.up.name for item in stacks if item.form == "factors" for each in item.placings}
    leaves = {name.removesuffix(".lora_B.weight").rpartition(".")[2] for name in apart}
    adapted = _modules(plan)
    modules = {name.removesuffix(".weight") for name in plan.base.tensors} if plan.base else set()
    return leaves - {module.rpartition(".")[2] for module in modules - adapted}


def _modules(plan: Plan) -> set[str]:
    adapted = [item for item in plan.items if item.form == "factors" and not _is_experts(item)]
    paths = {path for item in adapted for out in item.outs if (path := _module_of_factor(out.name)) is not None}
    # A module inside another wrapper follows from that wrapper.
    return {path for path in paths if ".base_layer" not in path}


def _saved_modules(plan: Plan, adapters: list[Adapter]) -> list[str]:
    """Return the modules saved in full, by the names in the inputs' configs, or else by their own."""
    saved = [item for item in plan.items if item.form == "dense" and not isinstance(item.base, TokenTable)]
    outs = [out.name for item in saved for out in item.outs if not out.name.endswith(_KEPT_BIAS)]
    modules = {name.removeprefix(PREFIX).rpartition(".")[0] for name in outs}
    named = {name for adapter in adapters for name in adapter.config.get("modules_to_save") or [] if modules}
    return sorted(named | {module for module in modules if not any(f".{name}." in f".{module}." for name in named)})


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
