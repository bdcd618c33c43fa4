"""Going back, removing states, and finding damage before anything is built on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.adapters import QUIRKS, assert_close
from support.stores import (
    Models,
    at_once,
    contents,
    export,
    grown,
    ok,
    said,
    states,
    unchanged,
)
from support.tiny import checkpoint

pytestmark = QUIRKS


def test_rollback_and_gc(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 5, "task_arithmetic")
    names = sorted(path.name for path in (store.path / "states").iterdir())
    with unchanged(store.path):
        assert "there is no step 6" in said("rollback", store.path, "--to", 6)
        assert "there is no step -1" in said("rollback", store.path, "--to", -1)
        assert "the last state must stay" in said("gc", store.path, "--keep", 0)
        assert json.loads(ok("gc", store.path, "--keep", 9, "--json")) == {"removed": []}
    assert json.loads(ok("gc", store.path, "--keep", 3, "--json")) == {"removed": names[:2]}
    assert json.loads(ok("verify", store.path, "--json")) == {
        "steps": 5,
        "removed": [1, 2],
        "problems": [],
        "whole": 5,
    }
    assert "5 models, states of 2 removed, all as it was written" in ok("verify", store.path)
    with unchanged(store.path):
        told = said("rollback", store.path, "--to", 2)
        assert "step 2: its state was removed (gc, or --keep); you can go back to steps 3, 4, 5" in told
    marks = {1: False, 2: False, 3: True, 4: True, 5: True}
    for steps in (json.loads(ok("status", store.path, "--json"))["steps"], json.loads(ok("log", store.path, "--json"))):
        assert {step["number"]: step["restorable"] for step in steps} == marks
    cells = [line.split()[:1] for line in ok("status", store.path).splitlines()]
    assert all([mark] in cells for mark in ("1*", "2*", "3", "4", "5"))
    assert ["3*"] not in cells
    assert ["*"] in cells, "the mark is explained"
    assert ok("log", store.path).count("(its state was removed)") == 2
    (store.path / "states" / ".unfinished.old").mkdir()
    (store.path / "states" / "000009-left").mkdir()
    assert ok("gc", store.path, "--keep", 3) == f"{store.path}: 1 state removed\n"
    assert sorted(path.name for path in (store.path / "states").iterdir()) == names[2:]
    assert json.loads(ok("rollback", store.path, "--to", 3, "--json")) == {"steps": 3}
    store.add(full.tuned[5])
    wanted = at_once(tmp_path / "batch", full.base, [*full.tuned[:3], full.tuned[5]], "task_arithmetic")
    assert_close(export(store, tmp_path / "out"), wanted)
    assert ok("rollback", store.path, "--to", 0) == f"{store.path}: 0 models\n"
    assert list((store.path / "states").iterdir()) == []


def test_a_step_keeps_the_last_states(full: Models, tmp_path: Path) -> None:
    """The store is the same as one that keeps all, with fewer states on the disk."""
    for words in ([], ["--keep", 2]):
        ok("init", tmp_path / f"store{len(words)}", "--base", full.base, "--method", "ties")
        ok("add", tmp_path / f"store{len(words)}", *full.tuned[:4], *words, "--threads", 1)
    every, kept = tmp_path / "store0", tmp_path / "store2"
    names = sorted(path.name for path in (every / "states").iterdir())
    assert sorted(path.name for path in (kept / "states").iterdir()) == names[2:]
    for store, count in ((every, 4), (kept, 2)):
        disk = json.loads(ok("status", store, "--json"))["disk"]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in (store / "states").iterdir()}
        assert disk["states"] == count
        assert disk["bytes"] == sum(sizes.values())
        assert disk["freed_by_gc"] == sum(sizes.values()) - sizes[store / "states" / names[-1]]
        assert f"{count} states on the disk, " in ok("status", store)
        assert f"merge continual gc {store} --keep 1 frees" in ok("status", store)
    assert json.loads(ok("rollback", kept, "--to", 3, "--json")) == {"steps": 3}
    with unchanged(kept):
        assert "the last state must stay" in said("add", kept, full.tuned[4], "--keep", 0)
    assert "--keep 1 frees" not in ok("status", kept)


def test_a_watch_keeps_the_last_states(full: Models, tmp_path: Path) -> None:
    ok("init", tmp_path / "store", "--base", full.base, "--method", "linear")
    inbox = tmp_path / "inbox"
    for model in full.tuned[:3]:
        shutil.copytree(model, inbox / model.name)
    ok("watch", tmp_path / "store", "--from", inbox, "--once", "--keep", 1, "--interval", 0.1, "--threads", 1)
    assert [path.name[:6] for path in (tmp_path / "store" / "states").iterdir()] == ["000003"]


def test_what_others_put_among_the_states_stays(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 2, "task_arithmetic")
    mine = store.path / "states" / "my notes" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    assert json.loads(ok("gc", store.path, "--keep", 1, "--json"))["removed"] != []
    store.add(full.tuned[2])
    store.rollback(2)
    assert mine.read_text() == "years of work"
    assert len(list(mine.parents[1].iterdir())) == 2


def test_a_rollback_that_was_interrupted(full: Models, tmp_path: Path) -> None:
    """What is left of a state that was being removed is not taken for the state when its model comes again."""
    store = grown(tmp_path / "store", full, 2, "ties")
    before = states(store.path)
    left = Path(shutil.copytree(next((store.path / "states").glob("000002-*")), tmp_path / "left"))
    (left / "negative.safetensors").unlink()
    store.rollback(1)
    shutil.copytree(left, store.path / next(name for name in before if "/000002-" in name).rpartition("/")[0])
    store.add(full.tuned[1])
    assert store.verify().problems == []
    assert states(store.path) == before


@pytest.mark.parametrize("method", ["opcm", "ties"])
def test_verify_finds_damage(full: Models, tmp_path: Path, method: str) -> None:
    store = grown(tmp_path / "store", full, 2, method)
    assert ok("verify", store.path) == f"{store.path}: 2 models, all as it was written\n"
    whole = contents(store.path)
    for name in states(store.path):
        file = store.path / name
        for spoil in (
            lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            lambda data: data[:12] + bytes([data[12] ^ 1]) + data[13:],
            lambda data: data[:-1],
            lambda data: data + b"\0",
        ):
            file.write_bytes(spoil(whole[name]))
            (problem,) = store.verify().problems
            assert str(file) in problem
        assert str(file) in said("verify", store.path)
        file.unlink()
        assert (store.verify().problems != []) == ("/000002-" in name)
        file.write_bytes(whole[name])
    assert store.verify().problems == []


def test_verify_finds_one_changed_byte_of_the_base(tmp_path: Path) -> None:
    """Beyond the samples that every add looks at."""
    models = Models(*checkpoint(tmp_path, 1, width=64, vocab=300))
    store = grown(tmp_path / "store", models)
    file = models.base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert [problem for problem in store.verify().problems if "no longer the base" in problem]


def test_damage_is_told_when_the_store_is_used(full: Models, tmp_path: Path) -> None:
    """As one message, and without a further step on top of it."""
    store = grown(tmp_path / "store", full, 2)
    file = store.path / store.manifest().steps[-1].parts["sum"].file
    file.write_bytes(file.read_bytes()[:-40])
    before = contents(store.path)
    for words in (["add", store.path, full.tuned[2]], ["export", store.path, "-o", tmp_path / "out"]):
        assert "sum.safetensors" in said(*words)
    file.unlink()
    for words in (["add", store.path, full.tuned[2]], ["export", store.path, "-o", tmp_path / "out"]):
        assert "sum.safetensors" in said(*words)
    assert contents(store.path).keys() == before.keys() - {str(file.relative_to(store.path))}
