"""Files with statistics of examples: each is matched to the model that it was gathered of, and to the items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from merging.display.tables import plural
from merging.errors import InputError, OptionError, option
from merging.hub.address import local_path
from merging.maths.layer_statistics import LayerStatistics
from merging.methods.contract.method import Method, StatisticsKind
from merging.plan.checks import key_of
from merging.plan.items import Item
from merging.plan.recipe import Recipe
from merging.sources import Model
from merging.sources.name_ends import find_by_end, index_ends
from merging.sources.statistics_file import FISHER, REST, StatisticsFile, StoredStatistics, open_statistics

__all__ = [
    "StatisticsLookup",
    "attach_statistics",
    "check_kind",
    "find_needed_statistics",
    "match_statistics",
    "model_keys",
]


def match_statistics(recipe: Recipe, models: Sequence[Model]) -> tuple[StatisticsFile, ...]:
    """Open the recipe's statistics, and return the file of each model, found by the key of its content.

    Raises:
        OptionError: for statistics that the method needs and lacks, or has and does not need.
        InputError: for statistics of another model, and for a model without any.
    """
    needed = find_needed_statistics(recipe.method)
    if needed is None:
        if recipe.stats:
            raise OptionError(
                f"{option('stats')} is for methods that need statistics of examples, such as regmean and fisher, and "
                f"{recipe.method.chain} needs none: leave it out"
            )
        return ()
    name, kind = needed
    if not recipe.stats:
        raise OptionError(
            f"{name} needs statistics of examples: gather them of each model with merge stats, and give the files with "
            f"{option('stats')}"
        )
    files = [open_statistics(local_path(path)) for path in recipe.stats]
    keys = [model_keys(model) for model in models]
    for file in files:
        if not any({file.key, file.origin} & key for key in keys):
            raise InputError(
                f"{file.path}: holds statistics of {file.model}, whose content is none of the models' here: gather "
                f"statistics of the model that is merged, with merge stats"
            )
        check_kind(file, kind, name)
        _check_together(file, keys)
    matched = []
    for model, key in zip(models, keys, strict=True):
        own = [file for file in files if {file.key, file.origin} & key]
        if not own:
            raise InputError(
                f"{model.path}: no file of {option('stats')} holds its statistics: gather them with merge stats"
            )
        if len(own) > 1:
            raise InputError(f"{own[0].path} and {own[1].path} hold statistics of one model: give one of them")
        matched.append(own[0])
    return tuple(matched)


def model_keys(model: Model) -> set[str]:
    """Return the key of a model's content and its address on the Hub. Files of statistics name a model by them."""
    return {key_of(model), *([str(model.origin)] if model.origin else [])}


def find_needed_statistics(method: Method) -> tuple[str, StatisticsKind] | None:
    """Return the method of a chain that needs statistics, and their kind."""
    found = [(link.name, link.needs_statistics) for link in method.links() if link.needs_statistics]
    return (found[0][0], found[0][1]) if found and found[0][1] is not None else None


def check_kind(file: StatisticsFile, kind: StatisticsKind, name: str) -> None:
    """Refuse a file without the statistics that a method needs. Raises :class:`~merging.errors.InputError`."""
    if kind == "fisher" and not file.has_fisher:
        raise InputError(
            f"{file.path}: holds no Fisher information, which {name} needs: gather it by merge stats with "
            f"{option('fisher', 'sampled')}"
        )
    if kind == "inputs" and not file.has_inputs:
        raise InputError(f"{file.path}: holds no statistics of layers' inputs, which {name} needs: gather them again")


def _check_together(file: StatisticsFile, keys: Sequence[Set[str]]) -> None:
    """Refuse statistics through a merge of other models. Raises :class:`~merging.errors.InputError`."""
    through = file.facts.get("through_merge")
    if through is None:
        return
    together = through["models"]
    if len(together) != len(keys) or not all(key & set(together) for key in keys):
        raise InputError(
            f"{file.path}: holds statistics through a merge of {plural(len(together), 'model')}, and others are merged "
            f"here: gather statistics through the merge of these models"
        )


def attach_statistics(
    items: Iterable[Item], files: Sequence[StatisticsFile], method: Method
) -> tuple[list[Item], list[str]]:
    """Return the items with the statistics of each model, and remarks on tensors that take the mean without them.

    Raises:
        OptionError: if the method needs statistics, and there are none in this kind of merge.
        InputError: for statistics whose shape is not the tensor's, and if no tensor has any.
    """
    items, needed = list(items), find_needed_statistics(method)
    if needed is None:
        return items, []
    name, kind = needed
    if not files:
        raise OptionError(
            f"{name} needs statistics of examples, which only a merge of models in files reads, with {option('stats')}"
        )
    lookups = [StatisticsLookup(file, kind) for file in files]
    attached, without = [], []
    for item in items:
        if item.form == "copy" or (kind == "inputs" and item.site.kind != "matrix"):
            attached.append(replace(item, layer_statistics=(None,) * len(files)))
            continue
        found = tuple(_find_for(item, lookup) for lookup in lookups)
        if not all(found):
            without.append(item.site.name)
        attached.append(replace(item, layer_statistics=found))
    merged = [item for item in attached if any(item.layer_statistics)]
    if not merged:
        raise InputError(
            f"{files[0].path}: its statistics are of other layers than the merged ones: gather them of these models"
        )
    if not without:
        return attached, []
    take = "takes" if len(without) == 1 else "take"
    count = plural(len(without), "tensor")
    return attached, [f"{count} without statistics in some model {take} the mean, such as {without[0]}"]


def _find_for(item: Item, lookup: StatisticsLookup) -> LayerStatistics | None:
    shape = item.site.shape
    return lookup.find(item.site.name, shape if lookup.kind == "fisher" else (shape[item.site.axis],))


class StatisticsLookup:
    """Finds the statistics of tensors in one file, by the whole name or by its end."""

    def __init__(self, file: StatisticsFile, kind: StatisticsKind) -> None:
        self.file, self.kind = file, kind
        self.layers = file.layers(FISHER if kind == "fisher" else REST)
        self.ends = index_ends(self.layers)

    def find(self, name: str, wanted: tuple[int, ...]) -> LayerStatistics | None:
        """Return the statistics of a tensor. Raises :class:`~merging.errors.InputError` for another shape.

        ``wanted`` is the shape of the tensor for the Fisher information, and ``(in,)`` for Gram matrices.
        """
        found = find_by_end(name, self.layers, self.ends)
        if found is None:
            return None
        layer = self.layers[found]
        stored = self.file.tensors[f"{FISHER if self.kind == 'fisher' else REST}/{layer}"]
        if stored.shape != wanted:
            raise InputError(
                f"{self.file.path}: the statistics of {name} are of shape {list(stored.shape)}, and the tensor wants "
                f"{list(wanted)}: gather them of this model"
            )
        if self.kind == "fisher":
            return StoredStatistics(self.file, None, layer)
        return StoredStatistics(self.file, layer, None)
