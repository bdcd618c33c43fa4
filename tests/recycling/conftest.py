"""Tasks and runs of recycling that several files of tests look at. None is changed by a test."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.recycling.problem import single_adapter
from support.adapters import edit_tensors
from support.recycling_tasks import World, classifier, texts


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Any:
    """Pictures take longer than everything else here; one test draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merging.recycling.page.find_spec", lambda name: None)
        yield


@pytest.fixture(scope="session")
def planted(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A task that one strong adapter of the pool solves: its labels are what the base says with that adapter."""
    folder = tmp_path_factory.mktemp("planted")
    base, pool = shutil.copytree(world.base, folder / "base"), shutil.copytree(world.pool, folder / "pool")
    edit_tensors(pool / "a3", lambda tensors: {name: value * 3 for name, value in tensors.items()})
    problem = World(base, pool, world.train, world.valid, world.test).problem()
    expert = next(each for each in world.__class__(base, pool, [], []).experts(problem) if each.name == "a3")
    words = texts(400, 11)
    items = [problem.model.encode(example) for example in _read([{"text": text, "label": "low"} for text in words])]
    with torch.no_grad(), single_adapter(expert).mixture(problem).at(torch.ones(1)):
        margins = torch.cat([problem.model.answers([item]).logits for item in items]).diff(dim=1)[:, 0]
    tensors = load_file(base / "model.safetensors")
    threshold = margins.quantile(0.5)  # between the two in the middle: no margin is 0 but for rounding
    tensors["classifier.bias"][1] -= threshold
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    labelled = [{"text": text, "label": "high" if margin > threshold else "low"}
                for text, margin in zip(words, margins, strict=True)]  # fmt: skip
    return World(base, pool, labelled[:16], labelled[16:32], labelled[32:])


def _read(records: list[dict[str, Any]]) -> Any:
    from merging.recycling.data import read_examples

    return read_examples(records)
