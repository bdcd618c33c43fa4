"""Making a mixture once more from the recipe in its header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from merging.api.rerun import compare_weights, hash_weights
from merging.errors import InputError, OptionError, nearest, option
from merging.hub.address import hub_address, local_path
from merging.moe.make import MOE_RECIPE_KEY, preview_moe
from merging.moe.model_name import ModelName
from merging.moe.plan import MoePlan
from merging.moe.recipe import MoeRecipe, load_moe_recipe
from merging.output.header import SOURCES_KEY
from merging.plan.provenance import describe_change, parse_sources
from merging.serving.subject import Subject, open_subject
from merging.sources.small_files import parse_json

__all__ = ["PlannedMoeRerun", "find_mixture", "plan_moe_rerun"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMoeRerun:
    """A mixture that is to be made once more.

    Attributes:
        path: the mixture that exists.
        plan: the plan, which reads the models where they are now, with their names as they were.
        digests: hashes of the weights files that exist; None where they are not on this machine.
    """

    path: Path
    plan: MoePlan
    digests: tuple[bytes, ...] | None

    def compare(self, made: Path) -> str:
        """Return a remark that compares all weights of the new mixture with the old ones."""
        if self.digests is None:
            return ""
        return compare_weights(made, self.path, self.digests, "models, versions or the processor changed")


def find_mixture(path: str) -> Subject | None:
    """Return a mixture of this package with its header, None for any other file or folder."""
    place = local_path(path) if hub_address(path) is None else None
    if place is not None and (not place.exists() or place.suffix == ".md"):
        return None
    try:
        subject = open_subject(path)
    except InputError:  # a folder of a recipe alone
        return None
    return subject if MOE_RECIPE_KEY in subject.metadata else None


def plan_moe_rerun(
    subject: Subject, sources: Mapping[str, str | Path], *, allow_changed: bool = False
) -> PlannedMoeRerun:
    """Read the recipe of a mixture, find its models, and plan it again.

    Args:
        subject: the mixture, as :func:`find_mixture` returns it.
        sources: places of models that were moved, by their names in the recipe.
        allow_changed: whether models may differ from their records.

    Raises:
        InputError: for a model that is missing or has changed.
        OptionError: for a place of a model that the recipe does not name.
    """
    where = str(subject.weights or subject.name)
    recipe = load_moe_recipe(parse_json(subject.metadata[MOE_RECIPE_KEY], where))
    places = dict(_places(recipe, subject, where, {name: str(place) for name, place in sources.items()}))
    plan = replace(preview_moe(_relocate(recipe, places)), recipe=recipe)
    then = parse_sources(subject.metadata.get(SOURCES_KEY, "[]"), where)
    records = plan.record_sources()
    changes = {each.model: describe_change(then[each.model], each) for each in records if each.model in then}
    changed = [f"{places.get(name, name)} {change}" for name, change in changes.items() if change]
    if changed and not allow_changed:
        raise InputError(
            f"{'; '.join(changed)}: so the output would differ. If that is meant, use {option('allow_changed', True)}"
        )
    place = local_path(subject.name)
    return PlannedMoeRerun(
        path=place,
        plan=replace(plan, records=records, notices=(*changed, *plan.notices)),
        digests=hash_weights(place) if place.exists() else None,
    )


def _names(recipe: MoeRecipe) -> list[str]:
    models = [recipe.base_model, *(each.source_model for each in (*recipe.experts, *recipe.shared_experts))]
    return list(dict.fromkeys(name for each in models for name in (each.model, each.lora) if name))


def _places(recipe: MoeRecipe, subject: Subject, where: str, given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each name of the recipe, and its place: as given, in the working folder, or next to the mixture."""
    names = _names(recipe)
    for name in given:
        if name not in names:
            raise OptionError(f"{where}: the recipe names no {name}{nearest(name, names)}: {', '.join(names)}")
    for name in names:
        if name in given or hub_address(name) or local_path(name).exists():
            yield name, given.get(name, name)
            continue
        beside = subject.folder.parent / name if subject.folder else Path(name)
        if not beside.exists():
            raise InputError(
                f"{name}, a model of {where}, is not at hand: it was looked for as {Path(name).absolute()} and "
                f"{beside.absolute()}. If it was moved, give its place: {option('source', f'{name}=PATH')}"
            )
        yield name, str(beside)


def _relocate(recipe: MoeRecipe, places: Mapping[str, str]) -> MoeRecipe:
    """Return the recipe with the models' places for their names."""

    def move(name: ModelName) -> ModelName:
        return ModelName(places[name.model], None if name.lora is None else places[name.lora])

    def move_all(key: str) -> tuple[object, ...]:
        return tuple(each.model_copy(update={"source_model": move(each.source_model)}) for each in getattr(recipe, key))

    changed = {key: move_all(key) for key in ("experts", "shared_experts")}
    return recipe.model_copy(update={"base_model": move(recipe.base_model), **changed})
