"""``merge suggest``: one rule for each kind of models, and models that nothing can be said about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import nan
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import merging
from merging.cli.main import cli
from support.paths import SHIPPED

SHAPE = (24, 16)


def models(place: Path, changes: Sequence[torch.Tensor]) -> tuple[list[str], str]:
    """Save a base, and a model with each of the changes."""
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    for name, tensor in [("base", base), *((f"model{i}", base + change) for i, change in enumerate(changes))]:
        save_file({"model.layers.0.mlp.down_proj.weight": tensor}, place / f"{name}.safetensors")
    return [str(place / f"model{i}.safetensors") for i in range(len(changes))], str(place / "base.safetensors")


def noise(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "one": ([noise(0)], "task_arithmetic", {"scale": 1.0}),
    "runs of one training": ([noise(0) + noise(i, 0.5) for i in (1, 2, 3)], "linear", {}),
    "kin": ([noise(0, 0.6) + noise(i) for i in (1, 2, 3)], "karcher", {"space": "changes"}),
    "one large": ([noise(1), noise(2, 4.0)], "decouple+tsv", {"scale": 1.0}),
    "right angles": ([noise(1), noise(2), noise(3)], "tsv", {"scale": 1.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_full_models(tmp_path: Path, kind: str) -> None:
    changes, chain, parameters = KINDS[kind]
    paths, base = models(tmp_path, changes)
    found = merging.suggest(paths, base=base)
    assert (found.chain, found.parameters, found.leave_out) == (chain, parameters, ())
    merged = merging.merge(paths, base=base, method=found.chain, output=tmp_path / "out.safetensors", **parameters)
    assert merged.tensors == 1, "the suggestion can be carried out"


def test_the_scale_of_a_sum_keeps_the_size_of_one_change(tmp_path: Path) -> None:
    """For changes with the same norm and the same cosines."""
    q = torch.linalg.qr(torch.stack([noise(i).flatten() for i in range(4)], 1))[0].T.reshape(4, *SHAPE)
    changes = [q[0] * 0.6 + each * 0.8 for each in q[1:]]  # cosines of 0.36
    paths, base = models(tmp_path, changes)
    chain, parameters = merging.suggest(paths, base=base).cheaper
    assert chain == "task_arithmetic"
    assert torch.stack(changes).sum(0).norm().item() * parameters["scale"] == pytest.approx(1, abs=0.02)


def test_adapters_by_the_command() -> None:
    words = [str(folder) for folder in SHIPPED]
    done = CliRunner().invoke(cli, ["suggest", *words, words[0]])
    assert done.exit_code == 0, done.output
    first, *lines = done.stdout.splitlines()
    assert first == f"merge --method tsv --scale 0.68 {' '.join(words)}", "without the repeat"
    assert lines[0].startswith("leave out:")
    said = json.loads(CliRunner().invoke(cli, ["suggest", *words, "--json"]).stdout)
    assert (said["chain"], said["parameters"], said["models"]) == ("tsv", {"scale": 0.68}, words)


@pytest.mark.parametrize(("value", "message"), [(0.0, "changes nothing"), (nan, "holds NaN")])
def test_changes_that_say_nothing_are_refused(tmp_path: Path, value: float, message: str) -> None:
    paths, base = models(tmp_path, [noise(1), torch.full(SHAPE, value)])
    with pytest.raises(merging.InputError, match=message):
        merging.suggest(paths, base=base)
    done = CliRunner().invoke(cli, ["suggest", *paths, "--base", base])
    assert (done.exit_code, done.stdout) == (1, "")
