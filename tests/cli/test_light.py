"""Commands that read only headers, lists or records answer without importing torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ok
from support.paths import ROOT
from support.tiny import adapters, checkpoint

BLOCKED = "import sys; sys.modules['torch'] = None; from merging.cli.main import main; main()"
"""The command, in a process in which every import of torch fails."""

BLOCKED_IN_TURN = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from merging.cli.main import cli
outcomes = []
for words in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.main(words)
        except SystemExit as end:
            outcomes.append((end.code, text.getvalue()))
print(json.dumps(outcomes))
"""
"""The same for commands in turn, whose exit codes and texts are printed."""

ADAPTER = str(ROOT / "examples" / "adapters" / "bbc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters, a store with a step, and a pool."""
    folder = tmp_path_factory.mktemp("light")
    _, tuned = checkpoint(folder, 2)
    base, loras = adapters(folder / "loras", 2)
    ok("continual", "init", folder / "store", "--base", folder / "base")
    ok("continual", "add", folder / "store", tuned[0], "--threads", "1")
    ok("continual", "init", folder / "ties", "--base", folder / "base", "--method", "ties")
    ok("pool", "build", folder / "pool", *loras, "--base", base, "--base-name", "tiny/base")
    return folder


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *words]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--help", "merge --method"),
        ("methods", "lines+tsv"),
        ("methods ties", "--density"),
        ("methods --json", "magmax"),
        ("formats", "safetensors"),
        ("-m ties --help", "--density"),
        ("run --help", "RECIPE"),
        ("completion zsh", "_merge_completion"),
        ("inspect tuned0", "LlamaForCausalLM"),
        (f"inspect {ADAPTER}", "rank"),
        ("verify tuned0 --for vllm", "vllm"),
        (f"verify {ADAPTER} --for peft", "nothing is refused or ignored"),
        ("continual status store", "kept"),
        ("continual status ties", "0 models by ties"),
        ("continual log store", "step 1"),
        ("pool list pool", "adapter1"),
        ("methods --help-me-choose", "You have full fine-tunes"),
    ],
)
def test_light_commands_answer_without_torch(folder: Path, words: str, shown: str) -> None:
    done = run(folder, *words.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_plans_and_refusals_without_torch(folder: Path) -> None:
    """Many commands in one process: plans, and refusals of models that are missing or wrong."""
    expected = {
        "recycle --help": (0, "--granularity"),
        "-m linear tuned0 tuned1 --dry-run": (0, "reads"),
        "-m ties --base base tuned0 tuned1 --recipe-only": (0, "method: ties"),
        "plan -m lines+tsv --base base tuned0 tuned1": (0, "memory"),
        "plan -m linear loras/adapter0 loras/adapter1 --json": (0, '"format": "peft"'),
        "-m linear tuned0 nowhere": (1, "nowhere: there is no such file or folder"),
        "-m linear tuned0 tuned1 --weights 1,2,3": (1, "weights has 3 values for 2 models"),
        "-m ties tuned0 tuned1": (1, "full checkpoints need this model as --base"),
        "compare loras/adapter0 loras/nowhere": (1, "there is no such file or folder"),
        "compare tuned0 tuned1": (1, "give it with --base"),
        "compare loras/adapter0 loras/adapter1 --device gpux": (1, "use cpu, cuda"),
        "extract --base nowhere tuned0": (1, "nowhere: there is no such file or folder"),
        "rerun tuned0": (1, "states no recipe"),
        "verify nowhere": (1, "nowhere: there is no such file or folder"),
    }
    command = [sys.executable, "-c", BLOCKED_IN_TURN, json.dumps([words.split() for words in expected])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout)
    for (words, (code, shown)), (actual, text) in zip(expected.items(), outcomes, strict=True):
        assert actual == code, f"{words}: {text}"
        assert shown in text, words


def test_the_list_of_methods_in_an_error(folder: Path) -> None:
    done = run(folder, "tuned0", "tuned1")
    assert done.returncode == 1
    assert "which method? See merge methods --help-me-choose, or choose one with --method:\n" in done.stderr
    assert "\n  linear           weighted mean of the models\n" in done.stderr


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("merge --method ti", "keep large changes, and the ones that agree in sign"),
        ("merge --method ties --dens", "--density"),
        ("merge contin", "continual"),
    ],
)
def test_completion_without_torch(folder: Path, line: str, shown: str) -> None:
    words = line.split()
    done = run(folder, _MERGE_COMPLETE="zsh_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1), COMP_LINE=line)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_a_merge_imports_torch(folder: Path) -> None:
    """The test itself: without torch a merge fails, so that the commands above did without it."""
    done = run(folder, "-m", "linear", "tuned0", "-o", "out")
    assert done.returncode == 1
    assert "torch" in done.stderr
