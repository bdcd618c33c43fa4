"""Signs and magnitudes of what models change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.geometry import compare, sign_agreement
from support import tiny
from support.adapter_pool import SHAPES, Factors, agreement, factors, flat, write


@pytest.mark.parametrize("entries", ["sample", "all"])
def test_signs_of_small_tensors_are_counted_in_full(entries: Any, pool: tuple[list[Path], list[Factors]]) -> None:
    paths, made = pool
    found = sign_agreement(paths, entries=entries)
    assert found.entries == found.total == sum(map(math.prod, SHAPES.values()))
    torch.testing.assert_close(found.agreement, agreement(flat(made)), rtol=0, atol=1e-12, equal_nan=True)


def test_signs_of_full_checkpoints(tmp_path: Path) -> None:
    base, tuned = tiny.checkpoint(tmp_path, 3)
    before, after = tiny.load(base), [tiny.load(path) for path in tuned]
    vectors = [torch.cat([(each[name] - before[name]).flatten() for name in before]) for each in after]
    for entries in ("sample", "all"):
        found = sign_agreement(tuned, base=base, entries=entries)  # type: ignore[arg-type]
        torch.testing.assert_close(found.agreement, agreement(vectors), rtol=0, atol=1e-12)


def test_a_sample_of_signs_is_near_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "model.layers.0.self_attn.q_proj", (700, 900))
    paths = [write(tmp_path / f"m{i}", factors(i, 2), torch.float32) for i in range(2)]
    all_of_them, sample = (sign_agreement(paths, entries=entries) for entries in ("all", "sample"))  # type: ignore[arg-type]
    assert sample.entries < 0.2 * all_of_them.entries == 0.2 * sample.total
    assert float(all_of_them.agreement[0, 1]) > 0.51
    torch.testing.assert_close(sample.agreement, all_of_them.agreement, rtol=0, atol=0.02)


# -- magnitudes --------------------------------------------------------------------------------------------------------


def test_magnitudes(tmp_path: Path) -> None:
    made = [factors(0, 4), factors(1, 2, size=3.0), factors(2, 1, size=0.5)]
    found = compare([write(tmp_path / f"m{i}", each) for i, each in enumerate(made)]).magnitudes
    assert found
    ratios, variances, columns = [], [], []
    for name in SHAPES:
        stacked = torch.stack([each[name][0] @ each[name][1] for each in made])
        norms = stacked.flatten(1).norm(dim=1)
        ratios.append(float(norms.max() / norms.min()))
        variances.append(float(norms.var(correction=0) / norms.mean() ** 2))
        by_column = stacked.norm(dim=1)
        columns.append(float((by_column.var(0, correction=0) / by_column.mean(0) ** 2).mean()))
    assert found.ratio == pytest.approx(sum(sorted(ratios)[1:3]) / 2)
    assert found.variance == pytest.approx(sum(variances) / 4)
    assert found.columns == pytest.approx(sum(columns) / 4)
    assert (found.tensors, found.modules) == (4, 4)


def test_equal_models_have_equal_magnitudes(tmp_path: Path) -> None:
    path = write(tmp_path / "one", factors(0, 4))
    found = compare([path, path])
    assert found.magnitudes and found.overlaps and found.signs
    assert (found.magnitudes.ratio, found.magnitudes.variance, found.magnitudes.columns) == pytest.approx((1, 0, 0))
    assert found.cosines[0] == pytest.approx([1, 1])
    assert found.signs.matrix[0] == (1, 1)
    assert found.overlaps.outputs[0] == pytest.approx([1, 1])
    assert found.names == ["one #1", "one #2"]
