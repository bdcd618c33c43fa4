"""A folder that models appear in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from merging.continual import ContinualStore
from merging.continual.watch import Event, watch
from merging.errors import InputError, OptionError
from support.adapters import QUIRKS
from support.stores import (
    PATIENCE,
    Models,
    contents,
    grown,
    ok,
    process,
    said,
    until,
)
from support.systems import POSIX
from support.tiny import checkpoint, load, model, save

pytestmark = QUIRKS


class Looks(threading.Event):
    """What happens between the looks of a watch, in turn; then it ends."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        super().__init__()
        self.happens = list(happens)

    def wait(self, timeout: float | None = None) -> bool:
        if timeout == 0:
            return self.is_set()
        if self.happens:
            self.happens.pop(0)()
        else:
            self.set()
        return self.is_set()


def nothing() -> None:
    """Another look."""


def watched(store: ContinualStore, folder: Path, *happens: Callable[[], object]) -> list[tuple[str, str]]:
    """What a watch tells while these happen."""
    told: list[Event] = []
    watch(store, folder, pause=Looks(*happens).wait, on_event=told.append, threads=1)
    return [(event.what, event.source.name) for event in told]


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "incoming").mkdir()
    return tmp_path / "incoming"


def arrive(path: Path, incoming: Path, name: str, age: float) -> Path:
    """A copy of a model in the folder, so many seconds old."""
    copy = Path(shutil.copytree(path, incoming / name))
    for file in copy.iterdir():
        os.utime(file, (time.time() - age,) * 2)
    return copy


