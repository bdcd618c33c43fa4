"""Every page does what it says: its commands and its Python run in order, and print the output that is shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from itertools import chain, pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from merging import ContinualStore
from merging.cli.main import cli
from support import tiny
from support.hub_fixture import Hub
from support.page_models import prepare
from support.pages import PAGES, ROOT, Block, blocks, merge_lines

LONG = {
    "docs/tasks/experts.md": "PEFT makes the adapters",
    "docs/tasks/compare.md": "it draws, and decomposes the base",
    "docs/tasks/merge-models.md": "it decomposes full matrices",
    "docs/tasks/watch.md": "it looks twice, with ten seconds between",
    "docs/tasks/pool.md": "the smoke test runs the base over texts",
    "docs/tasks/gguf.md": "a converter asks for the tokenizer",
    "docs/tasks/recycle.md": "it trains",
    "docs/tasks/search.md": "it loads the base",
    "docs/tasks/sentence-transformers.md": "sentence-transformers loads the merged model",
    "docs/tasks/verify.md": "PEFT loads the adapter",
    "docs/tasks/extract.md": "it decomposes changes",
    "docs/tasks/continual.md": "a store grows",
    "docs/tasks/stages.md": "it merges many times",
    "docs/tasks/soups.md": "it scores many merges",
    "docs/tasks/report.md": "it draws",
}
"""Pages that take the real base and much time, each with the reason."""

NOT_OURS = re.compile(
    r"python3 -m venv |\. \.venv|pip install |pytest\b|ruff |bash \.ci/run|python (examples|tests|docs)/"
)
"""Commands of a page that are not run here: they install, test, or measure for long."""

PRINTS = {
    "merge compress a/ ": "0.96 bits a parameter",
    "merge continual watch ": "added: incoming/late as step 1",
    "merge pool smoke ": "4 ok, 0 repaired, 0 quarantined",
    "merge recycle ": "modules shuffled",
    "merge search ": "plain average",
}
"""Words that some commands must print, among others."""

HUBS = re.compile(r" (org|me)/| hub:")
"""Names on the Hub, which only the test with a Hub runs."""

LOOP = re.compile(r"for model in (?P<models>.*); do (?P<body>merge .*) \|\| break; done")
"""A loop of a page: it adds one model after the other, and ends at the first that is refused."""

HARDLY = ["--steps", "2", "--lora-steps", "2", "--lora-rate", "0.001", "--resamples", "100"]
"""Options with which `merge recycle` hardly trains."""


def run_merge(line: str) -> tuple[int, str]:
    """Return the exit code of a command and its output, run in this process; ``< FILE`` is its standard input.

    A store in memory stands for S3.
    """
    line, _, file = line.partition(" < ")
    words = shlex.split(line.replace("s3://", "memory://"), comments=True)[1:]
    if words[:1] == ["recycle"]:
        words += HARDLY
    done = CliRunner().invoke(cli, words, input=Path(file).read_bytes() if file else None)
    return done.exit_code, done.output


def output_of(line: str) -> Path | None:
    """Return the file or folder that a command writes, if it says so."""
    words = shlex.split(line, comments=True)
    return next((Path(after) for word, after in pairwise(words) if word == "-o"), None)


def remove(output: Path) -> None:
    """Remove a file or folder, if it is there."""
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def unroll(line: str) -> list[str]:
    """Return the commands of a shell's loop over models; any other line alone."""
    loop = LOOP.fullmatch(line)
    return [loop["body"].replace("$model", model) for model in loop["models"].split()] if loop else [line]


def check_line(line: str, alternatives: bool) -> None:
    """Run one line of a block; a merge must succeed, and write its output.

    Lines that are alternatives may write what a line before them wrote.
    """
    if HUBS.search(line) or not line.startswith("merge "):
        assert HUBS.search(line) or NOT_OURS.match(line), f"is it run by anything? {line}"
        return
    output = output_of(line)
    if alternatives and (output or line.startswith(("merge --method ", "merge run "))):
        remove(output or Path("merged.safetensors" if ".safetensors" in line else "merged"))
    code, text = run_merge(line)
    assert code == 0, f"{line}\n{text}"
    assert output is None or output.exists() or "--dry-run" in line, line
    assert all(words in text for start, words in PRINTS.items() if line.startswith(start)), f"{line}\n{text}"


def check_shown(block: Block) -> None:
    """Run the command in the first line of a block; the other lines are its output."""
    line, _, shown = block.text.partition("\n")
    code, text = run_merge(line.removeprefix("$ "))
    assert code in (0, 1), text
    assert text == shown


def run_python(block: Block, following: Block | None) -> None:
    """Run a block of Python, which prints the text behind it, if any."""
    if "@merging.method" in block.text:  # it declares a method for the whole process
        done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = done.stdout
    else:
        with redirect_stdout(StringIO()) as printed:
            exec(compile(block.text, "block", "exec"), {"__name__": "block"})
        text = printed.getvalue()
    if text:
        assert following
        assert following.language == "text"
        assert text == following.text


