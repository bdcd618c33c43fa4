"""Help, lists and spelling: a screen for everything, as wide as the terminal, and the options' American names."""

from __future__ import annotations

import ast
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from merging.cli.help import CONTEXT, SectionedGroup
from merging.cli.main import cli
from merging.cli.output import plural
from merging.cli.spelling import to_american
from merging.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


def commands(group: click.Group = cli, *above: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)


COMMANDS = dict(commands())


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == code, done.output
    return done.stdout


def test_the_first_page_is_a_screen() -> None:
    said = run("-h")
    lines = said.splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("  merge --method ") for line in lines) == 3
    assert [line for line in lines if line.endswith(":")] == ["Merge:", "Choose:", "Keep, share and set up:"]


@pytest.mark.parametrize("words", COMMANDS, ids="-".join)
def test_every_command_has_help_that_is_whole(words: tuple[str, ...]) -> None:
    said = run(*words, "-h")
    assert said == run(*words, "--help")
    assert not re.search(r"[a-z,;]\.\.\.$", said, re.MULTILINE), "only MODEL... and the like end so"
    command = COMMANDS[words]
    assert command.help
    assert command.short_help
    assert not command.short_help.endswith(".")
    undescribed = [param.name for param in command.params if isinstance(param, click.Option) and not param.help]
    assert undescribed == []


def test_groups_list_all_their_commands() -> None:
    for group in [cli, *COMMANDS.values()]:
        if isinstance(group, click.Group):
            assert isinstance(group, SectionedGroup)
            said = group.get_help(click.Context(group, info_name="merge", **CONTEXT))
            assert all(f"  {name} " in said and command.short_help in said for name, command in group.commands.items())


def test_shared_options_are_declared_once() -> None:
    """An option of the same name and help is one object of cli/options.py."""
    places: dict[str, set[str]] = {}
    for path in sorted((ROOT / "cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "click.option":
                places.setdefault(ast.unparse(node), set()).add(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 90
    assert {call: where for call, where in places.items() if len(where) > 1} == {}


def test_options_have_american_names() -> None:
    every = [*COMMANDS.values(), *(cli.commands["merge"] for _ in METHODS)]
    for command in every:
        with click.Context(command, **CONTEXT) as context:  # click keeps the help option that is asked for first
            names = [name for param in command.get_params(context) for name in [*param.opts, *param.secondary_opts]]
        assert [name for name in names if to_american(name) != name] == []


def test_the_former_spelling_is_accepted() -> None:
    for spelling in ("--dequantize", "--dequantise"):
        recipe = yaml.safe_load(run("-m", "linear", "a", "b", spelling, "--recipe-only"))
        assert recipe["dequantize"] is True
    for option in ("--refuse-unknown-license", "--allow-unknown-licence"):
        assert CliRunner().invoke(cli, ["pool", "dedupe", "none", option]).exit_code == 1, "there is no such pool"
    for option in ("--normalize", "--normalise"):
        assert CliRunner().invoke(cli, ["route", "none", "-o", "x.safetensors", option]).exit_code == 1
        assert option == "--normalize" or option not in run("route", "-h")


def test_counts_have_their_nouns() -> None:
    assert [plural(count, "model") for count in (0, 1, 2, 1000)] == ["0 models", "1 model", "2 models", "1,000 models"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("words", "width"),
    [
        ("-h", 60),
        ("methods", 100),
        pytest.param("merge -h", 60, marks=pytest.mark.exhaustive),
        pytest.param("methods", 60, marks=pytest.mark.exhaustive),
        pytest.param("methods ties", 60, marks=pytest.mark.exhaustive),
        pytest.param("formats", 60, marks=pytest.mark.exhaustive),
        pytest.param("inspect .", 60, marks=pytest.mark.exhaustive),
    ],
)
def test_output_is_as_wide_as_the_terminal(words: str, width: int, tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    from support.tiny import checkpoint

    checkpoint(tmp_path)
    screen, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    command = [sys.executable, "-m", "merging", *words.split()]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    running = subprocess.Popen(command, stdout=program, cwd=tmp_path / "base", env=environment)
    os.close(program)
    shown = b""
    try:
        while part := os.read(screen, 65536):
            shown += part
    except OSError:  # how a terminal ends
        pass
    os.close(screen)
    assert running.wait() == 0
    lines = shown.decode().split("\r\n")
    fixed = [line for line in lines if "merge " in line or (words == "methods ties" and not line.startswith("  --"))]
    assert max(len(line) for line in lines if line not in fixed) <= width
    assert len(lines) > 5
