"""The choice of the ranks of a merged adapter, from the singular values of its changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from merging.display.tables import Displayed
from merging.errors import OptionError, explain_invalid, option
from merging.maths.spectra import RankLimits
from merging.plan.checked_model import CheckedModel
from merging.plan.sizes import parse_size

__all__ = ["RankChoice", "RankSettings", "make_conditions"]


class RankSettings(Displayed, CheckedModel):
    """Conditions on the rank of each tensor's factors; all that are stated hold.

    Example:
        >>> import merging
        >>> recipe = merging.Recipe(models=["a", "b"], method="linear", rank={"energy": 0.9, "most": 32})
        >>> recipe.rank
        RankSettings(most=32, energy=0.9)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    most: int | None = Field(None, ge=1, description="largest rank")
    energy: float | None = Field(
        None, gt=0, le=1, description="share of the energy (squared singular values) that is kept at least"
    )
    error: float | None = Field(None, ge=0, lt=1, description="largest relative error of the change of a tensor")
    sv_ratio: float | None = Field(
        None, ge=1, allow_inf_nan=False, description="largest ratio of the first singular value to any that is kept"
    )
    size: int | None = Field(
        None, ge=1, description="most bytes of the whole file; the directions of most energy for each byte are kept"
    )
    uniform: bool = Field(False, description="one rank for all tensors, the largest that any of them needs")
    exact: bool = Field(False, description="decompose in full precision also where an approximation is quicker")

    @model_validator(mode="after")
    def _has_condition(self) -> RankSettings:
        if all(value is None for value in (self.most, self.energy, self.error, self.sv_ratio, self.size)):
            raise ValueError("needs one of most, energy, error, sv_ratio and size")
        return self

    @field_validator("size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_size(value, "size") if isinstance(value, str) else value

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        stated = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in stated.items() if _is_stated(value)}

    def _display_fields(self) -> dict[str, Any]:
        return self._plain()

    @property
    def limits(self) -> RankLimits:
        """The conditions on the rank of one tensor by itself."""
        return RankLimits(most=self.most, energy=self.energy, error=self.error, sv_ratio=self.sv_ratio)


def make_conditions(options: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain conditions that options state.

    Args:
        options: values by option; ``rank`` is the largest rank.
        default: the conditions where the options state none.

    Raises:
        OptionError: for a value out of range. It names the option and the range.
    """
    stated = {"most" if name == "rank" else name: value for name, value in options.items() if _is_stated(value)}
    if not stated.keys() - {"uniform", "exact"}:
        return {**stated, **default}
    try:
        RankSettings.model_validate(stated)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        named = option("rank" if field == "most" else field, first["input"])
        bounds = _find_bounds(field)
        in_range = not bounds.keys() & first.get("ctx", {}).keys()
        raise OptionError(f"{named}: {explain_invalid(first if in_range else {**first, 'ctx': bounds})}") from None
    return stated


def _is_stated(value: Any) -> bool:
    """Return whether a value is neither None nor False; 0 is a value."""
    return value is not None and value is not False


def _find_bounds(field: str) -> dict[str, float]:
    """Return both ends of the range of a condition; pydantic's errors state the end that a value is beyond."""
    marks = RankSettings.model_fields[field].metadata
    return {key: getattr(each, key) for key in ("gt", "ge", "lt", "le") for each in marks if hasattr(each, key)}


_NUMBER: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=1)])


def _read_rank(value: Any) -> Any:
    """Return the rank or the conditions on it that a plain value means."""
    if value is None or isinstance(value, RankSettings):
        return value
    return RankSettings.model_validate(value) if isinstance(value, Mapping) else _NUMBER.validate_python(value)


RankChoice = Annotated[int | RankSettings | None, BeforeValidator(_read_rank)]
"""The rank of all tensors, or conditions on the rank of each."""
