"""Layer stacks: models made of parts of other models, block upon block."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from merging.display.tables import Displayed
from merging.errors import OptionError
from merging.maths.parameters import Coefficient, Local, plain
from merging.plan.checked_model import CheckedModel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from merging.plan.recipe import Entry

__all__ = ["LayerPart", "LayerStack", "is_range"]

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_RANGE = re.compile(rf"(?P<stack>{_NAME.pattern}=)?(?P<start>[0-9]{{1,6}}):(?P<stop>[0-9]{{1,6}})")


def is_range(text: str) -> bool:
    """Return whether a text is a range of blocks, such as ``0:8`` or ``decoder=0:8``."""
    return _RANGE.fullmatch(text) is not None


class LayerPart(Displayed, CheckedModel):
    """Some blocks of a model, and perhaps numbers that multiply their tensors.

    Example:
        >>> import merging
        >>> merging.LayerPart(model="one", layers="0:4").to_dict()
        {'model': 'one', 'layers': '0:4'}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Entry = Field(description="the model: a name, or a recipe itself")
    layers: str | None = Field(
        None,
        description="the first block and the block behind the last, such as 0:8; by default all blocks; where a model "
        "has several stacks of blocks, with the name of one in front, such as decoder=0:8, or the name alone for all "
        "of its blocks; 0:0 takes only the tensors around the blocks",
    )
    scale: Local[Coefficient] = Field(1.0, description="what the weights are multiplied by, perhaps by name")

    if TYPE_CHECKING:

        def __init__(
            self, *, model: Path | Entry, layers: str | tuple[int, int] | None = None, scale: Any = 1.0
        ) -> None: ...

    @field_validator("layers", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if value is None:
            return None
        text = ":".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        if isinstance(text, str) and _NAME.fullmatch(text.strip()):
            return text.strip()
        found = _RANGE.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise ValueError("should be a range of blocks such as 0:8, from the first to behind the last")
        start, stop = int(found["start"]), int(found["stop"])
        if start >= stop > 0 or start > stop:
            order = "is empty" if start == stop else "is reversed"
            raise ValueError(f"{order}: a range has the first block, and the block behind the last, such as 0:8")
        return f"{found['stack'] or ''}{start}:{stop}"

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The first block, and the block behind the last; None for all blocks."""
        if self.layers is None or ":" not in self.layers:
            return None
        start, stop = self.layers.rpartition("=")[2].split(":")
        return int(start), int(stop)

    @property
    def stack(self) -> str | None:
        """The stack of blocks that is meant, None for the only one."""
        name = self.layers or ""
        return (name.rpartition("=")[0] if ":" in name else name) or None

    def to_dict(self) -> dict[str, Any]:
        """Return the part in plain values."""
        model = self.model if isinstance(self.model, str) else self.model.to_dict()
        layers = {} if self.layers is None else {"layers": self.layers}
        scale = plain(self.scale)
        return {"model": model, **layers, **({} if scale == 1 else {"scale": scale})}


class LayerStack(Displayed, CheckedModel):
    """A model made of parts: their blocks one after the other, counted from 0.

    The tensors before the blocks (embeddings) come from the first part, the tensors after them (final norm, head) from
    the last part. So a first or last part may have no blocks (``0:0``).

    Example:
        >>> import merging
        >>> parts = [merging.LayerPart(model="one", layers="0:4"), merging.LayerPart(model="two", layers="2:6")]
        >>> sorted(merging.Recipe(models=[merging.LayerStack(parts=parts)], method="passthrough").to_dict())
        ['stack']
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    parts: Annotated[tuple[LayerPart, ...], Field(min_length=1, alias="stack", description="the parts, from below")]

    if TYPE_CHECKING:

        def __init__(self, *, parts: Sequence[LayerPart]) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _one_part(cls, values: Any) -> Any:
        """A part by itself is a stack of one."""
        return {"parts": [values]} if isinstance(values, dict) and "model" in values else values

    @model_validator(mode="after")
    def _check_empty(self) -> LayerStack:
        empty = [index for index, part in enumerate(self.parts) if part.bounds == (0, 0)]
        if len(empty) == len(self.parts):
            raise OptionError("the stack has no blocks: a range such as 0:8 has some")
        if inner := [index for index in empty if 0 < index < len(self.parts) - 1]:
            raise OptionError(f"stack.{inner[0]} has no blocks, as only the first and the last part may: leave it out")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the stack in plain values; a stack of one part as that part."""
        parts = [part.to_dict() for part in self.parts]
        alone = len(parts) == 1 and len(parts[0]) > 1
        return parts[0] if alone else {"stack": parts}
