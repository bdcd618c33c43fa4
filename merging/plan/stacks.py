"""The stacks of blocks in the models of a merge, and marks of experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from merging.errors import MergingError, option
from merging.maths.layers import Stacks
from merging.maths.site import Site
from merging.object_stores.address import is_store_address
from merging.plan.recipe import Recipe
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change
from merging.sources.checkpoint import config_layers
from merging.sources.small_files import read_json

__all__ = ["find_stacks", "mark_experts"]


def find_stacks(
    recipe: Recipe, models: Sequence[Checkpoint | Adapter], reference: Checkpoint | None, targets: Iterable[str]
) -> tuple[Stacks, str | None]:
    """Find the stacks of blocks, and return a remark where their number is only a guess.

    Blocks are counted in the reference's names. Without one their number is taken from the config of the base that the
    adapters state, if it is at hand, from ``layers``, or from the largest index that any adapter touches.
    """
    if reference is not None:
        stacks = Stacks.from_names(reference.tensors, single=reference.single)
        stated = recipe.layers or reference.layers
        return (
            stacks.with_layers(recipe.layers) if recipe.layers else stacks.limit(stated) if stated else stacks
        ), None
    stacks = Stacks.from_names(targets, complete=False)
    if recipe.layers:
        return stacks.with_layers(recipe.layers), None
    if not stacks.lengths:
        return stacks, None
    declared = next((model.base for model in models if isinstance(model, Adapter) and model.base), None)
    stated = _declared_layers(declared) if declared and recipe.method.by_depth else None
    if stated and len(stacks.lengths) == 1:
        return stacks.with_layers(stated), None
    counted = ", ".join(f"{length} under {prefix}" for prefix, length in stacks.lengths.items())
    return (
        stacks,
        f"the number of blocks is taken from the adapters ({counted}): give {option('base')} or {option('layers')} if "
        f"it is larger",
    )


def mark_experts(site: Site, inputs: Iterable[object]) -> Site:
    """Return the site as one of stacked experts if any of the inputs is a change of experts."""
    if any(isinstance(each, Change) and each.kind == "experts" for each in inputs):
        return replace(site, kind="experts")
    return site


def _declared_layers(name: str) -> int | None:
    """Return the number of blocks of a base by its stated name: a folder, or in the Hub's cache, or on the Hub."""
    if is_store_address(name):
        return None
    local = Path(name).expanduser() / "config.json"
    path = local if local.is_file() else _hub_config(name)
    if path is None:
        return None
    try:
        return config_layers(read_json(path))
    except MergingError:
        return None


def _hub_config(name: str) -> Path | None:
    from urllib.request import Request, urlopen

    from huggingface_hub import hf_hub_download, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        if is_offline_mode():
            return None
        # Asked once, since the library asks again and again for half a minute where there is no network.
        urlopen(Request(hf_hub_url(name, "config.json"), method="HEAD"), timeout=3).close()
        return Path(hf_hub_download(name, "config.json"))
    except (HFValidationError, OSError, ValueError):
        return None  # not a Hub name, not there, or nobody answers: there are other ways to count
