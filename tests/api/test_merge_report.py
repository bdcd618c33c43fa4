"""The report of a merge: its page is whole or not there, and whatever happens to it, the merge is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import merging
from merging.engine import journal
from merging.errors import OptionError, OutputError, ResultWarning
from support import tiny
from support.commands import ok, refused
from support.systems import POSIX


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have only tables, as without matplotlib: pictures take longer than these merges."""
    monkeypatch.setattr("merging.api.report_page.find_spec", lambda name: None)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base, tuned = tiny.checkpoint(tmp_path, 2, layers=2)
    return [base, *tuned]


def numbers(merged: merging.Merged) -> dict[str, Any]:
    """The report in plain values, without what differs from run to run."""
    assert merged.report is not None
    plain = merged.report.to_dict()
    json.dumps(plain, allow_nan=False)
    return {name: value for name, value in plain.items() if not name.startswith("seconds")}


def test_command_writes_a_page_and_prints_its_numbers(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    page = tmp_path / "pages" / "report.html"
    words = ["--method", "task_arithmetic", "--base", base, *tuned, "-o", tmp_path / "out", "--report", page]
    shown = json.loads(ok(*words, "--json").stdout)["report"]
    assert shown["measured"] == "changes"
    assert [each["name"] for each in shown["models"]] == ["tuned0", "tuned1"]
    assert {"preparing", "merging", "making it durable"} <= shown["seconds"].keys()
    assert {each["name"] for each in shown["tensors"]} == tiny.load(base).keys()
    assert sum(shown["total"]["shares"]) == pytest.approx(1)
    assert [each["name"] for each in shown["blocks"]] == ["IN", "model.layers.0", "model.layers.1", "OUT"]
    assert {each["name"]: each["tensors"] for each in shown["kinds"]}["model.layers.*.mlp.up_proj.weight"] == 2
    text = page.read_text(encoding="utf-8")
    assert "model.layers.*.mlp.up_proj.weight" in text and "pip install &#x27;merging[report]&#x27;" in text
    assert "report.html: exists already" in refused(*words, "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    ok(*words, "--overwrite")
    assert "report" not in json.loads(ok(*words[:-2], "--overwrite", "--json").stdout)


@pytest.mark.parametrize("command", ["run", "bake", "extract", "rerun", "soup"])
def test_every_command_that_merges_has_reports(command: str, models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    out, page = tmp_path / "out", tmp_path / "report.html"
    words: list[object] = list(tuned)
    if command == "run":
        (tmp_path / "recipe.yml").write_text(f"models: [{tuned[0]}, {tuned[1]}]\nmethod: ties\nbase: {base}\n")
        words = [tmp_path / "recipe.yml"]
    elif command == "bake":
        below, adapters = tiny.adapters(tmp_path / "loras", 2)
        words = [*adapters, "--base", below]
    elif command == "extract":
        words = [tuned[0], "--base", base, "--rank", 2]
    elif command == "rerun":
        merging.merge(tuned, method="ties", base=base, output=tmp_path / "before")
        words = [tmp_path / "before"]
    done = json.loads(ok(command, *words, "-o", out, "--report", page, "--json").stdout)
    assert done["report"]["tensors"] and page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_pages_that_cannot_be_written_are_refused_first(models: list[Path], tmp_path: Path) -> None:
    def merge(report: Any, output: str = "out") -> merging.Merged:
        return merging.merge(models[1:], method="linear", output=tmp_path / output, report=report)

    for wrong, message in (("r.txt", "a page is a .html"), (models[0] / "x", "a page is"), (1, "report should be")):
        with pytest.raises(OptionError, match=message):
            merge(wrong)
    with pytest.raises(OutputError, match="it is a folder"):
        (tmp_path / "folder.html").mkdir()
        merge(tmp_path / "folder.html")
    with pytest.raises(OptionError, match=r"report=: .* is the output itself"):
        merge(tmp_path / "same.html", "same.html")
    with pytest.raises(OutputError, match=r"^memory://box/r\.html: this is written to a local disk only"):
        merge("memory://box/r.html")
    said = refused("--method", "linear", *models[1:], "-o", tmp_path / "out", "--report", "")
    assert "a path is empty" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "same.html").exists()
    merged = merge(tmp_path / "out" / "report.html")
    assert merged.report is not None and (tmp_path / "out" / "report.html").exists()


def test_a_page_that_fails_keeps_the_merge(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("merging.report.page.replace_file", fail)
    with pytest.warns(ResultWarning, match=r"the merge is done, and its report is not: .*No space left"):
        merged = merging.merge(models[1:], method="linear", output=tmp_path / "out", report=tmp_path / "r.html")
    assert tiny.load(tmp_path / "out").keys() == tiny.load(models[0]).keys()
    assert merged.notices[-1].startswith("warning: the merge is done")
    assert not (tmp_path / "r.html").exists()


@POSIX
@pytest.mark.parametrize("measured", [True, False])
def test_resumed_merges_have_the_numbers_of_both_runs(
    measured: bool, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the former run measured them; else the page says that they are missing."""
    base, *tuned = models
    options: dict[str, Any] = {"method": "task_arithmetic", "base": base}
    whole = merging.merge(tuned, output=tmp_path / "whole", report=tmp_path / "whole.html", **options)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_PERIOD", 0.001)

        def fail(self: object) -> None:
            raise OSError(5, os.strerror(5))

        patch.setattr("merging.storage.writer.TensorWriter.finish", fail)
        first = tmp_path / "r.html" if measured else None
        with pytest.raises(OutputError, match="the finished work stays in"):
            merging.merge(tuned, output=tmp_path / "out", resume=True, report=first, **options)
    assert not (tmp_path / "r.html").exists()
    done = merging.merge(tuned, output=tmp_path / "out", report=tmp_path / "r.html", **options)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert done.report is not None and whole.report is not None
    if measured:
        assert done.report.tensors == whole.report.tensors and not done.report.missing
    else:
        assert len(done.report.missing) == 7 and not done.report.tensors
        assert "former run merged without a report" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_stages_sharded_and_quantized_outputs_have_reports(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    stage = merging.Recipe(models=tuned, method="ties", base=base)
    staged = merging.merge(
        [stage, tuned[0]], method="linear", base=base, output=tmp_path / "a", shard_size=500, report=tmp_path / "a.html"
    )
    assert numbers(staged)["stages"] == {"models.0": "ties"}
    assert len(numbers(staged)["tensors"]) == 7
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    base, tuned = tiny.checkpoint(tmp_path / "wide", 2, width=64)
    coded = merging.merge(
        tuned, method="ties", base=base, quantize="fp8-channel", output=tmp_path / "b", report=tmp_path / "b.html"
    )
    errors = [each["quantization_error"] for each in numbers(coded)["tensors"]]
    assert any(errors) and max(filter(None, errors)) == max(coded.quantization_errors.values())


@pytest.mark.exhaustive
def test_a_page_of_thousands_of_tensors_is_small(tmp_path: Path) -> None:
    """And names of any script are whole in it."""
    base, tuned = tiny.checkpoint(tmp_path, 2, layers=600, width=2)
    japanese = tuned[0].rename(tmp_path / "融合モデル")
    done = merging.merge(
        [japanese, tuned[1]], method="task_arithmetic", base=base, output=tmp_path / "out", report=tmp_path / "r.html"
    )
    assert done.report is not None and len(done.report.tensors) == 1203
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "融合モデル" in text
    assert len(text) < 200_000
