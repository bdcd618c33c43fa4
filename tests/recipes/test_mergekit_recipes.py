"""The corpus of recipes, each run here and by mergekit (MERGEKIT_PYTHON): the same tensors, configs and tokenizers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import merge
from support.paths import TESTS
from support.recipe_comparison import compare_files, compare_values
from support.recipe_corpus import RECIPES, drops_at_random, exact, whole
from support.recipe_zoo import save_zoo

sys.path.insert(0, str(TESTS.parent / "docs" / "generate"))
from mergekit_page import DIFFERENCES

PEER = os.environ.get("MERGEKIT_PYTHON")
RUNNER = TESTS / "peer" / "mergekit_recipes.py"

pytestmark = pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python that has mergekit")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str | None]]:
    """The folder of the zoo, the recipes and the peer's outputs, and the peer's errors by output."""
    root = save_zoo(tmp_path_factory.mktemp("recipes"))
    jobs: dict[str, str] = {}
    for name, file in RECIPES.items():
        text = file.read_text(encoding="utf-8")
        jobs |= {name: text, f"exact-{name}": exact(whole(text))}
    arguments = []
    for name, text in jobs.items():
        (root / f"{name}.yml").write_text(text, encoding="utf-8")
        arguments += [f"{name}.yml", f"peer/{name}"]
    # Its choices between inputs depend on the hash seed unless it is set.
    environment = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    command = [str(PEER), str(RUNNER), "cache", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return root, dict(zip(jobs, json.loads(done.stdout), strict=True))


def compare(root: Path, name: str, error: str | None) -> Iterator[str]:
    """Run a recipe here, and yield what differs from the peer's outputs."""
    if error is not None:
        yield f"refused by the peer: {error}"
    ours = root / "ours" / name
    done = merge("run", f"{name}.yml", "-o", ours)
    if done.exit_code:
        yield f"refused here: {done.stderr.strip()}"
        done = merge("run", f"{name}.yml", "-o", ours, "--lenient")
        assert not done.exit_code or error is not None, done.output
    if error is not None:
        return
    yield from compare_files(ours, root / "peer" / name)
    text = (root / f"{name}.yml").read_text(encoding="utf-8")
    if drops_at_random(text):
        yield "values: random"
        (root / f"whole-{name}.yml").write_text(whole(text), encoding="utf-8")
        ours = root / "ours" / f"whole-{name}"
        done = merge("run", f"whole-{name}.yml", "-o", ours)
        assert not done.exit_code, done.output
    yield from compare_values(ours, root / "peer" / f"exact-{name}")


@pytest.mark.parametrize("name", RECIPES)
def test_same_model(outputs: tuple[Path, dict[str, str | None]], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe makes the peer's model, but for the differences that are listed with their reasons."""
    root, errors = outputs
    monkeypatch.chdir(root)
    seen = list(compare(root, name, errors[name]))
    listed = [difference for difference in DIFFERENCES if difference.applies(name)]
    unexplained = [line for line in seen if not any(difference.explains(line) for difference in listed)]
    assert not unexplained
    assert all(any(map(difference.explains, seen)) for difference in listed if not difference.by_chance), seen
