"""NearSwap: the other model's weights where they are close to the base's, and a step towards them elsewhere."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.delta import Delta, Dense, Stack
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.contract.method import Method, Statistics

__all__ = ["NearSwap"]


class NearSwap(Method):
    """theta_0 + min(1, t / |tau|) tau for one model's change tau, entry by entry: the change clipped to [-t, t].

    Changes up to `t` are taken whole, and larger changes are shortened to `t`, so that the base prevails where the two
    differ much. The single model is merged with the base (`--base`). `t` is in units of the weights, whose changes are
    often 1e-4 to 1e-2. On adapters the merged change has full rank. Costs one pass over the bytes.
    """

    name: ClassVar[str] = "nearswap"
    summary: ClassVar[str] = "one model's change, clipped to a largest step"
    paper: ClassVar[str] = "NearSwap, Alchemonaut 2024, with QuartetAnemoi-70B"
    models: ClassVar[tuple[int, int | None]] = (1, 1)

    t: Local[Annotated[float, Field(ge=0, le=1e30)]] = Field(0.001, description="largest change of a weight")

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        (change,) = stack.dense()
        return Dense(change.clamp(-self.t, self.t))
