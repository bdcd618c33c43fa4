"""Stores of strangers: nothing is read, written or deleted through a link in one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from merging.continual import ContinualStore
from merging.errors import FormatError
from support.stores import Models, contents, grown, ok, said

WRITES = (["rollback", "--to", 0], ["gc", "--keep", 1])


def linked(path: Path, elsewhere: Path) -> None:
    """Move a part of a store elsewhere, and link to it."""
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("part", ["states", "manifest.json", ".lock"])
def test_parts_that_are_links(full: Models, tmp_path: Path, part: str) -> None:
    """A linked folder of states would be emptied at the next step, a linked lock be cut to nothing."""
    store = grown(tmp_path / "store", full, 2)
    (store.path / ".lock").touch()
    linked(store.path / part, tmp_path / "elsewhere")
    target = tmp_path / "elsewhere"
    (target / "precious" if target.is_dir() else tmp_path / "precious").write_text("mine")
    before = contents(tmp_path)
    for words in (["add", full.tuned[2]], *WRITES):
        assert f"{part}: is a link, to {target}" in said(words[0], store.path, *words[1:])
    if part != ".lock":
        assert f"{part}: is a link" in said("status", store.path)
    assert contents(tmp_path) == before


def test_states_that_are_links(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 2)
    (state,) = {file.parent for file in (store.path / "states").rglob("*.safetensors") if "000002" in str(file)}
    linked(state, tmp_path / "elsewhere")
    for words in (["export", "-o", tmp_path / "out"], ["add", full.tuned[2]], *WRITES):
        assert "is a link" in said(words[0], store.path, *words[1:])
    state.unlink()
    shutil.copytree(tmp_path / "elsewhere", state)
    linked(next(state.iterdir()), tmp_path / "file")
    with pytest.raises(FormatError, match="is a link"):
        ContinualStore(store.path).verify()


def test_a_strange_link_among_the_states_goes_and_its_target_stays(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 2)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (store.path / "states" / "000009-ab").symlink_to(tmp_path / "precious")
    ok("gc", store.path, "--keep", 2)
    assert {path.name[:6] for path in (store.path / "states").iterdir()} == {"000001", "000002"}
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_names_of_new_manifests_are_nobodys(full: Models, tmp_path: Path) -> None:
    """A link of the name that a new manifest once had is not written through; what was left of a kill is removed."""
    store = grown(tmp_path / "store", full, 1)
    (tmp_path / "precious").write_text("mine")
    (store.path / ".manifest.json.new").symlink_to(tmp_path / "precious")
    (store.path / ".manifest.json.abcd_123.new").symlink_to(tmp_path / "precious")
    store.add(full.tuned[1])
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (store.path / ".manifest.json.abcd_123.new").is_symlink()
    assert len(ContinualStore(store.path).log()) == 2
