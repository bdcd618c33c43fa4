"""Tasks, adapters and fine-tunes that several files of tests search over. None is changed by a test."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from support.recycling_tasks import World, causal, classifier


@dataclass(frozen=True)
class Models:
    """A base, fine-tunes and adapters of it, and examples."""

    world: World
    full: list[Path]
    adapters: list[Path]

    @property
    def base(self) -> Path:
        return self.world.base

    def arguments(self, output: Path, **changed: Any) -> dict[str, Any]:
        """What ``merging.search`` is called with."""
        given = {"models": self.full, "base": self.base, "data": self.world.train, "test": self.world.test}
        return {**given, "output": output, "strategy": "shrink", "resamples": 200, **changed}


def _louder(folder: Path, source: Path, base: Path, times: float) -> Path:
    """A fine-tune with a larger change."""
    origin, tensors = load_file(base / "model.safetensors"), load_file(source / "model.safetensors")
    changed = {name: origin[name] + times * (value - origin[name]) for name, value in tensors.items()}
    shutil.copytree(base, folder)
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def _models(folder: Path, world: World) -> Models:
    adapters = [world.pool / f"a{number}" for number in range(3)]
    full = []
    for number, adapter in enumerate(adapters):
        merging.bake([adapter], base=world.base, output=folder / f"baked{number}")
        full.append(_louder(folder / f"m{number}", folder / f"baked{number}", world.base, 4.0))
    return Models(world, full, adapters)


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Fine-tunes of a classifier."""
    folder = tmp_path_factory.mktemp("labels")
    torch.manual_seed(0)
    return _models(folder, classifier(folder))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Fine-tunes of a causal language model."""
    folder = tmp_path_factory.mktemp("texts")
    return _models(folder, causal(folder))


@pytest.fixture
def files(labels: Models, tmp_path: Path) -> Path:
    """The examples of ``labels`` as files."""
    for part in ("train", "test"):
        lines = [json.dumps(each) + "\n" for each in getattr(labels.world, part)]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than everything else here; one test draws them."""
    monkeypatch.setattr("merging.searches.page.find_spec", lambda name: None)
