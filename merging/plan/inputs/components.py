"""The components of pipelines that are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from merging.errors import InputError, OptionError, nearest, option
from merging.plan.recipe import Recipe
from merging.sources import Checkpoint, Model

__all__ = ["select_components"]


def select_components(
    recipe: Recipe, models: Sequence[Model], base: Checkpoint | None
) -> tuple[tuple[Model, ...], Checkpoint | None]:
    """Return the models with the components that are merged: all, unless the recipe names some.

    Where it names one, a model that is no pipeline stands for that component.

    Raises:
        OptionError: for names of no component.
        InputError: for pipelines that have different components.
    """
    checkpoints = [model for model in ([base, *models] if base else models) if isinstance(model, Checkpoint)]
    first = checkpoints[0] if checkpoints else None
    if recipe.components and (first is None or not first.components):
        what = first.path if first else recipe.models[0]
        raise OptionError(
            f"{option('components')} chooses among the models of a pipeline, and {what} is none: leave it out"
        )
    if first is None or not first.components:
        return tuple(models), base
    for name in recipe.components:
        if name not in first.components:
            raise OptionError(
                f"{first.path} has no component {name!r}{nearest(name, first.components)}: it has "
                f"{', '.join(each or 'the model itself' for each in first.components)}"
            )
    wanted = recipe.components or tuple(first.components)
    for model in checkpoints:
        if not model.components and len(wanted) > 1:
            raise InputError(
                f"{model.path} is not a pipeline, unlike {first.path}: say by {option('components')} which part of one "
                f"it is"
            )
        lacking = sorted(set(wanted) - set(model.components))
        extra = sorted(set(model.components) - set(wanted)) if not recipe.components else []
        if model.components and (lacking or extra):
            what = f"lacks the component {lacking[0]}" if lacking else f"has a component {extra[0]}"
            raise InputError(
                f"{model.path} {what}, unlike {first.path}: name those to merge with {option('components')}, and the "
                f"others are {first.path.name}'s"
            )

    return (
        tuple(_narrow(model, wanted) if isinstance(model, Checkpoint) else model for model in models),
        _narrow(base, wanted) if base else None,
    )


def _narrow(model: Checkpoint, wanted: Sequence[str]) -> Checkpoint:
    if model.components:
        return model.narrow(wanted)
    return replace(model, tensors={f"{wanted[0]}.{name}": stored for name, stored in model.tensors.items()})
