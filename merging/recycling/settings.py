"""The settings of a recycling run: declared once, with default, bounds and one line of help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from merging.display.tables import Displayed
from merging.errors import OptionError, explain_invalid, nearest
from merging.sources.dtypes import plain_dtype

__all__ = ["Granularity", "Selection", "Settings", "make_settings"]

Granularity = Literal["expert", "layer", "sublayer", "module", "rank"]
"""The unit of a coefficient: an adapter, or its part in a layer, in a layer's attention or MLP, in a module, or in one
rank of a module."""

Selection = Literal["evaluation", "screen", "cosine", "clamp", "clamp_pm", "abs", "quasi_fim", "l2", "random", "rank"]


class Settings(Displayed, BaseModel):
    """Everything that decides the result, except the pool, the base and the examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    select: Selection = Field(
        "evaluation",
        description="how adapters are ranked: by their loss on the examples (evaluation), by one gradient of the base "
        "(screen), by similarity to the target LoRA (cosine and its variants, l2), at random, or by their rank",
    )
    k: int = Field(30, ge=1, description="how many adapters are mixed")
    owner_cap: int | None = Field(10, ge=1, description="most adapters of one owner")
    dedupe: bool = Field(True, description="take one of several adapters whose cosine is above 0.9999")
    target_lora: str = Field(
        "train",
        description="an adapter for this very task to mix in first: train one on the examples, none, or a path",
    )
    method: str = Field(
        "ours",
        description="how they are mixed: ours, cat, adamerging (tuned by gradient), lorahub (searched), or a method of "
        "merge methods, untuned, such as linear or ties",
    )
    granularity: Granularity | None = Field(
        None, description="the unit of a coefficient, instead of the method's own choice"
    )
    rank: int | None = Field(None, ge=1, description="rank of the result; by default lossless")
    head: Literal["auto", "model", "labels", "prototypes"] = Field(
        "auto",
        description="how classes are distinguished: by the model's own head, the embeddings of the labels' names, or "
        "the mean embeddings of the training texts of each class; no head is tuned",
    )
    chat: bool = Field(False, description="put prompts into the tokenizer's chat template")
    max_length: Annotated[int | None, Field(ge=2)] = Field(
        None, description="most tokens of a text or prompt; by default the model's limit, at most 512"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type the model runs in; by default float32 on a CPU, its own on a GPU"
    )
    steps: int | None = Field(None, ge=1, description="steps of tuning, or evaluations of a search")
    rate: float | None = Field(None, gt=0, le=1e3, allow_inf_nan=False, description="learning rate of the coefficients")
    l1: float | None = Field(
        None, ge=0, le=1e3, allow_inf_nan=False, description="weight of the mean size of coefficients"
    )
    batch: int = Field(8, ge=1, description="examples a step of tuning")
    micro_batch: int = Field(8, ge=1, description="examples that go through the model at once, when it is tuned")
    every: int = Field(10, ge=1, description="steps between validations; a killed run can resume after each of them")
    patience: int = Field(20, ge=1, description="validations without a better one, after which tuning stops")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA trained on the examples")
    lora_steps: int = Field(200, ge=1, description="steps it is trained for")
    lora_rates: tuple[Annotated[float, Field(gt=0, le=10)], ...] = Field(
        (3e-4, 1e-3, 3e-3), min_length=1, description="learning rates it is tried with"
    )
    metric: Literal["auto", "accuracy", "loss"] = Field(
        "auto",
        description="measure by which rows are compared; by default accuracy, or loss where texts are only continued",
    )
    draws: int = Field(1, ge=1, description="random draws of each control")
    resamples: int = Field(10_000, ge=100, description="resamples of the bootstrap")
    seed: int = Field(0, ge=0, description="seed of every random choice")

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_name(cls, value: Any) -> Any:
        """Accept torch's own types, such as ``torch.bfloat16``."""
        return plain_dtype(value)


def make_settings(values: dict[str, Any]) -> Settings:
    """Return settings from plain values. Raises :class:`~merging.errors.OptionError`, naming the field."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise OptionError(f"there is no option {field!r}{nearest(field, Settings.model_fields)}") from None
        raise OptionError(f"{field} = {first['input']!r}: {explain_invalid(first)}") from None
