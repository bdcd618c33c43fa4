"""The choice of the parts of a full model that go into an adapter, and of their form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_serializer

from merging.display.tables import Displayed
from merging.plan.checked_model import CheckedModel

__all__ = ["ExtractedParts"]


class ExtractedParts(Displayed, CheckedModel):
    """The parts of a full model whose change is written into an adapter.

    Parts without factors are written in full by default where the format of the output holds them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    include: tuple[str, ...] = Field((), description="tensors whose change is written: names, parts, or wildcards")
    embeddings: Literal["factors", "full", "base"] = Field("factors", description="form of token embeddings")
    heads: Literal["factors", "full", "base"] = Field("factors", description="form of output heads")
    norms: Literal["full", "base"] | None = Field(None, description="form of norms and other vectors")
    biases: Literal["full", "base"] | None = Field(None, description="form of biases")

    @field_validator("include", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        fields = type(self).model_fields
        stated = {name: getattr(self, name) for name in fields if getattr(self, name) != fields[name].default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in stated.items()}

    def _display_fields(self) -> dict[str, Any]:
        return self._plain()
