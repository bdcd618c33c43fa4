"""Export of a store: the merge of all its models, under the name of the store's method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merging.api.merge_files import Merged, merge_plan
from merging.continual.manifest import Manifest, StepRecord
from merging.continual.state import HeldChange
from merging.continual.update_rules import history_of, rule_of
from merging.errors import OptionError, option
from merging.methods import chain
from merging.methods.contract.method import Method
from merging.plan import PORTABLE_RANKS, Plan, plan_of
from merging.plan.recipe_values import make_recipe
from merging.sources import Adapter, Checkpoint
from merging.sources.origin import Origin

__all__ = ["export"]


@dataclass(frozen=True, slots=True)
class _NotedOrigin(Origin):
    """A model that was merged before, as the manifest noted it: its files may be gone."""

    def __str__(self) -> str:
        return self.repo


def export(
    manifest: Manifest,
    states: Sequence[Adapter],
    base: Checkpoint,
    destination: Path,
    *,
    recipe: dict[str, Any],
    **execution: Any,
) -> Merged:
    """Write the merge of all models of a store.

    ``states`` are the parts of the last state. ``recipe`` has the settings of the output, ``execution`` the options of
    :func:`~merging.api.merge_files.merge_plan`.
    """
    if recipe["as"] == "adapter" and recipe["rank"] is None:
        _require_rank(states)
    grows = chain(manifest.method, manifest.parameters)
    method = rule_of(manifest).result(history_of(manifest))
    names = tuple(_name(step) for step in manifest.steps)
    stated = make_recipe({"models": names, "method": method, **recipe}, "export")
    plan = plan_of(stated, states, base, () if destination.suffix else PORTABLE_RANKS)
    return merge_plan(plan, destination, shown=_described_plan(plan, manifest, grows, names), **execution)


def _require_rank(states: Sequence[Adapter]) -> None:
    """Raise :class:`~merging.errors.OptionError` for matrices that are held in full, and so have no rank."""
    held = [change for state in states for change in state.changes.values() if isinstance(change, HeldChange)]
    matrices = {change.target for change in held if change.kind != "full"}
    if matrices:
        raise OptionError(
            f"{len(matrices)} matrices are held in full ({min(matrices)} is one), and an adapter holds as much of them "
            f"as its rank allows: choose a rank with {option('rank')}, or export a model"
        )


def _described_plan(plan: Plan, manifest: Manifest, grows: Method, names: tuple[str, ...]) -> Plan:
    """Return the plan that the header and the model card describe: the store's method on all its models."""
    dialect = next(model.dialect for model in plan.models if isinstance(model, Adapter))
    base = str(plan.base.origin) if plan.base and plan.base.origin else Path(manifest.base.path).name
    recipe = plan.recipe.model_copy(update={"method": grows, "base": base})
    models = (
        Adapter(Path(name), {}, (), dialect, step.stated_base, origin=_NotedOrigin(name, "", "", step.licence))
        for name, step in zip(names, manifest.steps, strict=True)
    )
    return replace(plan, recipe=recipe, models=tuple(models))


def _name(step: StepRecord) -> str:
    """Return the name of a model on the card: its name on the Hub or of its folder, never a path of this machine."""
    path = Path(step.source)
    return path.name if path.is_absolute() else step.source
