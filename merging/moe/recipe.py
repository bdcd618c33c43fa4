"""Recipes of mixtures of experts, in mergekit's schema and with SMILE's settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from merging.display.tables import Displayed
from merging.errors import FormatError, MergingWarning, OptionError, explain_invalid, nearest
from merging.moe.model_name import ModelName, read_model_name
from merging.plan.checked_model import CheckedModel, named_keys
from merging.plan.mergekit.reading import Reading
from merging.plan.recipe_document import Keys, RecipeDocument, parse_documents
from merging.sources.dtypes import plain_dtype
from merging.sources.small_files import RECIPE_LIMIT, read_text
from merging.type_checks import check_types

__all__ = [
    "ARCHITECTURES",
    "GATE_MODES",
    "PROMPTED",
    "ExpertEntry",
    "MoeRecipe",
    "load_moe_recipe",
    "read_moe_recipe",
    "spelled_out",
]

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random", "smile"]

GATE_MODES: tuple[str, ...] = (
    "hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random", "smile"
)  # fmt: skip
"""The ways to make routers."""

PROMPTED = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
"""The ways that need prompts for every expert."""

ARCHITECTURES = {
    "mixtral": ("mixtral",),
    "deepseek": ("deepseek",),
    "deepseek moe": ("deepseek",),
    "qwen": ("qwen2_moe", "qwen3_moe"),
    "qwen moe": ("qwen2_moe",),
    "qwen2 moe": ("qwen2_moe",),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
    "qwen3 moe": ("qwen3_moe",),
}
"""The types of models that each name of an architecture means."""

Place = Callable[[Keys], str]
"""A function that returns the place of a value from its keys, for errors."""

_OF_MERGES = dict.fromkeys(
    ("models", "slices", "modules", "merge_method", "method", "stack"), "it belongs to a merge: use `merge run`"
)
"""Words about keys of other recipes."""

_SMILE_ONLY = ("rank", "gate_rank", "others")


class ExpertEntry(Displayed, CheckedModel):
    """A model whose MLPs become experts; with SMILE, its changes from the base do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_model: ModelName
    positive_prompts: tuple[str, ...] = Field((), description="texts that should reach the expert")
    negative_prompts: tuple[str, ...] = Field((), description="texts that should not")
    noise_scale: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="standard deviation of normal noise on its weights"
    )
    residual_scale: float | None = Field(
        None, allow_inf_nan=False, description="factor of its output, by its down projections"
    )

    @field_validator("positive_prompts", "negative_prompts", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()


class MoeRecipe(Displayed, CheckedModel):
    """A mixture of experts: a base, its experts, and the way to make the router. Frozen and comparable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: ModelName = Field(description="the model of everything but the experts")
    experts: Annotated[tuple[ExpertEntry, ...], Field(min_length=1)]
    gate_mode: GateMode = Field("hidden", description="how routers are made")
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="type of every tensor; by default the type that the tensor has in the base"
    )
    experts_per_token: int = Field(2, ge=1, description="experts that each token reaches; 1 with smile")
    shared_experts: tuple[ExpertEntry, ...] = Field((), description="at most one expert that every token reaches")
    architecture: str | None = Field(None, description="type of the mixture; by default found from the base")
    seed: int = Field(0, description="seed of noise and of random routers, with the content of the base")
    rank: Annotated[int, Field(ge=1)] | Literal["full"] = Field(
        32, description="smile: rank of the experts, or full; changes of a lower rank keep theirs"
    )
    gate_rank: int = Field(16, ge=1, description="smile: singular vectors that the router compares a token with")
    others: Literal["base", "average"] = Field(
        "base", description="smile: tensors that are no matrices of linear layers: the base's, or the experts' mean"
    )

    @field_validator("shared_experts", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return value or ()

    @property
    def prompted(self) -> bool:
        """Whether its router needs prompts."""
        return self.gate_mode in PROMPTED

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, in plain values, in the schema that is read."""
        values = self.model_dump(exclude_defaults=True, exclude={"base_model", "experts", "shared_experts"})
        if self.gate_mode == "smile":  # which has another default
            values["experts_per_token"] = self.experts_per_token
        listed = {key: [_state(each) for each in getattr(self, key)] for key in ("experts", "shared_experts")}
        return {"base_model": str(self.base_model), **values, **{key: each for key, each in listed.items() if each}}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which :func:`load_moe_recipe` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _state(expert: ExpertEntry) -> dict[str, Any]:
    facts = expert.model_dump(exclude_defaults=True, exclude={"source_model"})
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}
    return {"source_model": str(expert.source_model), **lists}


@check_types()
def load_moe_recipe(source: str | Path | Mapping[str, Any] | MoeRecipe, *, lenient: bool = False) -> MoeRecipe:
    """Read the recipe of a mixture of experts.

    Args:
        source: the path of a YAML file, YAML itself (a text of several lines), the values of a recipe, or a recipe.
            Relative paths in a file are relative to its folder, all others to the working folder.
        lenient: whether unknown keys, which mergekit ignores, are ignored with a warning.

    Returns:
        The recipe, with all paths relative to the working folder.

    Raises:
        FormatError: for a file that is no YAML mapping.
        OptionError: for keys or values that no recipe has. The error names the line.
        InputError: for a file that is not there.
    """
    recipe, notices = read_moe_recipe(source, lenient=lenient)
    for notice in notices:
        warnings.warn(notice, MergingWarning, stacklevel=2)
    return recipe