def test_watch_takes_the_oldest_first_and_each_once(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    for number, age in enumerate([50, 90, 70]):
        arrive(full.tuned[number], incoming, f"model{number}", age)
    arrive(full.tuned[1], incoming, "same", 10)
    shutil.copytree(full.tuned[3], incoming / ".hidden")
    (incoming / "notes.txt").write_text("no model")
    (incoming / "folder").mkdir()
    assert watched(store, incoming) == []  # one look is not enough
    told = watched(store, incoming, nothing, nothing, lambda: arrive(full.tuned[4], incoming, "late", 0), nothing)
    assert told == [("added", "model1"), ("added", "model2"), ("added", "model0"), ("known", "same"), ("added", "late")]
    assert [Path(step.source).name for step in store.manifest().steps] == ["model1", "model2", "model0", "late"]
    before = contents(store.path)
    assert {what for what, _ in watched(store, incoming, nothing, nothing)} <= {"known"}
    assert contents(store.path) == before


def test_watch_waits_until_a_file_has_stopped_growing(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    data, file = (full.tuned[0] / "model.safetensors").read_bytes(), incoming / "model.safetensors"
    file.write_bytes(b"")

    def more() -> None:
        with file.open("ab") as stream:
            stream.write(data[file.stat().st_size :][: len(data) // 4 + 1])

    assert watched(store, incoming, more, more, more, more) == []
    assert file.read_bytes() == data
    assert watched(store, incoming, nothing) == [("added", "model.safetensors")]
    assert store.manifest().refused == ()


def test_watch_notes_what_is_refused_and_tries_again_when_it_changes(
    full: Models, tmp_path: Path, incoming: Path
) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    bad = save(incoming / "bad", model(layers=2))
    good = arrive(full.tuned[0], incoming, "good", 0)
    told = watched(store, incoming, nothing, nothing)
    assert sorted(told) == [("added", "good"), ("refused", "bad")]
    (note,) = store.manifest().refused
    assert (note.source, "lacks" in note.reason) == (str(bad.resolve()), True)
    assert f"refused: {bad.resolve()}: " in ok("status", store.path)
    assert {path.name for path in incoming.iterdir()} == {bad.name, good.name}  # nothing was touched

    assert ("refused", "bad") not in watched(store, incoming, nothing, nothing)  # in another process as well
    save(bad, model(layers=1))
    assert ("refused", "bad") in watched(store, incoming, nothing)
    assert len(store.manifest().refused) == 1
    save(bad, load(full.tuned[1]))
    assert ("added", "bad") in watched(store, incoming, nothing)
    assert store.manifest().refused == ()  # it is in now
    assert (len(store.manifest().steps), store.verify().problems) == (2, [])


def test_watch_blames_no_model_for_the_store(full: Models, tmp_path: Path, incoming: Path) -> None:
    """Options that cannot be and a base that is gone end the watch; the model is not noted as refused."""
    base = Path(shutil.copytree(full.base, tmp_path / "base"))
    store = ContinualStore.create(tmp_path / "store", base=base)
    arrive(full.tuned[0], incoming, "model", 0)
    for options in ({"threads": 0}, {"device": "abacus"}, {"max_memory": 1}):
        with pytest.raises(OptionError):
            watch(store, incoming, pause=Looks(nothing).wait, **options)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="base"):
        watch(store, incoming, pause=Looks(nothing).wait)
    assert store.manifest().refused == ()
    (tmp_path / "elsewhere").rename(base)
    assert watched(store, incoming, nothing) == [("added", "model")]


def test_watch_stands_what_disappears(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    arrive(full.tuned[0], incoming, "gone", 0)
    (incoming / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    told = watched(store, incoming, lambda: shutil.rmtree(incoming / "gone"), nothing)
    assert ("added", "gone") not in told
    with pytest.raises(InputError):
        watched(store, incoming, lambda: shutil.rmtree(incoming), nothing)
    assert "there is no such folder to watch" in said("watch", store.path, "--from", incoming)


def test_watch_once(full: Models, tmp_path: Path, incoming: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    arrive(full.tuned[0], incoming, "model", 0)
    words = ["watch", store.path, "--from", incoming, "--once", "--interval", 0.01]
    assert ok(*words) == f"added: {incoming / 'model'} as step 1\n"
    (incoming / "bad.safetensors").write_bytes(b"bad")
    told = [json.loads(line) for line in ok(*words, "--json").splitlines()]
    assert [(each["what"], Path(each["model"]).name, each["step"]) for each in told if each["what"] != "known"] == [
        ("refused", "bad.safetensors", None)
    ]


@POSIX
@pytest.mark.exhaustive
def test_watch_ends_at_a_signal(tmp_path: Path, incoming: Path) -> None:
    """Waiting for models, and within a step, which is done then: exit code 0, and a whole store."""
    models = Models(*checkpoint(tmp_path, 2, width=500, layers=8))
    store = grown(tmp_path / "store", models, 1)
    waiting = process("watch", store.path, "--from", tmp_path / "empty", "--interval", 60)
    (tmp_path / "empty").mkdir()
    adding = process("watch", store.path, "--from", incoming, "--interval", 0.2, "--threads", 1)
    arrive(models.tuned[1], incoming, "model", 0)
    until(lambda: adding.poll() is not None or list((store.path / "states").glob(".unfinished.*")))
    for each in (adding, waiting):
        each.send_signal(signal.SIGTERM)
    out, _ = adding.communicate(timeout=PATIENCE)
    assert (adding.returncode, out) == (0, f"added: {incoming / 'model'} as step 2\n")
    assert waiting.wait(PATIENCE) == 0
    waiting.communicate()
    assert (len(store.manifest().steps), store.verify().problems) == (2, [])
    assert len(list((store.path / "states").iterdir())) == 2


def test_watch_ends_at_a_signal_while_another_writes(full: Models, tmp_path: Path, incoming: Path) -> None:
    """The end of a watch does not wait for a writer that may be at work for hours."""
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    arrive(full.tuned[0], incoming, "model", 0)
    stop = threading.Event()
    with FileLock(store.path / ".lock"):
        watching = threading.Thread(target=watch, args=(store, incoming), kwargs={"interval": 0.01, "pause": stop.wait})
        watching.start()
        time.sleep(0.3)
        stop.set()
        watching.join(3)
        ended = not watching.is_alive()
    watching.join()
    assert ended
