"""Base class of parameters' values that differ from place to place."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import BaseModel, ConfigDict

from merging.maths.site import Site

__all__ = ["Varying"]


class Varying(BaseModel):
    """A value of a parameter that depends on the tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def at(self, site: Site) -> Any:
        """Return the value at a site. Raises ValueError where it has none."""

    @abstractmethod
    def plain(self) -> Any:
        """Return the value as YAML and JSON state it."""
