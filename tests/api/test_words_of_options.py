"""Messages name options as the reader types them: parameters in Python, flags on the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import merging
from merging.api.usage import describe_usage
from merging.cli.main import cli
from merging.errors import MergingError, command_line_words, either, name_options, option
from merging.serving import PROGRAMS, verify
from support.commands import refused
from support.paths import ROOT
from support.tiny import adapters, checkpoint, model

FLAG = re.compile(r"(?<![\w-])--[a-z]|(?<!\w)-o\b")
COMMAND = re.compile(r"\bmerge (continual|pool|compress|decompress|inspect|verify|route|recycle|run)\b")
OTHERS = {
    "api/usage.py": "commands of other programs that load an output",
    "cluster/connection.py": "a command of Ray",
    "methods/choosing.py": "advice, whose methods are written as on the command line",
    "plan/recipe_settings.py": "settings of --set, which Python has not",
    "report/page.py": "variables of CSS",
    "serving/": "the servers' own options",
    "sources/formats.py": "the text of a command",
    "storage/store_output.py": "the command that cleans, which Python has not",
    "sources/quantized/quantized_weights.py": "the option of another program, mlx_lm",
}


def _texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """The texts of a file but docstrings, and the command line's own words in calls of ``either``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "either":
            yield from _texts(node.args[1])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
        else:
            yield from _texts(node)


def test_no_text_of_the_package_spells_a_flag() -> None:
    """So that every option in a message comes from ``option``, which knows the reader."""
    found = [
        f"{name}:{text.lineno}: {text.value}"
        for path in sorted((ROOT / "merging").rglob("*.py"))
        if not (name := path.relative_to(ROOT / "merging").as_posix()).startswith((*OTHERS, "errors.py"))
        for text in _texts(ast.parse(path.read_text(encoding="utf-8")))
        if FLAG.search(str(text.value))
    ]
    assert found == []


def test_no_text_of_the_package_names_a_command() -> None:
    """Formats say which command writes them; a recipe of mergekit is no recipe of `merge run`."""
    others = (
        "methods/choosing.py",
        "sources/__init__.py",
        "sources/formats.py",
        "plan/recipe_values.py",
        "moe/recipe.py",
    )
    found = [
        f"{name}:{text.lineno}: {text.value}"
        for path in sorted((ROOT / "merging").rglob("*.py"))
        if not (name := path.relative_to(ROOT / "merging").as_posix()).startswith(others)
        for text in _texts(ast.parse(path.read_text(encoding="utf-8")))
        if COMMAND.search(str(text.value))
    ]
    assert found == []


def test_remedies_of_verify_spell_no_option_of_ours() -> None:
    """They have them in braces, which ``name_options`` fills in for the reader."""
    remedies = {rule.todo for program in PROGRAMS.values() for rules in program.rules.values() for rule in rules} | {
        todo for program in PROGRAMS.values() for todo in program.instead.values()
    }
    ours = [todo for todo in remedies for flag in FLAG.findall(todo) if not re.search("start|converter", todo)]
    assert ours == []
    assert not [name_options(todo) for todo in remedies if re.search(r"\{\w", name_options(todo))]


@pytest.mark.parametrize(
    ("text", "typed", "called"),
    [
        ("bake it with {kind=model}", "bake it with --as model", 'bake it with kind="model"'),
        ("{method=passthrough, base=BASE}", "--method passthrough --base BASE", 'method="passthrough", base=BASE'),
        ("{values=True} or {base}", "--values or --base", "values=True or base="),
        ('add "metadata": {} to it', 'add "metadata": {} to it', 'add "metadata": {} to it'),
    ],
)
def test_options_in_braces(text: str, typed: str, called: str) -> None:
    assert name_options(text) == called
    with command_line_words():
        assert name_options(text) == typed


def test_remedies_follow_the_caller(folder: Path) -> None:
    """The verdict, its table, and the use of an output."""
    file = merging.merge([folder / "loras" / "adapter0"], method="linear", output=folder / "bare.safetensors").path
    usage = "PEFT opens a folder with a config, and no bare adapter file: merge with {output=FOLDER} for one"
    with command_line_words():
        assert [each.todo for each in verify(str(file), ["peft"]).findings if each.todo] == ["merge it with -o FOLDER"]
        assert describe_usage(file) == usage.replace("{output=FOLDER}", "-o FOLDER")
    found = verify(str(file), ["peft"])
    assert [each.todo for each in found.findings if each.todo] == ["merge it with output=FOLDER"]
    assert "output=FOLDER" in repr(found) + found._repr_html_()
    assert describe_usage(file) == usage.replace("{output=FOLDER}", "output=FOLDER")