def read_moe_recipe(
    source: str | Path | Mapping[str, Any] | MoeRecipe, *, lenient: bool = False
) -> tuple[MoeRecipe, list[str]]:
    """Return a recipe and remarks about it. The arguments and errors are as for :func:`load_moe_recipe`."""
    if isinstance(source, MoeRecipe):
        _check(source, source.to_dict(), lambda keys: "recipe")
        return source, []
    if isinstance(source, Mapping):
        reading = Reading(RecipeDocument(_to_plain(source), {(): "recipe"}), lenient)
        return _make(reading, None), reading.notices
    text, where, folder = str(source), "recipe", None
    if isinstance(source, Path) or "\n" not in text:
        path = Path(source)
        text, where, folder = read_text(path, RECIPE_LIMIT, given=True), str(path), path.parent
    documents = parse_documents(text, where)
    if len(documents) > 1:
        raise FormatError(f"{documents[1].origin(())}: a recipe of a mixture is one document, and this is a second one")
    reading = Reading(documents[0], lenient)
    return _make(reading, folder), reading.notices


def _to_plain(value: Any) -> Any:
    """Return values of Python as YAML has them."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(each) for each in value]
    return str(value) if isinstance(value, (Path, ModelName)) else plain_dtype(value)


def _make(reading: Reading, folder: Path | None) -> MoeRecipe:
    place = reading.document.origin
    values = reading.check_keys((), "a recipe of a mixture", _list_keys(MoeRecipe) | _OF_MERGES)
    for key in ("base_model", "experts"):
        if values.get(key) is None:
            raise reading.error((key,), f"the recipe has no {key!r}")
    values["base_model"] = read_model_name(reading, ("base_model",), folder)
    for key in ("experts", "shared_experts"):
        if values.get(key) or key == "experts":
            values[key] = [
                _read_expert(reading, (key, index), folder) for index, _ in enumerate(reading.items((key,), key))
            ]
    if values.get("gate_mode") == "smile":
        values.setdefault("experts_per_token", 1)
    try:
        recipe = MoeRecipe.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, place) from None
    _check(recipe, values, place)
    return recipe


def _list_keys(schema: type[BaseModel]) -> dict[str, str]:
    return dict.fromkeys(schema.model_fields, "")


def _read_expert(reading: Reading, keys: Keys, folder: Path | None) -> dict[str, Any]:
    values = reading.check_keys(keys, "an expert", _list_keys(ExpertEntry))
    if values.get("source_model") is None:
        raise reading.error(keys, "the expert has no 'source_model'")
    return {**values, "source_model": read_model_name(reading, (*keys, "source_model"), folder)}


def _refusal(error: ValidationError, place: Place) -> OptionError:
    first = error.errors()[0]
    keys = named_keys(first["loc"])
    reason = explain_invalid(first)
    if first["type"] == "literal_error":
        choices = [word.strip(" '") for word in str(first["ctx"]["expected"]).replace(" or ", ",").split(",")]
        reason = f"there is no such {keys[-1]}{nearest(str(first['input']), choices)}: {reason}"
    return OptionError(f"{place(keys)}: {'.'.join(map(str, keys))} = {str(first['input'])[:80]!r}: {reason}")


def _check(recipe: MoeRecipe, values: Mapping[str, Any], place: Place) -> None:
    """Refuse settings that do not go together. Raises :class:`~merging.errors.OptionError`."""
    count = len(recipe.experts)
    if recipe.experts_per_token > count:
        raise OptionError(
            f"{place(('experts_per_token',))}: each token should reach {recipe.experts_per_token} experts "
            f"(experts_per_token), and there are {count}: add experts, or set experts_per_token to at most {count}"
        )
    if recipe.architecture is not None and spelled_out(recipe.architecture) not in ARCHITECTURES:
        raise OptionError(
            f"{place(('architecture',))}: there is no architecture {recipe.architecture!r}"
            f"{nearest(spelled_out(recipe.architecture), ARCHITECTURES)}: use mixtral, deepseek, qwen or qwen3"
        )
    if len(recipe.shared_experts) > 1:
        raise OptionError(f"{place(('shared_experts', 1))}: there can be one shared expert, and this is a second one")
    _check_smile(recipe, values, place)
    if recipe.prompted:
        _check_prompts(recipe.experts, place)


def spelled_out(architecture: str) -> str:
    """Return the name of an architecture as it is a key of :data:`ARCHITECTURES`."""
    return architecture.lower().replace("_", " ").replace("-", " ")


def _check_smile(recipe: MoeRecipe, values: Mapping[str, Any], place: Place) -> None:
    if recipe.gate_mode != "smile":
        for key in _SMILE_ONLY:
            if key in values:
                raise OptionError(f"{place((key,))}: {key} is a setting of gate_mode: smile")
        return
    for key in ("architecture", "shared_experts"):
        if getattr(recipe, key):
            raise OptionError(f"{place((key,))}: a mixture by smile has no {key}: leave it out")
    for index, expert in enumerate(recipe.experts):
        for key in ("positive_prompts", "negative_prompts", "noise_scale", "residual_scale"):
            if getattr(expert, key):
                raise OptionError(
                    f"{place(('experts', index, key))}: smile makes its routers from the weights alone: leave {key} out"
                )


def _check_prompts(experts: Sequence[ExpertEntry], place: Place) -> None:
    for index, expert in enumerate(experts):
        if not expert.positive_prompts:
            raise OptionError(
                f"{place(('experts', index))}: expert {index} ({expert.source_model}) has no positive_prompts: give "
                f"texts that should reach it, or use gate_mode: random, or smile, which needs none"
            )
    prompts = {(each.positive_prompts, each.negative_prompts) for each in experts}
    if len(experts) > 1 and len(prompts) == 1:
        raise OptionError(
            f"{place(('experts',))}: all experts have the same prompts, so that no router can choose between them: "
            f"give each expert prompts of its own"
        )
