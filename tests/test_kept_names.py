"""A merge of files that name modules alike keeps these names, and programs take from it all that they took before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusion_families import ROWS, by_definition, diffusers_reads, write
from safetensors.torch import load_file
from torch import Tensor

import merging

WEIGHTS = (0.7, -0.4)


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def weighted(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: sum((w * part[name] for w, part in zip(WEIGHTS, parts, strict=True)), torch.zeros(()))
        for name in parts[0]
    }


@pytest.mark.parametrize("family", ROWS)
def test_names_and_form_stay(tmp_path: Path, family: str) -> None:
    row = ROWS[family]
    inputs = [write(row, tmp_path / f"{rank}.safetensors", rank, rank, 1.5 * rank) for rank in (2, 3)]
    out = tmp_path / "out.safetensors"
    merging.merge(inputs, method="task_arithmetic", weights=WEIGHTS, output=out)
    assert load_file(out).keys() == load_file(inputs[0]).keys()
    if not row.configured:
        close(by_definition(out), weighted([by_definition(path) for path in inputs]))
    if row.loader:
        taken = [diffusers_reads(row, path) for path in inputs]
        assert taken[0]
        close(diffusers_reads(row, out), weighted(taken))