def check_page(page: str) -> int:
    """Run the blocks of a page in order, and return how many there were to run."""
    every = blocks(page)
    ran = 0
    for block, following in pairwise([*every, None]):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            for output in re.findall(r'output="(\w+)"', block.text):
                remove(Path(output))
            run_python(block, following)
        elif block.language == "bash":
            for line in chain.from_iterable(map(unroll, block.text.splitlines())):
                check_line(line, alternatives=page != "docs/quick-start.md")
        elif block.text.startswith("$ merge "):
            check_shown(block)
        else:
            continue
        ran += 1
    return ran


WITH_CODE = [page for page in PAGES if any(each.language in ("bash", "python") for each in blocks(page))]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in LONG])
def test_blocks_run(page: str, small_models: Path, workplace: Callable[[Path], Path]) -> None:
    """With small models, for the everyday run."""
    prepare(page, workplace(small_models))
    assert check_page(page) > 0


@pytest.mark.parametrize("order", [("README.md", "docs/quick-start.md"), ("docs/quick-start.md", "README.md")])
def test_shipped_adapters_are_merged_in_any_order_and_twice(
    order: tuple[str, str], workplace: Callable[[Path], Path], small_models: Path
) -> None:
    """A newcomer follows both pages in one clone, and starts again."""
    workplace(small_models)
    for page in (*order, *order):
        for block in blocks(page):
            lines = [line for line in block.text.splitlines() if line.startswith("merge --method ")]
            if block.language == "python" and "merging.merge(" in block.text:
                with redirect_stdout(StringIO()):
                    exec(compile(block.text, page, "exec"), {"__name__": "block"})
            for line in lines if block.language == "bash" else ():
                if "examples/adapters" in line:
                    code, text = run_merge(line)
                    assert code == 0, text


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_run_with_real_models(page: str, real_models: Path, workplace: Callable[[Path], Path]) -> None:
    prepare(page, workplace(real_models))
    assert check_page(page) > 0


@pytest.mark.exhaustive
def test_examples_on_the_pages_of_methods_run(
    monkeypatch: pytest.MonkeyPatch, small_models: Path, workplace: Callable[[Path], Path]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    workplace(small_models)
    for text in import_module("method_pages").method_pages().values():
        (line,) = re.findall(r"^merge --method .*$", text, re.MULTILINE)
        if "--stats" not in line:  # the files come from merge stats: docs/tasks/statistics.md and tests/statistics
            check_line(line, alternatives=True)


@pytest.mark.exhaustive
def test_loops_run_in_a_shell(small_models: Path, workplace: Callable[[Path], Path]) -> None:
    """As they are written, and again; a model that is refused ends them."""
    folder = workplace(small_models)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    loops = [line for page in PAGES for block in blocks(page) for line in block.text.splitlines() if LOOP.match(line)]
    assert loops

    def run_loop(line: str) -> str:
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
        return done.stdout + done.stderr

    for line in loops:
        store = ContinualStore.create(folder / "grown", base=folder / "base")
        assert "Error" not in run_loop(line) + run_loop(line)
        assert len(store.log()) == len(unroll(line)) == 5
        ended = run_loop(line.replace("two", "nothing"))
        assert "nothing: there is no such file or folder" in ended
        assert ended.count("of the same content was added before") == 1
        shutil.rmtree(folder / "grown")


def hub_lines() -> Iterator[str]:
    for page in PAGES:
        yield from (line for line in merge_lines(page) if HUBS.search(line))


@pytest.fixture
def stocked_hub(hub: Hub, tmp_path: Path) -> Mapping[str, str]:
    """The environment of a user of a Hub that holds the models which the pages name."""
    base, tuned = tiny.checkpoint(tmp_path / "local", 2)
    for name, folder in (("base", base), ("one", tuned[0]), ("two", tuned[1]), ("name", tuned[0])):
        hub.put(f"org/{name}", folder)
    hub.tag("org/two", "v1.0")
    for number, task in enumerate(("bbc", "spam"), 1):
        hub.put(f"org/adapter-{number}", ROOT / "examples" / "adapters" / task)
    ContinualStore.create(tmp_path / "store", base=base)
    return {**hub.environment(tmp_path / "home"), "HF_TOKEN": hub.token}


@pytest.mark.exhaustive
def test_commands_of_the_hub_run(hub: Hub, stocked_hub: Mapping[str, str], tmp_path: Path) -> None:
    """One after the other, with a Hub that holds the models that they name."""
    lines = list(hub_lines())
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if not line.startswith("merge push "):
            remove(tmp_path / (output_of(line) or "merged"))
        command = [sys.executable, "-m", "merging", *words]
        done = subprocess.run(command, cwd=tmp_path, env=stocked_hub, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert "adapter_model.safetensors" in hub.files("me/merged")
