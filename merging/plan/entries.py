"""The models of a recipe, opened: names, and stacks of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merging.errors import InputError, OptionError
from merging.hub.open_model import open_model
from merging.maths.parameters import bind_value, patterns
from merging.maths.patterns import explain_unmatched
from merging.maths.site import Site
from merging.plan.layer_stack import LayerPart, LayerStack
from merging.plan.provenance import names_of
from merging.plan.recipe import DTYPES, Entry, Recipe
from merging.plan.stages import Stage
from merging.plan.tokens.matching import MatchedTokens, match_tokens
from merging.sources import Checkpoint, Model
from merging.sources.stacked_layers import StackPart, stack_layers

__all__ = ["MakeStage", "Opened", "open_entries"]

_NAMED = 3
"""The most parts of a stack that its name in messages lists."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """The models of a recipe.

    Attributes:
        recipe: the recipe, whose entries name models of the Hub by their commits.
        models: the models, in the order of the recipe.
        base: the base, if there is one.
        files: the models in files that are read, by their names in the recipe.
        stages: the merges whose outputs are among the models, each once.
        matched: the tokens of the models in files, where these are matched before models are made of them.
    """

    recipe: Recipe
    models: tuple[Model, ...]
    base: Model | None
    files: Mapping[str, Model]
    stages: tuple[Stage, ...]
    matched: MatchedTokens | None = None


MakeStage = Callable[[Recipe, str, Mapping[str, Model]], Stage]
"""A function that makes a stage of a recipe, its place in the outer recipe (``models.1``), and models by name whose
tokens are matched already."""


def open_entries(recipe: Recipe, make_stage: MakeStage, place: str, matched: Mapping[str, Model]) -> Opened:
    """Open the models and the base of a recipe.

    Args:
        recipe: the recipe.
        make_stage: makes a stage of a recipe among them.
        place: the place of the recipe in an outer one, empty if there is none.
        matched: models by their names whose tokens an outer recipe has matched.

    Raises:
        MergingError: for a model that cannot be opened.
    """
    opener = _Opener(recipe, make_stage, matched if recipe.tokenizer is None else {})
    tokens = opener.match_tokens()
    above = f"{place}." if place else ""
    opened = [opener.open_entry(entry, f"{above}models.{index}") for index, entry in enumerate(recipe.models)]
    base = None if recipe.base is None else opener.open_entry(recipe.base, f"{above}base")
    pins = {name: str(model.origin) for name, model in opener.files.items() if model.origin}
    update: dict[str, object] = {"models": tuple(entry for _, entry in opened), "base": base and base[1]}
    if recipe.tokenizer is not None:
        update["tokenizer"] = recipe.tokenizer.rename(lambda name: pins.get(name, name))
    return Opened(
        recipe=recipe.model_copy(update=update),
        models=tuple(model for model, _ in opened),
        base=base and base[0],
        files=opener.files,
        stages=tuple(opener.stages),
        matched=tokens,
    )


@dataclass(slots=True)
class _Opener:
    """Opens entries, each name once, with the recipe's options."""

    recipe: Recipe
    make_stage: MakeStage
    matched: Mapping[str, Model]
    files: dict[str, Model] = field(default_factory=dict)
    stages: dict[Stage, None] = field(default_factory=dict)

    def match_tokens(self) -> MatchedTokens | None:
        """Match the models in files by token, where models are made of them; else this is done later.

        The parts of a stack have rows of different models, which have to be of one vocabulary before. A recipe with a
        tokenizer of its own makes a model with a tokenizer, which is matched later.
        """
        entries = [*self.recipe.models, *([self.recipe.base] if self.recipe.base is not None else [])]
        inner = [each for entry in entries for each in _recipes_in(entry)]
        plain = all(isinstance(entry, str) for entry in entries)
        if self.recipe.tokenizer is None or plain or any(each.tokenizer is not None for each in inner):
            return None
        names = list(dict.fromkeys(name for entry in entries for name in names_of(entry)))
        opened = [(name, self.open_entry(name, name)[0]) for name in names]
        stated = [each.base for each in (self.recipe, *inner) if isinstance(each.base, (str, LayerStack))]
        bases = {name for entry in stated for name in names_of(entry)}
        base = names.index(bases.pop()) if len(bases) == 1 else None
        found = match_tokens(self.recipe.tokenizer, opened, base)
        self.matched = dict(zip(names, found.models, strict=True))
        return found

    def open_entry(self, entry: Entry, place: str) -> tuple[Model, Entry]:
        """Return the model of an entry, and the entry with models of the Hub named by their commits."""
        if isinstance(entry, LayerStack):
            return self._open_stack(entry, place)
        if isinstance(entry, Recipe):
            stage = self.make_stage(entry, place, self.matched)
            self.stages[stage] = None
            self.files |= {name: model for name, model in stage.plan.files.items() if name not in self.files}
            return stage.model, stage.plan.recipe
        if entry not in self.files:
            self.files[entry] = open_model(entry, self.recipe.lora_alpha, self.recipe.dequantise)
        model = self.files[entry]
        return self.matched.get(entry, model), str(model.origin or entry)

    def _open_stack(self, stack: LayerStack, place: str) -> tuple[Checkpoint, LayerStack]:
        parts, pinned = [], []
        for index, part in enumerate(stack.parts):
            model, entry = self.open_entry(part.model, f"{place}.stack.{index}.model")
            if not isinstance(model, Checkpoint):
                raise InputError(
                    f"{model.path}: is an adapter, and layers are taken of full models: merge it into its base first, "
                    f"by a recipe in the place of the model"
                )
            if not self.recipe.allow_unmatched:
                _check_patterns(part, model)
            widest = DTYPES[self.recipe.dtype] if self.recipe.dtype else None
            parts.append(StackPart(model, str(model.path), part.stack, part.bounds, _scale_of(part), widest=widest))
            pinned.append(part.model_copy(update={"model": entry}))
        return stack_layers(parts, _label(parts)), stack.model_copy(update={"parts": tuple(pinned)})


def _recipes_in(entry: Entry) -> Iterator[Recipe]:
    """Yield the recipes in an entry, itself if it is one."""
    if isinstance(entry, LayerStack):
        for part in entry.parts:
            yield from _recipes_in(part.model)
    elif isinstance(entry, Recipe):
        yield entry
        for each in (*entry.models, *([entry.base] if entry.base is not None else [])):
            yield from _recipes_in(each)


def _check_patterns(part: LayerPart, model: Checkpoint) -> None:
    """Refuse a scale for tensors that a model does not have. Raises :class:`~merging.errors.OptionError`."""
    for pattern in patterns(part.scale):
        if problem := explain_unmatched(pattern, list(model.tensors)):
            raise OptionError(f"{pattern!r} in scale {problem}")


def _scale_of(part: LayerPart) -> Callable[[Site], float]:
    """Return the number that multiplies a tensor of a part, by its site."""

    def scale(site: Site) -> float:
        try:
            return float(bind_value(part.scale, site))
        except ValueError as error:
            raise OptionError(f"scale: {error}") from None

    return scale


def _label(parts: list[StackPart]) -> str:
    """Return the name of a stack in messages."""
    named = [
        f"{Path(part.name)}[{part.layers[0]}:{part.layers[1]}]" if part.layers else part.name for part in parts[:_NAMED]
    ]
    more = len(parts) - _NAMED
    return " + ".join(named) + (f" + {more} more" if more > 0 else "")
