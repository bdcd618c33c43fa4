"""The settings by which a base was quantised for the training of its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field, model_serializer, model_validator

from merging.display.tables import Displayed
from merging.maths.patterns import explain_unmatched
from merging.plan.checked_model import CheckedModel

__all__ = ["AsTrained", "TrainedFormat", "stated_format"]

TrainedFormat = Literal["nf4", "fp4", "int8"]
"""Formats in which bitsandbytes holds a base while an adapter is trained."""

Dtype = Literal["float32", "float16", "bfloat16"]


class AsTrained(Displayed, CheckedModel):
    """A base as bitsandbytes quantised it for the training. A format alone stands for these settings too.

    Example:
        >>> import merging
        >>> recipe = merging.Recipe(models=["a"], method="linear", base="base", as_trained="nf4")
        >>> recipe.as_trained
        AsTrained(format='nf4')
        >>> recipe.as_trained.doubled
        True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: TrainedFormat = Field(description="nf4, fp4 or int8")
    double_quant: bool | None = Field(
        None,
        description="whether scales are quantised again; by default of nf4, as scripts of QLoRA do, and not of fp4",
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="number of values that share a scale"
    )
    dtype: Dtype | None = Field(
        None, description="type in which the base was loaded; by default the type in which it is stored"
    )
    skip: tuple[str, ...] = Field((), description="layers that were not quantised: names, parts, or wildcards")
    device: Literal["gpu", "cpu"] = Field(
        "gpu", description="where it was quantised: double quantisation differs in last bits"
    )

    @model_validator(mode="before")
    @classmethod
    def _format_alone(cls, value: Any) -> Any:
        if not isinstance(value, (str, Mapping)):
            raise ValueError("should be nf4, fp4, int8 or a mapping")
        return {"format": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("skip"), str):
            return {**value, "skip": (value["skip"],)}
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> AsTrained:
        if self.format == "int8":
            stated = [
                name for name in ("double_quant", "block_size", "dtype", "device") if name in self.model_fields_set
            ]
            if stated:
                raise ValueError(f"int8 has no {stated[0]}: it has one scale a row, and is made of float16")
        return self

    @model_serializer
    def _plain(self) -> Any:
        fields = {name: getattr(self, name) for name, info in type(self).model_fields.items()}
        defaults = {name: info.default for name, info in type(self).model_fields.items()}
        stated = {name: value for name, value in fields.items() if name == "format" or value != defaults[name]}
        if self.skip:
            stated["skip"] = list(self.skip)
        return self.format if stated.keys() == {"format"} else stated

    def _display_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @property
    def doubled(self) -> bool:
        """Whether scales are quantised again."""
        return self.format == "nf4" if self.double_quant is None else self.double_quant

    def describe(self, dtypes: Sequence[str]) -> str:
        """Return the settings in words, for weights that were of these types."""
        if self.format == "int8":
            return "int8 with a scale a row"
        doubled = "with" if self.doubled else "without"
        return (
            f"{self.format} in blocks of {self.block_size} {doubled} double quantisation, from {' and '.join(dtypes)}"
        )

    def fill(self, config: Mapping[str, Any], names: Sequence[str]) -> AsTrained:
        """Return these settings, with settings that are not stated taken from a config of bitsandbytes.

        Args:
            config: the ``quantization_config`` of a quantised copy of the base.
            names: the names of the base's tensors. Layers that are skipped and that it lacks are left out.
        """
        if stated_format(config) is None:
            return self
        found: dict[str, Any] = {}
        skipped = config.get("llm_int8_skip_modules")
        if isinstance(skipped, list):
            layers = [each for each in skipped if isinstance(each, str) and each]
            found["skip"] = tuple(each for each in layers if not explain_unmatched(each, names))
        if self.format != "int8" and isinstance(config.get("bnb_4bit_use_double_quant"), bool):
            found["double_quant"] = config["bnb_4bit_use_double_quant"]
        new = {name: value for name, value in found.items() if name not in self.model_fields_set}
        return self.model_copy(update=new)


def stated_format(config: Mapping[str, Any]) -> TrainedFormat | None:
    """Return the format that a ``quantization_config`` states, None for one that is not of bitsandbytes."""
    if config.get("quant_method") != "bitsandbytes":
        return None
    if config.get("load_in_8bit"):
        return "int8"
    kind = config.get("bnb_4bit_quant_type", "fp4")
    return kind if kind in get_args(TrainedFormat) else None
