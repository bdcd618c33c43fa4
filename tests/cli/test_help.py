"""Help, lists and spelling: a screen for everything, as wide as the terminal, and the options' American names."""

from __future__ import annotations

import ast
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
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
from support.commands import ok
from support.tiny import adapters, checkpoint

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
    assert len(lines) <= 46
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


def test_help_is_a_word_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("help") == run("--help") == run("-h")
    assert run(code=1) == run("-h")
    assert run("help", "merge") == run("merge", "--help")
    assert run("help", "continual", "add") == run("continual", "add", "-h")
    assert run("help", "help") == run("-h")
    assert run("help", "lines+ties") == run("methods", "lines+ties")
    monkeypatch.chdir(tmp_path)
    Path("help").mkdir()
    assert CliRunner().invoke(cli, ["help", "-m", "linear"]).exit_code == 1, "a folder of this name is a model"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("hlep", "there is no such sub-command, file or folder (did you mean 'help'?)"),
        ("version", "there is no such sub-command, file or folder (did you mean '--version'?)"),
        (
            "brew a/ --base base/",
            "brew: there is no such sub-command, file or folder: see merge --help",
        ),
        ("help tie", "tie: there is no such sub-command, file or folder"),
        ("org/one org/two", "which method?"),
        ("one.safetensors two", "which method?"),
        ("methods lines+tie", "there is no method 'tie' (did you mean 'ties'?)"),
        ("completion", "Choose from:\n  bash,\n  zsh,\n  fish\n"),
        ("merge --hlep", "Usage: merge --method METHOD [OPTIONS] MODEL...\n"),
    ],
)
def test_a_slip_gets_the_hint_that_helps(
    words: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, words.split())
    assert done.exit_code in (1, 2)
    assert hint in done.stderr
    assert done.stdout == "", "no half of an answer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a store and a pool, whose names and reasons are long."""
    folder = tmp_path_factory.mktemp("wide")
    _, tuned = checkpoint(folder)
    base, loras = adapters(folder / "a folder with a rather long name, as people have them", 3)
    ok("continual", "init", folder / "store", "--base", folder / "base")
    ok("continual", "add", folder / "store", *tuned, "--threads", "1")
    ok("pool", "build", folder / "pool", *loras, folder / "base", "--base", base, "--base-name", "tiny/base")
    return folder


TABLES = [
    "-h",
    "help",
    "merge -h",
    "methods",
    "formats",
    "inspect base",
    "verify base",
    "verify base --for comfyui",
    "compare tuned0 tuned1 --base base",
    "continual status store",
    "continual log store",
    "pool list pool",
    "pool stats pool",
]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("words", "width"),
    [
        pytest.param(*each, marks=() if each == ("methods", 60) else pytest.mark.exhaustive)
        for each in product(TABLES, (60, 200))
    ],
)
def test_output_is_as_wide_as_the_terminal(folder: Path, words: str, width: int) -> None:
    code, shown = at_terminal(folder, words.split(), width, errors=False)
    assert code == 0
    lines = shown.split("\r\n")
    names = re.compile(r"merge (--method|continual|merge|-m)|METHOD|^(/|step|store:|pool|base)|\.\.\.$")
    assert max(len(line) for line in lines if not names.search(line)) <= width
    assert "\x1b" not in shown, "nothing is colored"
    assert "…" not in shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_lists_use_a_wide_terminal(folder: Path) -> None:
    narrow, wide = (at_terminal(folder, ["methods"], width)[1].split("\r\n") for width in (60, 200))
    assert len(wide) < len(narrow)
    assert 100 < max(map(len, wide)) <= 200


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.exhaustive
def test_bars_are_for_terminals(folder: Path) -> None:
    """In a pipe there is none; at a terminal there is one, and it has no color under NO_COLOR."""
    words = ["-m", "linear", "tuned0", "tuned1", "--overwrite", "-o", "out"]
    assert re.search(r"\d+%", at_terminal(folder, words, 100)[1])
    plain = at_terminal(folder, words, 100, NO_COLOR="1")[1]
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", plain)
    command = [sys.executable, "-m", "merging", *words]
    piped = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not re.search(r"\d+%|\x1b|\r", piped.stdout + piped.stderr)


def at_terminal(folder: Path, words: list[str], width: int, errors: bool = True, **environment: str) -> tuple[int, str]:
    """Run the command with its output, and its errors, at a terminal; return the exit code and all that it shows."""
    import fcntl
    import pty
    import termios

    screen, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    command = [sys.executable, "-m", "merging", *words]
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    running = subprocess.Popen(
        command,
        stdout=program,
        stderr=program if errors else subprocess.DEVNULL,
        cwd=folder,
        env=plain | {"TERM": "xterm"} | environment,
    )
    os.close(program)
    shown = b""
    try:
        while part := os.read(screen, 65536):
            shown += part
    except OSError:  # how a terminal ends
        pass
    os.close(screen)
    return running.wait(), shown.decode()