@pytest.mark.parametrize(
    ("arguments", "flag", "keyword"),
    [
        (("base",), "--base", "base="),
        (("overwrite", True), "--overwrite", "overwrite=True"),
        (("normalize", False), "--no-normalize", "normalize=False"),
        (("kind", "model"), "--as model", 'kind="model"'),
        (("format", "diffusers", "kohya"), "--format diffusers or kohya", 'format="diffusers" or "kohya"'),
        (("rank", 8), "--rank 8", "rank=8"),
        (("output",), "-o", "output="),
        (("allow_different_bases", True), "--allow-different-bases", "allow_different_bases=True"),
    ],
)
def test_option(arguments: tuple[Any, ...], flag: str, keyword: str) -> None:
    assert option(*arguments) == keyword
    with command_line_words():
        assert option(*arguments) == flag
        with command_line_words():
            assert either("typed", "called") == "typed"
        assert option(*arguments) == flag
    assert either("typed", "called") == "called"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("base",), "base in the recipe"),
        (("kind", "model"), "as: model in the recipe"),
        (("normalize", False), "normalize: false in the recipe"),
        (("allow_different_bases", True), "allow_different_bases: true in the recipe"),
        (("overwrite", True), "--overwrite"),
    ],
)
def test_settings_of_a_recipe(arguments: tuple[Any, ...], words: str) -> None:
    """Where a recipe is carried out, only the options of `merge run` are named as such."""
    with command_line_words({"overwrite", "output"}):
        assert option(*arguments) == words
        with command_line_words():
            assert option(*arguments).startswith("--")
        assert option(*arguments) == words
    assert "recipe" not in option(*arguments)


def test_run_names_the_keys_of_its_recipe(folder: Path) -> None:
    recipe = folder / "lacking.yml"
    recipe.write_text("models: [tuned0, tuned1]\nmethod: ties\n", encoding="utf-8")
    for words, hint in ((["run", recipe], "base in the recipe"), (["-m", "ties", folder / "tuned0"], "--base")):
        said = CliRunner().invoke(cli, [*map(str, words), "-o", str(folder / "none")]).stderr
        assert said.endswith(f"full checkpoints need this model as {hint}\n")
    taken = CliRunner().invoke(
        cli, ["run", str(recipe), "--set", f"base={folder / 'base'}", "-o", str(folder / "taken")]
    )
    assert "choose another -o, or use --overwrite" in taken.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes of it, two adapters, and outputs that are there."""
    root = tmp_path_factory.mktemp("words")
    checkpoint(root)
    adapters(root / "loras", 2)
    (root / "taken").mkdir()
    (root / "taken" / "model.safetensors").touch()
    return root


REFUSALS: dict[str, tuple[list[str], dict[str, Any], str, str]] = {
    "no base": (["tuned0", "tuned1"], {"method": "ties"}, "--base", "base="),
    "an adapter as base": (["tuned0"], {"method": "ties", "base": "loras/adapter0"}, "--base", "base="),
    "weights of adapters": (["loras/adapter0"] * 2, {"method": "slerp"}, "--base", "base="),
    "two of one": (["tuned0", "tuned1"], {"method": "nearswap"}, "--base", "base="),
    "sum of zero": (["tuned0"] * 2, {"method": "linear", "weights": (1, -1)}, "--no-normalize", "normalize=False"),
    "taken": (["tuned0"], {"method": "linear", "output": "taken"}, "--overwrite", "overwrite=True"),
    "rank of a model": (["tuned0"], {"method": "linear", "rank": 2}, "--rank", "rank="),
    "model of adapters": (["loras/adapter0"], {"method": "linear", "kind": "model"}, "--base", "base="),
    "mixed": (["tuned0", "loras/adapter0"], {"method": "linear"}, "--base", "base="),
    "experts": (["loras/adapter0"], {"method": "linear", "experts": "apart"}, "--experts", "experts="),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_each_door_speaks_its_own_words(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same refusal: Python names no flag, and the command line no parameter."""
    monkeypatch.chdir(folder)
    models, options, flag, keyword = REFUSALS[case]
    with pytest.raises(MergingError) as error:
        merging.merge(models, **{"output": "out", **options})
    assert keyword in str(error.value)
    assert not FLAG.search(str(error.value))
    assert error.value.__cause__ is None
    names = {"kind": "--as", **{name: f"--{name}" for name in options if name != "kind"}}
    values = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in options.items()}
    words = [word for name, value in values.items() for word in (names[name], value)]
    message = refused("merge", *words, *([] if "output" in options else ["--output", "out"]), *models)
    assert flag in message
    assert keyword not in message


def test_tensors_speak_of_parameters() -> None:
    tensors = model()
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: merging.merge_state_dicts([tensors], method="ties"), "base="),
        (lambda: merging.merge_state_dicts([tensors] * 2, method="linear", weights=(1, -1)), "normalize=False"),
        (lambda: merging.merge_state_dicts([tensors] * 3, method="nearswap", base=tensors), "base="),
        (lambda: merging.merge_deltas([{}] * 2, method="slerp"), "base"),
    ]
    for call, keyword in refusals:
        with pytest.raises(MergingError) as error:
            call()
        assert keyword in str(error.value)
        assert not FLAG.search(str(error.value))


def test_notices_speak_of_parameters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    plan = merging.preview(["tuned0", "tuned1"], method="linear", layers=3)
    assert "layers= has no effect: linear does not depend on depth" in plan.notices
