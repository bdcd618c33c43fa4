"""The settings by which intruder dimensions of adapters are reduced."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, model_serializer

from merging.display.tables import Displayed
from merging.plan.checked_model import CheckedModel

__all__ = ["IntruderChoice", "IntruderSettings"]


class IntruderSettings(Displayed, CheckedModel):
    """The intruder dimensions of adapters, and the factor that reduces them. The defaults are PEFT's.

    Intruders are leading singular directions of the changed weight that resemble no singular direction of the base
    (arXiv 2410.21228).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(0.75, ge=0, le=1, description="factor of intruder dimensions; 0 removes them")
    threshold: float = Field(
        0.5, gt=0, le=1, description="largest cosine of an intruder to any left singular vector of the base"
    )
    leading: int = Field(10, ge=1, description="number of leading singular directions that are examined")

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}

    def _display_fields(self) -> dict[str, Any]:
        return self._plain()


def _read_choice(value: Any) -> Any:
    if isinstance(value, bool):
        return IntruderSettings() if value else None
    return value


IntruderChoice = Annotated[IntruderSettings | None, BeforeValidator(_read_choice)]
"""The settings; True for the defaults."""
