"""Places of outputs, as people name them: other kinds of files, missing folders, files that exist, and --quiet."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from support.commands import merge, ok, refused
from support.tiny import adapters, checkpoint

ENDINGS = [".bin", ".pt", ".ckpt", ".txt", ".safetensor", ".SAFETENSORS"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two models, with the folder above them as the working folder."""
    _, tuned = checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    return [str(path) for path in tuned]


@pytest.mark.parametrize("ending", ENDINGS)
def test_another_kind_of_file_is_no_output(models: list[str], ending: str) -> None:
    before = sorted(Path.cwd().rglob("*"))
    for more in ([], ["--dry-run"]):
        said = refused("-m", "linear", *models, "-o", f"out{ending}", *more)
        assert f"no {ending} file is written: name a single file ending in .safetensors, or a folder" in said
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_point_in_a_folder_is_no_ending(models: list[str]) -> None:
    ok("-m", "linear", *models, "-o", "llama-3.1-v0.2")
    assert Path("llama-3.1-v0.2/model.safetensors").is_file()


def test_a_dry_run_remarks_on_an_output_that_exists(models: list[str]) -> None:
    Path("merged").mkdir()
    for name, more in (("merged", []), ("base", ["-o", "base"])):
        done = ok("-m", "linear", *models, *more, "--dry-run")
        assert f"note: {name} exists already: the merge needs another -o, or --overwrite\n" in done.stderr
        assert done.stdout.startswith("linear: ")
    assert "exists already" in refused("-m", "linear", *models)
    assert "exists already" not in ok("-m", "linear", *models, "--overwrite", "--dry-run").stderr


@pytest.mark.parametrize("output", ["new/deep/out", "new/deep/out.safetensors", "new/../other/out"])
def test_missing_parents_are_made(models: list[str], output: str) -> None:
    ok("-m", "linear", *models, "-o", output, "--dry-run")
    assert not Path("new").exists()
    ok("-m", "linear", *models, "-o", output)
    assert Path(output).exists()


def test_parents_of_a_merge_that_fails_are_removed(models: list[str]) -> None:
    kept = Path("kept")
    kept.mkdir()
    before = sorted(Path.cwd().rglob("*"))
    words = ["-m", "task_arithmetic", "--base", "base", *models, "--scale", "1e30", "--dtype", "float16"]
    refused(*words, "-o", "kept/new/deep/out")
    assert sorted(Path.cwd().rglob("*")) == before
    Path("file").touch()
    assert "is not a folder" in refused("-m", "linear", *models, "-o", "file/out")


def test_quiet_says_nothing_but_errors(models: list[str]) -> None:
    for words in (
        ["-m", "lines+ties", "--base", "base", *models, "-o", "out"],
        ["-m", "linear", *models, "-o", "other", "--dry-run"],
        ["compare", *models, "--base", "base"],
    ):
        assert ok(*words, "--overwrite").output
        assert ok(*words, "--overwrite", "--quiet").output == ""
    assert "exists already" in refused("-m", "linear", *models, "-o", "out", "--quiet")
    assert ok("-m", "linear", *models, "-o", "out2", "--quiet", "--json").stdout.startswith("{")


def test_every_number_has_its_meaning(models: list[str], tmp_path: Path) -> None:
    for number, words in enumerate((["lines+ties"], ["opcm"])):
        said = ok("-m", *words, "--base", "base", *models, "-o", f"out{number}").stderr
        facts = [line for line in said.splitlines() if line.startswith(("lines: ", "opcm: "))]
        assert facts
        assert all(re.fullmatch(r"[a-z]+: [a-z ]+: [0-9.e+-]+ \(.+\)", line) for line in facts), facts
    _, loras = adapters(tmp_path / "loras", 2)
    for method in ("orthogonalize+task_arithmetic", "do"):
        said = ok("-m", method, *loras, "-o", f"turned-{method}").stderr
        facts = [line for line in said.splitlines() if line.startswith("orthogonalize: ")]
        assert len(facts) == 5
        assert all(line.endswith(")") for line in facts), facts


def test_one_model_is_one(models: list[str]) -> None:
    assert "1 model by linear" in ok("-m", "linear", models[0], "-o", "one").stdout
    assert "1 model merged by `linear`" in Path("one/README.md").read_text()


# ---- hints


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--weights", "0.5", "0.5"], "--weights 0.5,0.5"),
        (["--weights", "1", "1", "-1"], "--weights 1,1,-1"),
        (["--weights", "0.5,", "0.5"], "write all values without spaces, as in 0.5,0.5"),
        (["--exclude", "embed,norm"], "a comma does not separate patterns. Give each by itself: 'embed', 'norm'"),
        (["--exclude", "model.layers.*.mlp"], "'model.layers.*.mlp*' means "),
        (["--exclude", "layers.?.mlp.*"], "'*layers.?.mlp.*' means "),
        (["--exclude", "MLP"], "Case matters: 'mlp' means "),
        (["--exclude", "zzz"], "a pattern is a part of a name, or with *, ? or [ the whole name, such as 'lm_head"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_hints(models: list[str], words: list[str], hint: str) -> None:
    done = merge("-m", "linear", *models, *words, "-o", "out")
    assert done.exit_code in (1, 2)
    assert hint in done.stderr, done.stderr
    if "'" in hint and "mlp" in hint:
        pattern = re.findall(r"'([^']+)' means", done.stderr)[0]
        ok("-m", "linear", *models, "--exclude", pattern, "-o", "out")


# ---- files that exist


def test_files_that_exist_are_not_replaced(models: list[str], tmp_path: Path) -> None:
    ok("continual", "init", "store", "--base", "base")
    ok("continual", "add", "store", models[0], "--threads", "1")
    for words, option, name in (
        (["compare", *models, "--base", "base"], "--plot", "new/c.png"),
        (["compare", *models, "--base", "base"], "--html", "new/c.html"),
        (["continual", "plot", "store"], "-o", "new/s.svg"),
    ):
        shutil.rmtree("new", ignore_errors=True)
        ok(*words, option, name)
        Path(name).write_text("mine")
        assert f"{name}: exists already: choose another name, or use --overwrite" in refused(*words, option, name)
        assert Path(name).read_text() == "mine"
        ok(*words, option, name, "--overwrite")
        assert Path(name).stat().st_size > 100
        assert [path.name for path in Path("new").iterdir()] == [Path(name).name]
