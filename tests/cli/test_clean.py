"""``merge clean`` lists and removes what killed runs left, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from merging.storage.leftovers import write_identity
from merging.storage.staging import StagedOutput
from support.commands import ok, refused
from support.systems import POSIX

pytestmark = POSIX


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with leftovers of all kinds, and files of the user's."""
    for name, old in (("one", False), ("two.safetensors", False), ("three", True)):
        held = tmp_path / f".{name}.abcd1234.partial"
        (held / "out").mkdir(parents=True)
        (held / "out/model.safetensors").write_bytes(bytes(2_000_000))
        if old:
            (held / "old").mkdir()
            (held / "old/config.json").write_text("{}")
    write_identity(tmp_path / ".one.abcd1234.partial", {"method": "linear"})
    unfinished = tmp_path / ".config.json.abcdefgh.new"
    unfinished.write_text("{}")
    os.utime(unfinished, (1, 1))
    (tmp_path / ".fresh.json.abcdefgh.new").write_text("{}")
    (tmp_path / ".mine.abcd1234.partial").mkdir()
    (tmp_path / ".mine.abcd1234.partial/thesis.tex").write_text("")
    (tmp_path / ".link.abcd1234.partial").symlink_to(tmp_path / ".one.abcd1234.partial")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_leftovers_are_listed(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    said = ok("clean").stdout.splitlines()
    assert [line.split()[0] for line in said] == [
        "leftover", ".config.json.abcdefgh.new", ".one.abcd1234.partial", ".three.abcd1234.partial",
        ".two.safetensors.abcd1234.partial", "merge",
    ]  # fmt: skip
    assert "the same command goes on with it" in said[2]
    assert "holds the output that was to be replaced" in said[3]
    assert "2.0 MB" in said[2]
    assert said[-1] == "merge clean --remove removes them"
    (folder / "a b").mkdir()
    assert ok("clean", "a b", folder).stdout.endswith(f"\nmerge clean 'a b' {folder} --remove removes them\n")
    (folder / "a b").rmdir()
    assert sorted(folder.rglob("*")) == before


def test_leftovers_are_removed(folder: Path) -> None:
    ok("clean", "--remove")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".fresh.json.abcdefgh.new", ".link.abcd1234.partial", ".mine.abcd1234.partial", "three",
    ]  # fmt: skip
    assert (folder / "three/config.json").read_text() == "{}"
    assert ok("clean").stdout == "no killed run left anything\n"


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", False, False, {"method": "linear"}) as staged:
        assert ok("clean", str(tmp_path), "--remove").stdout == "no killed run left anything\n"
        assert staged.folder.exists()


def test_as_json(folder: Path) -> None:
    said = json.loads(ok("clean", "--json", str(folder)).stdout)
    assert [(Path(each["output"]).name, each["resumable"]) for each in said["leftovers"]] == [
        ("config.json", False), ("one", True), ("three", False), ("two.safetensors", False),
    ]  # fmt: skip
    assert said["removed"] is False


def test_a_wrong_folder_is_refused(tmp_path: Path) -> None:
    assert "no: there is no such folder" in refused("clean", str(tmp_path / "no"))
    (tmp_path / "file").touch()
    assert "file: is a file: name the folder that it is in" in refused("clean", str(tmp_path / "file"))
    assert "a path is empty: is a variable of a script not set?" in refused("clean", "", "--remove")
