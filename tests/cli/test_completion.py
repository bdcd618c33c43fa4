"""Completion in real shells: bash is driven at a terminal, by keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from merging.cli.main import cli
from merging.methods import METHODS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

COMPLETE_ALL, COMPLETE = "\x1b*", "\t"
"""The keys by which readline puts all completions in the line, and by which any shell completes it."""

SHOW = "\x01echo :: \x05\n"
"""The keys that turn the line into a command that prints it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models, and a home, a cache of the Hub and the command outside of it."""
    program = tmp_path / "bin" / "merge"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom merging.cli.main import main\nmain()\n")
    program.chmod(0o755)
    for name in ("home", "work/tuned one", "work/tuned2", "work/inspections", "hub/models--org--small-model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work" / "tuned3.safetensors").touch()
    for name, value in {"HOME": tmp_path / "home", "HF_HUB_CACHE": tmp_path / "hub", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path / "work"


@contextmanager
def terminal(command: list[str], folder: Path) -> Iterator[Callable[[str], list[str]]]:
    """Run a shell at a terminal; yield a function that types keys, and returns the words of the line after ``::``."""
    import fcntl
    import pty
    import struct
    import termios

    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} on this machine")
    keyboard, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 5000, 0, 0))
    shell = subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen, cwd=folder, start_new_session=True)
    os.close(screen)
    shown = ""

    def type_keys(keys: str) -> list[str]:
        nonlocal shown
        before = len(shown)
        os.write(keyboard, keys.encode())
        while not (found := re.search(r"\n:: (.*?)\r?\n", shown[before:])):
            shown += os.read(keyboard, 4096).decode(errors="replace")
        return found[1].split()

    try:
        yield type_keys
    finally:
        shell.kill()
        shell.wait()
        os.close(keyboard)


@pytest.fixture
def complete(folder: Path) -> Iterator[Callable[[str], list[str]]]:
    """A function that types a line in a bash, has its last word completed, and returns the words that come out."""
    (folder.parent / "home" / ".bashrc").write_text('eval "$(merge completion bash)"\n')
    with terminal(["bash", "--noprofile", "-i"], folder) as type_keys:

        def complete_line(line: str) -> list[str]:
            before = line.rpartition(" ")[0].split()
            words = type_keys(line + COMPLETE_ALL + SHOW)
            assert words[: len(before)] == before
            return sorted(words[len(before) :])

        yield complete_line


def test_commands(complete: Callable[[str], list[str]]) -> None:
    assert set(complete("merge ")) == set(cli.commands)
    assert complete("merge comp") == ["compare", "completion", "compress"]
    assert complete("merge pool s") == ["show", "smoke", "stats"]
    assert complete("merge completion ") == ["bash", "fish", "zsh"]


METHODS_AND_OPTIONS: dict[str, list[str]] = {
    "merge --method lin": ["linear", "lines"],
    "merge tuned2 -m lines+ti": ["lines+ties"],
    "merge -m lines+dare+ta": ["lines+dare+task_arithmetic"],
    "merge -m ties+li": [],  # ties is no wrapper
    "merge methods dare_": ["dare_linear", "dare_ties"],
    "merge --ex": ["--exclude", "--experts"],
    "merge -m ties tuned2 --dens": ["--density"],
    "merge tuned2 -m ties --vote w": ["weighted"],
    "merge -m nothing tuned2 --shard": ["--shard-size"],
    "merge tuned2 --dtype b": ["bfloat16"],
    "merge verify tuned2 --for l": ["llama.cpp"],
    "merge inspect --v": ["--values"],
}


@pytest.mark.parametrize("line", METHODS_AND_OPTIONS)
def test_methods_and_options(line: str) -> None:
    """The completions themselves, without a shell, which starts a process for each."""
    *before, begun = line.split()[1:]
    found = ShellComplete(cli, {}, "merge", "_MERGE_COMPLETE").get_completions(before, begun)
    assert sorted(each.value for each in found) == METHODS_AND_OPTIONS[line]


@pytest.mark.exhaustive
def test_methods_and_options_in_bash(complete: Callable[[str], list[str]]) -> None:
    for line, wanted in METHODS_AND_OPTIONS.items():
        assert complete(line) == (wanted or [line.split()[-1]])
    assert complete("merge --method=lin") == ["--method=linear", "lines"]
    assert set(complete("merge continual init store -m ")) >= set(METHODS)


def test_methods_are_completed_without_torch() -> None:
    script = "import sys; from merging.cli.types import METHOD; names = METHOD.shell_complete(None, None, 'lin')"
    script += "; print([each.value for each in names], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "['linear', 'lines'] False\n"


def test_files_and_models(complete: Callable[[str], list[str]]) -> None:
    assert complete("merge tuned2 tun") == ["one", "tuned", "tuned2", "tuned3.safetensors"]
    assert complete("merge tuned3") == ["tuned3.safetensors"]
    assert complete("merge ins") == ["inspect", "inspections"]
    assert complete("merge -m linear --base tuned3") == ["tuned3.safetensors"]
    assert complete("merge -m linear tuned2 -o tuned2") == ["tuned2"]
    assert complete("merge continual status tuned2") == ["tuned2"]
    assert complete("merge -m linear org/sm") == ["org/small-model"]


def test_zsh(folder: Path) -> None:
    rules = 'autoload -Uz compinit; compinit -u -D; eval "$(merge completion zsh)"\n'
    (folder.parent / "home" / ".zshrc").write_text(rules)
    with terminal(["zsh", "-i"], folder) as type_keys:
        for typed, whole in {
            "merge compa": "merge compare",
            "merge -m lines+ti": "merge -m lines+ties",
            "merge tuned2 --method=nusl": "merge tuned2 --method=nuslerp",
            "merge --method=nusl": "merge --method=nuslerp",
            "merge inspect tuned3": "merge inspect tuned3.safetensors",
        }.items():
            assert type_keys(typed + COMPLETE + SHOW) == whole.split()


def test_fish(folder: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("there is no fish on this machine")
    lines = ["merge compa", "merge -m lines+ti", "merge --method=nusl", "merge inspect tuned3"]
    script = "merge completion fish | source\n" + "".join(f"complete -C '{line}'\n" for line in lines)
    said = subprocess.run(["fish", "--no-config", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    words = [line.partition("\t")[0] for line in said.stdout.splitlines()]
    assert words == ["compare", "lines+ties", "--method=nuslerp", "tuned3.safetensors"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_values_after_an_equals_sign(shell: str) -> None:
    """To these shells it is one word; here as their scripts ask, without them."""
    words = "merge tuned2 --method=nusl"
    asked = {"_MERGE_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
    asked["COMP_CWORD"] = "2" if shell == "zsh" else "--method=nusl"
    done = CliRunner().invoke(cli, [], env=asked)
    assert "--method=nuslerp" in re.split("[,\\s]", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_what_their_shells_read(shell: str, tmp_path: Path) -> None:
    script = CliRunner().invoke(cli, ["completion", shell]).stdout
    assert f"_MERGE_COMPLETE={shell}_complete" in script
    assert "\\x" not in script, "nothing is escaped"
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        done = subprocess.run([program, "-n", tmp_path / "script"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
