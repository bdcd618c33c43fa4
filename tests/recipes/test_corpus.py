"""The corpus of recipes, each run here and by mergekit (MERGEKIT_PYTHON): the same tensors, configs and tokenizers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import merge, ok
from support.paths import TESTS
from support.recipe_comparison import compare_files, compare_values
from support.recipe_corpus import RECIPES, drops_at_random, exact, whole
from support.recipe_zoo import save_zoo
from support.tiny import load

sys.path.insert(0, str(TESTS.parent / "docs" / "generate"))
from mergekit_page import DIFFERENCES

PEER = os.environ.get("MERGEKIT_PYTHON")
RUNNER = TESTS / "peer" / "mergekit_recipes.py"

pytestmark = pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python that has mergekit")


CONVERTED = {
    "linear": "-m linear llama/chat llama/code --weights 1,0.2:0.5:0.2",
    "slerp": "-m slerp llama/base llama/far --t '{mlp: 1:0.4:0.2 else 1, \"*\": 0.3}'",
    "ties": "-m ties llama/chat llama/code --base llama/base --density 0.3,0.5 --scope tensor --vote weighted "
    "--zero plus",
    "dare": "-m dare_linear qwen3/chat qwen3/code --base qwen3/base --drop 0 --scale 0.6",
    "sum": "-m task_arithmetic gpt2/chat gpt2/code --base gpt2/base --weights 1,-0.5 --scale 0.7",
    "nuslerp": "-m nuslerp llama/chat llama/code --base llama/base --axis rows --space changes --weights 0.6,0.4",
    "multislerp": "-m multislerp t5/chat t5/code t5/math --weights 0.5,0.3,0.2",
    "karcher": "-m karcher qwen2/chat qwen2/code --max-iter 20",
    "stock": "-m model_stock gemma/chat gemma/code gemma/math --base gemma/base --filter-wise",
    "sce": "-m sce qwen2/chat qwen2/code --base qwen2/base --density 0.5 --select deltas",
    "ram": "-m ram llama/chat llama/code --base llama/base --epsilon 0.0015 --no-relative",
    "type": "-m linear mistral/chat mistral/code --dtype bfloat16",
    "stack": "stack llama/chat 0:4 llama/code 2:8",
    "stages": "run tree.yml",
}
"""Command lines of ours that are converted for mergekit."""

TREE = """\
models:
- {models: [llama/chat, llama/math], method: slerp, parameters: {t: 0.3}, dtype: float32}
- llama/code
method: task_arithmetic
base: llama/base
parameters: {scale: 0.5}
dtype: float32
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str | None]]:
    """The folder of the zoo, the recipes and the peer's outputs, and the peer's errors by output."""
    root = save_zoo(tmp_path_factory.mktemp("recipes"))
    (root / "tree.yml").write_text(TREE, encoding="utf-8")
    jobs: dict[str, str] = {}
    for name, file in RECIPES.items():
        text = file.read_text(encoding="utf-8")
        jobs |= {name: text, f"exact-{name}": exact(whole(text))}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, words in CONVERTED.items():
            written = ok("convert", f"merge {words}", "--to", "mergekit").stdout
            jobs[f"converted-{name}"] = exact(written)
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
        if done.exit_code:
            yield f"refused with --lenient: {done.stderr.strip()}"
            return
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


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_recipe_makes_our_model(
    outputs: tuple[Path, dict[str, str | None]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit makes the tensors of our command line from the recipe that it was converted to."""
    root, errors = outputs
    assert errors[f"converted-{name}"] is None
    monkeypatch.chdir(root)
    ok(*shlex.split(CONVERTED[name]), "-o", root / "ours" / f"converted-{name}")
    ours, peers = root / "ours" / f"converted-{name}", root / "peer" / f"converted-{name}"
    assert load(ours).keys() == load(peers).keys()
    assert not list(compare_values(ours, peers))
