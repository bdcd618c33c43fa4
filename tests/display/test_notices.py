"""The library prints nothing: notices are in results, warnings are of one class, and the rest is logged."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import merging
from merging.cli.main import cli
from merging.errors import ResultWarning
from support.paths import ROOT
from support.tiny import adapters

SOURCES = sorted((ROOT / "merging").rglob("*.py"))

PRINTING = {
    "merging/hub/client.py": "asks whether stderr is a terminal, for the bars of huggingface_hub",
    "merging/display/progress.py": "the bar that progress=True asks for",
    "merging/soups/scoring.py": "reads the output of a user's command",
}
"""Files that name a standard stream, with the reason."""

OTHERS = {
    "merging/object_stores/connection.py": "keeps Python from printing what the drivers log of failures that pass",
    "merging/serving/trial_load.py": "listens to the programs that it loads models with",
}
"""Files that use loggers of other packages."""

CATEGORIES = ("MergingWarning", "ResultWarning", "DeprecationWarning")
"""Classes of warnings: ours, and Python's own for names that will go."""


def test_nothing_is_printed_by_the_package() -> None:
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            stream = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr", "__stdout__", "__stderr__")
            if printing or stream:
                found[path.relative_to(ROOT).as_posix()] = ast.unparse(node)
    assert found.keys() == PRINTING.keys()


def test_warnings_and_loggers_are_ours() -> None:
    seen = 0
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and called == "warnings.warn":
                assert ast.unparse(node.args[1]) in CATEGORIES, name
                seen += 1
            if isinstance(node, ast.Call) and called.endswith("getLogger") and name not in OTHERS:
                assert ast.unparse(node.args[0]) == "__name__", name
                seen += 1
    assert seen > 8


SCRIPT = """
import merging
from merging.pool import Pool
from merging.pool.candidates import candidates_in

models = ["adapter0", "adapter1"]
options = {"base": "base", "allow_different_bases": True}
merging.preview(models, method="linear", **options)
merging.merge(models, method="linear", output="merged", **options)
merging.merge(models, method="lines", output="alone")
merging.compare(models, **options)
pack = merging.compress("adapter0", "pack.safetensors")
merging.decompress(pack.path, "unpacked")
store = merging.ContinualStore.create("store", base="base")
for model in models:
    store.add(model, allow_different_bases=True)
store.export("exported")
pool = Pool.create("pool", "base", ["tiny/base"])
pool.build(candidates_in("."))
"""


def test_a_process_prints_nothing(tmp_path: Path) -> None:
    adapters(tmp_path, 2)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "exported").is_dir()


def test_a_merge_that_loses_warns_where_it_was_called(tmp_path: Path) -> None:
    base, models = adapters(tmp_path, 2)
    with pytest.warns(merging.MergingWarning, match="the rank discards") as caught:
        merged = merging.merge(models, method="ties", base=base, rank=1, output=tmp_path / "out")
    (warning,) = caught
    assert warning.filename == __file__
    assert warning.category is ResultWarning
    assert f"warning: {warning.message}" in merged.notices


def test_other_notices_are_no_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, models = adapters(tmp_path, 2)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "merging"):
        warnings.simplefilter("error")
        merged = merging.merge(models, method="lines", output=tmp_path / "out")
    assert merged.notices
    assert not any(notice.startswith("warning: ") for notice in merged.notices)
    assert set(merged.notices) <= set(caplog.messages)
    assert any("merging 2 models by lines" in message for message in caplog.messages)
    assert {record.name.partition(".")[0] for record in caplog.records} == {"merging"}


def test_the_command_prints_a_warning_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("always")
        cli.main(["-m", "ties", "--base", "base", "--rank", "1", "adapter0", "adapter1"])
    assert end.value.code == 0
    printed = capsys.readouterr().err
    assert printed.count("the rank discards") == 1
    assert "ResultWarning" not in printed
