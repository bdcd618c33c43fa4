"""DC-Merge on adapters: the diagonal form, models that share directions, and entries that are kept."""

from __future__ import annotations

import pytest
import torch

from support import references
from support.changes import F64, Q, changes, close, merged
from support.factors import low


def unrelated(count: int, rank: int) -> list[torch.Tensor]:
    """Changes of a rank in random directions of large matrices, which are nearly at right angles."""
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(160, rank, generator=random, dtype=F64) @ torch.randn(rank, 200, generator=random, dtype=F64)
        for _ in range(count)
    ]


def test_unrelated_adapters_keep_the_diagonal() -> None:
    """Each then keeps as many entries as it has directions: nearly TSV with equal energies, attenuated."""
    tau = torch.stack(unrelated(3, 4))
    factors = [(u[:, :4] * s[:4], vh[:4]) for u, s, vh in map(torch.linalg.svd, tau)]
    got = merged([{Q: low(each)} for each in factors], "dc_merge")
    assert close(got, references.diagonal_dc_merge(tau).flatten(), 1e-4)
    tsv = merged([{Q: low(each)} for each in factors], "tsv")
    assert not close(got / got.norm(), tsv / tsv.norm(), 1e-2)


def test_a_shared_direction_is_attenuated() -> None:
    """Of two adapters with one direction in common, its size falls below that of a direction of one model."""
    random = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(40, 3, generator=random, dtype=F64))[0] for _ in range(2))
    nearly = torch.linalg.qr(torch.stack([u[:, 0] + 0.3 * u[:, 2], u[:, 2]], 1))[0][:, :1]
    one = u[:, :2] @ v[:, :2].T
    two = torch.cat([nearly, u[:, 2:]], 1) @ torch.stack([v[:, 0], v[:, 2]])
    got = merged([{Q: one}, {Q: two}], "dc_merge", scale=1.0).view(40, 40)
    assert float(u[:, 0] @ got @ v[:, 0]) < float(u[:, 1] @ got @ v[:, 1])


@pytest.mark.parametrize("smooth", ["mean", "linear", "none"])
def test_one_model_keeps_its_sum_of_singular_values(smooth: str) -> None:
    (model,) = changes(1, 3, F64, {Q: (12, 20)})
    got = merged([model], "dc_merge", smooth=smooth, scale=1.0).view(12, 20)
    values, before = (torch.linalg.svdvals(each) for each in (got, model[Q]))
    assert close(values.sum(), before.sum(), 1e-9)
    assert close(values.min(), {"mean": before.mean(), "none": before.min()}.get(smooth, values.max() / 5), 1e-9)
