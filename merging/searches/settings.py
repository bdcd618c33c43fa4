"""The settings of a search: declared once, with default, bounds and one line of help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merging.display.tables import Displayed
from merging.errors import OptionError, explain_invalid, nearest
from merging.recycling.settings import Settings

__all__ = ["BY_GRADIENT", "Objective", "SearchSettings", "Strategy", "make_search_settings"]

Objective = Literal["accuracy", "loss", "perplexity", "exact_match", "entropy"]
"""The measure on examples by which candidates are compared."""

Strategy = Literal["auto", "shrink", "cma", "tpe", "gradient", "adamerging"]


BY_GRADIENT = ("gradient", "adamerging")
"""The strategies that tune coefficients by gradient."""


class SearchSettings(Displayed, BaseModel):
    """Everything that decides the result of a search, except the models, the candidates and the examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Literal["auto", "accuracy", "loss", "perplexity", "exact_match", "entropy"] = Field(
        "auto",
        description="what is compared: accuracy, loss, perplexity, exact_match (the whole completion), or entropy, "
        "which needs no labels; by default accuracy, or loss where texts are only continued",
    )
    budget: int = Field(100, ge=1, le=100_000, description="evaluations in all: candidates on some or all examples")
    minutes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="most minutes of all evaluations together"
    )
    strategy: Strategy = Field(
        "auto",
        description="how the best chains are refined after halving: shrink (built in), cma (CMA-ES), tpe (Optuna); or "
        "gradient and adamerging, which tune coefficients by gradient; by default cma if it is installed",
    )
    groups: int = Field(1, ge=1, le=64, description="points along the depth for each range of scale and beta")
    head: Literal["auto", "model", "models", "labels", "prototypes"] = Field(
        "auto",
        description="how classes are distinguished: by the base's own head (model), the head of each task's own model "
        "(models), the embeddings of the labels' names, or the mean embeddings of the validation texts of each class",
    )
    chat: bool = Field(False, description="put prompts into the tokenizer's chat template")
    max_length: Annotated[int | None, Field(ge=2)] = Field(
        None, description="most tokens of a text or prompt; by default the model's limit, at most 512"
    )
    minimize: bool = Field(False, description="lower scores of the command are better")
    score_timeout: float = Field(3600.0, gt=0, description="most seconds for scoring a model by a command")
    steps: int = Field(100, ge=1, description="steps of the strategies by gradient")
    rate: float = Field(0.01, gt=0, le=10, description="learning rate of the strategies by gradient")
    resamples: int = Field(10_000, ge=100, description="resamples of the bootstrap")
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of every random choice")

    def of_models(self) -> Settings:
        """Return the settings by which a model for a task is made."""
        head = "model" if self.head == "models" else self.head
        return Settings(head=head, chat=self.chat, max_length=self.max_length)


def make_search_settings(values: dict[str, Any]) -> SearchSettings:
    """Return settings from plain values. Raises :class:`~merging.errors.OptionError`, naming the field."""
    try:
        return SearchSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise OptionError(f"there is no option {name!r}{nearest(name, SearchSettings.model_fields)}") from None
        raise OptionError(f"{name} = {first['input']!r}: {explain_invalid(first)}") from None
