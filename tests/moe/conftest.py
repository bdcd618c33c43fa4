"""Tiny dense models of every type that mixtures are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.dense_models import save_dense

KINDS = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders KIND/base, KIND/a, KIND/b and KIND/c of unrelated models."""
    folder = tmp_path_factory.mktemp("dense")
    for kind in KINDS:
        for seed, name in enumerate(("base", "a", "b", "c")):
            save_dense(folder / kind / name, kind, seed)
    return folder
