"""Layer stacks: models made of parts of other models, block upon block."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from merging.display.tables import Displayed
from merging.maths.parameters import Coefficient, Local, plain
from merging.plan.checked_model import CheckedModel

if TYPE_CHECKING:
    from merging.plan.recipe import Entry

__all__ = ["LayerPart", "LayerStack"]

_RANGE = re.compile(r"(\d{1,6}):(\d{1,6})")


class LayerPart(Displayed, CheckedModel):
    """Some blocks of a model, and perhaps numbers that multiply their tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Entry = Field(description="the model: a name, or a recipe itself")
    layers: tuple[int, int] | None = Field(
        None, description="the first block and the block behind the last, such as 0:8; by default all blocks"
    )
    scale: Local[Coefficient] = Field(1.0, description="what the weights are multiplied by, perhaps by name")

    @field_validator("layers", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        found = _RANGE.fullmatch(value.strip()) if isinstance(value, str) else None
        bounds = tuple(map(int, found.groups())) if found else value
        numbers = isinstance(bounds, (list, tuple)) and [type(each) for each in bounds] == [int, int]
        if value is not None and (not numbers or bounds[0] < 0):
            raise ValueError("should be a range of blocks such as 0:8, from the first to behind the last")
        if value is not None and bounds[0] >= bounds[1]:
            order = "is empty" if bounds[0] == bounds[1] else "is reversed"
            raise ValueError(f"{order}: a range has the first block, and the block behind the last, such as 0:8")
        return bounds

    def to_dict(self) -> dict[str, Any]:
        """Return the part in plain values."""
        model = self.model if isinstance(self.model, str) else self.model.to_dict()
        layers = {} if self.layers is None else {"layers": f"{self.layers[0]}:{self.layers[1]}"}
        scale = plain(self.scale)
        return {"model": model, **layers, **({} if scale == 1 else {"scale": scale})}


class LayerStack(Displayed, CheckedModel):
    """A model made of parts: their blocks one after the other, counted from 0.

    The tensors before the blocks (embeddings) come from the first part, the tensors after them (final norm, head) from
    the last part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    parts: Annotated[tuple[LayerPart, ...], Field(min_length=1, alias="stack", description="the parts, from below")]

    @model_validator(mode="before")
    @classmethod
    def _one_part(cls, values: Any) -> Any:
        """A part by itself is a stack of one."""
        return {"parts": [values]} if isinstance(values, dict) and "model" in values else values

    def to_dict(self) -> dict[str, Any]:
        """Return the stack in plain values; a stack of one part as that part."""
        parts = [part.to_dict() for part in self.parts]
        alone = len(parts) == 1 and len(parts[0]) > 1
        return parts[0] if alone else {"stack": parts}
