"""The geometric median: least sum of distances, an outlier, duplicates, and two models."""

from __future__ import annotations

import pytest
import torch

import merging
from merging.errors import OptionError
from support.changes import F64, Q, changes, close, merged


def test_it_has_the_least_sum_of_distances() -> None:
    models = changes(5, 1, F64, {Q: (6, 8)})
    points = torch.stack([each[Q].flatten() for each in models])
    got = merged(models, "geometric_median")

    def cost(point: torch.Tensor) -> float:
        return float((point - points).norm(dim=1).sum())

    random = torch.Generator().manual_seed(0)
    for _ in range(10):
        assert cost(got + 1e-3 * torch.randn(48, generator=random, dtype=F64)) > cost(got)
    assert cost(got) < cost(points.mean(0))


def test_an_outlier_moves_it_little() -> None:
    models = changes(5, 1, F64, {Q: (6, 8)})
    far = [*models[:4], {Q: 1e4 * models[4][Q]}]
    median, mean = (
        float((merged(far, method) - merged(models, method)).norm()) for method in ("geometric_median", "linear")
    )
    assert median < 1e-2 * mean


def test_models_that_are_the_median() -> None:
    """Two equal models meet halfway; a majority, of one model or of copies, is the median itself."""
    one, two, three = changes(3, 1, F64, {Q: (6, 8)})
    assert close(merged([one, two], "geometric_median"), (one[Q] + two[Q]).flatten() / 2)
    assert torch.equal(merged([one, two, three], "geometric_median", weights=(1, 3, 1)), two[Q].flatten())
    assert close(merged([one, three, two, three, three], "geometric_median"), three[Q].flatten(), 1e-12)


@pytest.mark.parametrize(("weights", "reason"), [((1, -1), "of at least 0"), ((0, 0), "do not sum to 0")])
def test_weights_that_have_no_median(weights: tuple[float, float], reason: str) -> None:
    with pytest.raises(OptionError, match=f"a median needs weights .*{reason}"):
        merging.merge_state_dicts(
            [{"a": torch.ones(2)}] * 2, base={"a": torch.zeros(2)}, method="geometric_median", weights=weights
        )
