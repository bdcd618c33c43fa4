"""DARE: masks that depend on places alone, and their shares."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import equal

import merging
from merging.maths.randomness import draw_mask
from support import references
from support.changes import CPU, F32, F64, changes, close, merged
from support.on_models import thinned
from support.tiny import identical


@pytest.mark.parametrize("start", [0, 12345, 2**31 - 50, 2**32 - 50, 5 * 2**32 - 50, 2**45 + 1])
def test_masks_do_not_depend_on_the_cut(start: int) -> None:
    whole = draw_mask(0.3, start, 1000, CPU, 0, "model", "tensor")
    for cuts in ([50], [49, 51], [1, 2, 3, 500], [999]):
        edges = itertools.pairwise([0, *cuts, 1000])
        assert equal(torch.cat([draw_mask(0.3, start + a, b - a, CPU, 0, "model", "tensor") for a, b in edges]), whole)
    assert not equal(draw_mask(0.3, start + 2**32, 1000, CPU, 0, "model", "tensor"), whole)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_masks_keep_their_share_and_are_independent(share: float) -> None:
    count = 1 << 18
    places = [*itertools.product([0, 1], ["a", "b"], ["x", "x1"]), (0, "", "ax"), (-1, "a", "x")]
    drawn = [draw_mask(share, 0, count, CPU, *place) for place in places] + [
        draw_mask(share, 2**32, count, CPU, *places[0])
    ]
    x = (torch.stack(drawn).double() - share) / (share * (1 - share)) ** 0.5
    assert float(x.sum(1).abs().max()) < 5 * count**0.5
    assert float(x.view(len(x), 64, -1).sum(-1).abs().max()) < 6 * (count / 64) ** 0.5
    assert float((x @ x.T / count).fill_diagonal_(0).abs().max()) < 5 / count**0.5
    for lag in [*range(1, 65), 127, 128, 255, 256, 768, 1000, 1024, 4096, 65535, 65536, 1 << 17]:
        assert float((x[:, lag:] * x[:, :-lag]).mean(1).abs().max()) < 5 / (count - lag) ** 0.5


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare(rescale: str) -> None:
    for drop, dtype in itertools.product([0.0, 0.5, 0.75], [F32, F64]):
        models, within = changes(3, 4, dtype), 1e-6 if dtype == F32 or rescale == "l1" else 1e-12
        options: Any = {"drop": drop, "rescale": rescale, "seed": 7, "keys": "abc"}
        tau, got = thinned(models, drop, rescale, 7, "abc"), merged(models, "dare", **options)
        assert close(got, tau[0] + tau[1] + tau[2], within)
        assert equal(merged([dict(reversed(each.items())) for each in models], "dare", **options), got)
        assert close(merged(models[::-1], "dare", **options | {"keys": "cba"}), got, within)
        for other in ({"seed": 1}, {"keys": "abd"}):
            assert close(merged(models, "dare", **options | other), got) == (drop == 0)
        assert close(merged(models, "dare+ties", **options), references.ties(tau), within)


def test_dare_from_files(files: Any) -> None:
    tau = thinned(
        files.changes, 0.75, "inverse", 3, merging.preview(files.paths, method="dare", base=files.origin).keys
    )
    for method, wanted in (("dare", tau[0] + tau[1] + tau[2]), ("dare+ties", references.ties(tau))):
        for options in ({"threads": 1}, {"threads": 3, "shard_size": 3000}):
            assert identical(files.merge(method, drop=0.75, seed=3, **options), files.plus(wanted))
