"""Iso-CTS: common and own directions."""

from __future__ import annotations

import torch

from merging.maths.delta import LowRank
from support import references
from support.changes import F64, Q, close, merged, written
from support.on_models import side_by_side


def test_a_model_inside_the_common_directions_adds_none_of_its_own() -> None:
    """Iso-CTS of adapters that write to different outputs and read different inputs: nothing is left beside the sum."""
    ups, downs = torch.eye(20, dtype=F64), torch.eye(31, dtype=F64)
    sizes = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1], dtype=F64)
    random = torch.Generator().manual_seed(0)
    turn, other = (torch.linalg.qr(torch.randn(k, k, generator=random, dtype=F64))[0] for k in (20, 31))
    adapters = [
        {Q: LowRank(turn @ ups[:, chosen] * sizes[chosen], downs[chosen] @ other, (20, 31))}
        for chosen in (slice(4), slice(4, 8))
    ]
    wanted = references.iso_cts(side_by_side(written(adapters), Q), common=0.7)  # one own direction each
    for inputs in (adapters, written(adapters)):
        assert close(merged(inputs, "iso_cts", common=0.7), wanted.flatten(), 1e-9)
