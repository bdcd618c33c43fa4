"""DARE: drop most of each change at random and rescale the rest, before any method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from merging.maths.coefficients import column, spread
from merging.maths.delta import Stack
from merging.maths.kernels.drop_steps import drop_uniformly
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.parameters import PerModel
from merging.maths.randomness import draw_mask
from merging.maths.site import Site
from merging.methods.families.dropping import Dropping

__all__ = ["Dare"]


class Dare(Dropping):
    """Drop each entry of a change with probability `drop`, and rescale the kept entries.

    The kept entries are divided by 1 - drop, which keeps the expectation (`rescale = inverse`, the paper), or
    multiplied so that each tensor keeps its L1 norm (`l1`), or left as they are (`none`). The dropped entries follow
    from the seed, the content of the model, the name of the tensor and the position in it, but not from the order of
    models or tensors, the shards, or the device. Fine-tuned language models allow a drop of 0.9 and more where changes
    are small (below about 0.002); other models less. On adapters the merged change has full rank. It costs the drawing
    of random numbers, in each sweep of the method inside.
    """

    name: ClassVar[str] = "dare"
    summary: ClassVar[str] = "drop most of each change at random, rescale the rest"
    paper: ClassVar[str] = "DARE, Yu et al. 2024, arXiv 2311.03099"
    workspace: ClassVar[int] = 6

    drop: PerModel[Annotated[float, Field(ge=0, le=1)]] = Field(
        0.9, description="share of each model's change that is dropped; one for all, or one each"
    )

    def idle(self, site: Site) -> Mapping[str, str]:
        return {} if any(spread(self.drop, 1)) else {"seed": "a drop of 0 keeps everything"}

    def thin(self, stack: Stack, site: Site, divide: bool) -> Tensor:
        shares = [1 - drop for drop in spread(self.drop, len(stack))]
        dropped = drop_uniformly(stack, site, shares, self.seed, divide)
        if dropped is not None:
            return dropped
        values = stack.dense()
        out = torch.empty_like(values)
        for slot, (share, value, into) in enumerate(zip(shares, values, out, strict=True)):
            draw = partial(draw_mask, share, site.start, value.numel(), value.device, self.seed, stack.models[slot])
            mask = self.kept_mask(stack, slot, partial(draw, site.name, dtype=value.dtype))
            torch.mul(value, mask.view(value.shape), out=into)
        return out.div_(column([share or 1.0 for share in shares], out)) if divide else out
