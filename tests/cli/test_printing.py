"""All that the command prints goes through one door, which escapes it; and its errors are one message, or JSON."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from merging.cli.errors import Refusal, handle_errors
from merging.cli.main import cli
from support.paths import ROOT
from support.tiny import checkpoint

DOORS = {"output.py", "errors.py"}


def prints(tree: ast.Module) -> list[int]:
    """The lines that print past the door: print, click.echo and its kin, and the streams themselves."""
    found = []
    for node in ast.walk(tree):
        past = isinstance(node, ast.Name) and node.id == "print"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            past = (node.value.id, node.attr) in {
                *(("click", name) for name in ("echo", "secho", "echo_via_pager", "get_text_stream", "progressbar")),
                *(("sys", name) for name in ("stdout", "stderr", "__stdout__", "__stderr__")),
            }
        if isinstance(node, ast.ImportFrom) and node.module in ("click", "rich", "sys"):
            past = any(each.name in ("echo", "secho", "print", "stdout", "stderr") for each in node.names)
        if past and isinstance(node, (ast.Name, ast.Attribute, ast.ImportFrom)):
            found.append(node.lineno)
    return found


def test_one_door() -> None:
    files = sorted((ROOT / "cli").rglob("*.py"))
    past = {f"{path.name}:{line}" for path in files for line in prints(ast.parse(path.read_text(encoding="utf-8")))}
    assert {each.partition(":")[0] for each in past} <= DOORS, past
    assert past, "the doors themselves print"


def run(*words: object, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merging.cli.main", *map(str, words)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **settings)  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full disk that Linux has")
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *(pytest.param(words, marks=pytest.mark.exhaustive) for words in (["methods"], ["formats", "--json"])),
        ["inspect", "none"],
    ],
    ids="-".join,
)
def test_a_full_disk_behind_standard_output(words: list[str]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = run(*words, stdout=full)
    said = "there is no such file" if words[0] == "inspect" else "the output cannot be printed: No space left"
    assert done.returncode == 1
    assert said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full disk that Linux has")
def test_a_full_disk_behind_both_streams(tmp_path: Path) -> None:
    """The merge is made, and the exit code says that the user was not told."""
    _, tuned = checkpoint(tmp_path)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "merging.cli.main", "-m", "linear", *tuned, "-o", tmp_path / "out"]
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_closed_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("--help", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_nohup_is_honoured() -> None:
    """The end of the terminal ends a command, unless it was told to outlive it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_errors():
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(Refusal, match="nothing was written") as refusal, handle_errors():
            os.kill(os.getpid(), signal.SIGHUP)
        assert (refusal.value.kind, refusal.value.exit_code) == ("interrupted", 130)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("words", "code", "kind", "message"),
    [
        (["inspect", "none"], 1, "input", "none: there is no such file"),
        (["-m", "ties", "--density", "7", "a", "b"], 1, "option", "density"),
        (["-m", "tise", "a", "b"], 1, "option", "did you mean 'ties'"),
        (["pool", "list", "none"], 1, "input", "none"),
        (["inspect", "--nonsense", "x"], 2, "usage", "No such option"),
        (["inspectt", "x"], 2, "usage", "there is no such sub-command, file or folder (did you mean 'inspect'?)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_as_json(words: list[str], code: int, kind: str, message: str) -> None:
    done = CliRunner().invoke(cli, [*words, "--json"])
    assert done.exit_code == code
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == kind
    assert message in error["message"]
    assert message in done.stderr, "people are told too"
    plain = CliRunner().invoke(cli, words)
    assert (plain.exit_code, plain.stdout, plain.stderr) == (code, "", done.stderr)


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX closes the streams")
@pytest.mark.parametrize(
    "closed", [">&- 2>&-", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in (">&-", "2>&-", "<&-"))]
)
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """What cannot be printed is not, and the merge is carried out."""
    checkpoint(tmp_path)
    python = f'"{sys.executable}" -m merging.cli.main'
    for words in ("-m linear tuned0 tuned1 -o merged", "methods", "compare tuned0 tuned1 --base base"):
        command = ["sh", "-c", f"{python} {words} {closed}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), (words, done.stderr)
    assert (tmp_path / "merged").is_dir()


@pytest.mark.parametrize(
    ("words", "found"), [(["--progress", "json"], "json"), (["--progress=json"], "json"), (["--progress"], "bar")]
)
def test_forms_of_progress(words: list[str], found: str, tmp_path: Path) -> None:
    """A word after --progress that is no form is a model."""
    _, tuned = checkpoint(tmp_path)
    done = CliRunner().invoke(cli, ["-m", "linear", *words, *map(str, tuned), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0
    if found == "json":
        last = json.loads([line for line in done.stderr.splitlines() if line.startswith("{")][-1])
        assert (last["event"], last["phase"], last["done"] == last["total"]) == ("progress", "merging", True)
    else:
        assert "%" in done.stderr
