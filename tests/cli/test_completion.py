"""Completion in real shells: bash is driven at a terminal, by keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from merging.cli.main import cli
from merging.methods import METHODS

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(sys.platform == "win32" or BASH is None, reason="needs bash at a terminal")

COMPLETE_ALL = "\x1b*"
"""The keys by which readline puts all completions in the line."""

SHOW = "\x01echo :: \x05\n"
"""The keys that turn the line into a command that prints it."""


@pytest.fixture
def complete(tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """A function that types a line in a bash, has its last word completed, and returns the words that come out."""
    import fcntl
    import pty
    import struct
    import termios

    (tmp_path / "home").mkdir()
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("tuned one", "tuned2", "inspections"):
        (folder / name).mkdir()
    (folder / "tuned3.safetensors").touch()
    (tmp_path / "hub" / "models--org--small-model").mkdir(parents=True)
    program = tmp_path / "bin" / "merge"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom merging.cli.main import main\nmain()\n")
    program.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TERM": "dumb", "PS1": "$ "}
    environment |= {"PATH": f"{program.parent}:{os.environ['PATH']}", "HF_HUB_CACHE": str(tmp_path / "hub")}
    keyboard, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 5000, 0, 0))
    command = ["bash", "--norc", "--noprofile", "-i"]
    bash = subprocess.Popen(
        command, stdin=screen, stdout=screen, stderr=screen, cwd=folder, env=environment, start_new_session=True
    )
    os.close(screen)
    shown = ""

    def type_keys(keys: str) -> list[str]:
        nonlocal shown
        before = len(shown)
        os.write(keyboard, keys.encode())
        while not (found := re.search(r"\n:: (.*?)\r?\n", shown[before:])):
            shown += os.read(keyboard, 4096).decode(errors="replace")
        return found[1].split()

    def complete_line(line: str) -> list[str]:
        before = line.rpartition(" ")[0].split()
        words = type_keys(line + COMPLETE_ALL + SHOW)
        assert words[: len(before)] == before
        return sorted(words[len(before) :])

    assert type_keys('eval "$(merge completion bash)"; echo :: ready\n') == ["ready"]
    yield complete_line
    bash.kill()
    bash.wait()
    os.close(keyboard)


def test_commands(complete: Callable[[str], list[str]]) -> None:
    assert set(complete("merge ")) == set(cli.commands)
    assert complete("merge comp") == ["compare", "completion", "compress"]
    assert complete("merge pool s") == ["show", "smoke", "stats"]
    assert complete("merge completion ") == ["bash", "fish", "zsh"]


def test_methods_and_chains(complete: Callable[[str], list[str]]) -> None:
    assert complete("merge --method lin") == ["linear", "lines"]
    assert complete("merge tuned2 -m lines+ti") == ["lines+ties"]
    assert complete("merge --method=lin") == ["--method=linear", "lines"]
    assert complete("merge -m lines+dare+ta") == ["lines+dare+task_arithmetic"]
    assert complete("merge -m ties+li") == ["ties+li"], "ties is no wrapper"
    assert complete("merge methods dare_") == ["dare_linear", "dare_ties"]
    assert set(complete("merge continual init store -m ")) >= set(METHODS)


def test_options(complete: Callable[[str], list[str]]) -> None:
    assert complete("merge --ex") == ["--exclude", "--experts"]
    assert complete("merge -m ties tuned2 --dens") == ["--density"]
    assert complete("merge tuned2 -m ties --vote w") == ["weighted"]
    assert complete("merge -m nothing tuned2 --shard") == ["--shard-size"]
    assert complete("merge tuned2 --dtype b") == ["bfloat16"]
    assert complete("merge verify tuned2 --for l") == ["llama.cpp"]
    assert complete("merge inspect --v") == ["--values"]


def test_files_and_models(complete: Callable[[str], list[str]]) -> None:
    assert complete("merge tuned2 tun") == ["one", "tuned", "tuned2", "tuned3.safetensors"]
    assert complete("merge tuned3") == ["tuned3.safetensors"]
    assert complete("merge ins") == ["inspect", "inspections"]
    assert complete("merge -m linear --base tuned3") == ["tuned3.safetensors"]
    assert complete("merge -m linear tuned2 -o tuned2") == ["tuned2"]
    assert complete("merge continual status tuned2") == ["tuned2"]
    assert complete("merge -m linear org/sm") == ["org/small-model"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_what_their_shells_read(shell: str, tmp_path: Path) -> None:
    script = CliRunner().invoke(cli, ["completion", shell]).stdout
    assert f"_MERGE_COMPLETE={shell}_complete" in script
    assert "\\x" not in script, "nothing is escaped"
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        done = subprocess.run([program, "-n", tmp_path / "script"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
