"""`merge recycle`: what it prints, and what it refuses with one clear message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import merging
from merging.cli.main import cli
from merging.errors import FormatError, InputError, OptionError, OutputError
from support.recycling_tasks import ROWS, World, causal

# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(world: World, tmp_path: Path) -> Path:
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in getattr(world, part)))
    return tmp_path


def _command(world: World, files: Path, *words: object) -> Any:
    given = ["recycle", world.pool, "--base", world.base, "--train", files / "train.jsonl", "--valid",
             files / "valid.jsonl", "--test", files / "test.jsonl", "-o", files / "out", "--k", 2, "--steps", 4,
             "--lora-steps", 4, "--lora-rate", 0.01]  # fmt: skip
    return CliRunner().invoke(cli, [str(word) for word in (*given, *words)])


def test_the_command_prints_the_report(world: World, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("merging.recycling.page.find_spec", find_spec)
    done = _command(world, files)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(title) for line in lines) for title in ROWS)
    told = json.loads((files / "out" / "recycling.json").read_text())
    assert f"{told['verdict']}." in lines
    usage = f"peft.PeftModel.from_pretrained(model, {str(files / 'out')!r})"
    assert f"to use it: {usage}" in done.stderr.splitlines()
    assert (files / "out" / "recycling.html").read_text().count("data:image/svg+xml") >= 2
    again = _command(world, files, "--json", "--overwrite", "--quiet")
    printed = json.loads(again.stdout)
    assert (printed["rows"], printed["usage"]) == (told["rows"], usage)
    assert again.stderr == ""


def _write(name: str, text: str) -> Callable[[Path], list[object]]:
    def made(files: Path) -> list[object]:
        (files / name).write_text(text)
        return [f"--{name.partition('.')[0]}", files / name]

    return made


GOOD = '{"text": "w1 w2", "label": "low"}\n'


WRONG: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no JSON": (_write("train.jsonl", GOOD + '{"text": "w1", "label"\n'), "train.jsonl, line 2: is not JSON"),
    "no object": (_write("train.jsonl", "\n" + GOOD + "[1]\n"), "train.jsonl, line 3: should be an object"),
    "a typo": (_write("train.jsonl", '{"txt": "w1", "label": "low"}\n'), "no field 'txt' (did you mean 'text'?)"),
    "no label": (_write("train.jsonl", GOOD + '{"text": "w1", "label": null}\n'), "line 2: the label is None"),
    "no text": (_write("train.jsonl", '{"text": " ", "label": "low"}\n'), "line 1: text is ' '"),
    "mixed": (_write("train.jsonl", GOOD + '{"prompt": "a", "completion": "b"}\n'), "line 2: has a completion"),
    "empty": (_write("train.jsonl", "\n\n"), "train.jsonl: holds no examples"),
    "no file": (lambda files: ["--train", files / "none.jsonl"], "none.jsonl: cannot be read: No such file"),
    "binary": (lambda files: ["--train", files / "bad.jsonl"], "bad.jsonl: is not text in UTF-8"),
    "new label": (_write("test.jsonl", GOOD.replace("low", "middle")), "test.jsonl, line 1: no training or validation"),
    "label of no head": (_write("train.jsonl", GOOD.replace("low", "left")), "line 1: the model's head has no label"),
    "other kind": (_write("test.jsonl", '{"prompt": "a", "completion": "b"}\n'), "test.jsonl, line 1: has a"),
    "method": (lambda files: ["--method", "ourz"], "there is no method 'ourz' (did you mean 'ours'?)"),
    "method of weights": (lambda files: ["--method", "slerp"], "slerp merges weights, and adapters are changes"),
    "nothing to tune": (lambda files: ["--method", "ties", "--granularity", "layer"], "ties has no coefficients"),
    "finer search": (lambda files: ["--method", "lorahub", "--granularity", "layer"], "lorahub searches one"),
    "no target": (lambda files: ["--select", "cosine", "--target-lora", "none"], "compares with a target LoRA"),
    "target": (lambda files: ["--target-lora", files / "nowhere"], "nowhere"),
    "no k": (lambda files: ["--k", "0"], "k = 0: should be "),
    "rate": (lambda files: ["--rate", "nan"], "rate = nan"),
    "output": (lambda files: ["-o", files / "train.jsonl"], "no .jsonl file is written"),
    "no folder": (lambda files: ["-o", files / "train.jsonl" / "out"], "train.jsonl is not a folder"),
    "a file": (lambda files: ["-o", files / "x.safetensors"], "name a folder with -o"),
    "base": (lambda files: ["--base", files], "cannot be loaded by transformers"),
    "no base": (lambda files: ["--base", files / "none"], "none: is not a folder of a model"),
    "device": (lambda files: ["--device", "quantum"], "quantum"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_clear_message(name: str, world: World, files: Path) -> None:
    (files / "bad.jsonl").write_bytes(b"\xff\xfe\x00")
    make, message = WRONG[name]
    done = _command(world, files, *make(files), "--quiet")
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (files / "out").exists()


def test_choices_are_checked_by_the_command(world: World, files: Path) -> None:
    done = _command(world, files, "--select", "evalution")
    assert done.exit_code == 2
    assert "evaluation" in done.stderr


def test_an_output_that_cannot_be_written(world: World, files: Path) -> None:
    closed = files / "closed"
    closed.write_text("a file, no folder")
    done = _command(world, files, "-o", closed / "out", "--quiet")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    done = _command(world, files, "-o", world.pool)
    assert done.exit_code == 1
    assert "would replace the input" in done.stderr


def test_settings_of_python_are_checked(world: World, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no option 'granularty' \(did you mean 'granularity'\?\)"):
        merging.recycle(**world.arguments(output=tmp_path / "out"), granularty="layer")
    with pytest.raises(InputError, match="there is no such adapter or folder"):
        merging.recycle(**world.arguments(pool=tmp_path / "none", output=tmp_path / "out"))
    with pytest.raises(InputError, match="holds no adapter"):
        merging.recycle(**world.arguments(pool=tmp_path, output=tmp_path / "out"))
    with pytest.raises(InputError, match="too few examples"):
        merging.recycle(**world.arguments(train=world.train[:1], valid=None, output=tmp_path / "out"))
    with pytest.raises(OutputError, match="exists already"):
        merging.recycle(**world.arguments(output=world.base))
    assert not any(tmp_path.iterdir())


def test_texts_are_refused_what_makes_answers_sure(tmp_path: Path) -> None:
    world = causal(tmp_path)
    with pytest.raises(OptionError, match="adamerging makes answers sure"):
        merging.recycle(**world.arguments(output=tmp_path / "out", method="adamerging"))
    with pytest.raises(OptionError, match="give examples with prompt and completion"):
        labelled = [{"text": "w1", "label": "low"}, {"text": "w2", "label": "high"}]
        merging.recycle(**world.arguments(output=tmp_path / "out", train=labelled, valid=labelled, test=None))
    with pytest.raises(FormatError, match="chat template"):
        merging.recycle(**world.arguments(output=tmp_path / "out", chat=True))
    long = [{"prompt": "w1", "completion": " ".join(["w1"] * 100)}]
    with pytest.raises(FormatError, match="the completion has 101 tokens, of at most 63"):
        merging.recycle(**world.arguments(output=tmp_path / "out", train=long))
    assert not (tmp_path / "out").exists()
