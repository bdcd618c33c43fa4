"""Stores that grow by models of the Hub: the real commands and the real client against a Hub on loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch

from merging.continual import ContinualStore
from support import tiny
from support.hub_fixture import Hub
from support.stores import PATIENCE, export, until
from support.systems import POSIX

pytestmark = [POSIX, pytest.mark.exhaustive]

TRIES = 6
"""Failures of a request that are stood, at once where the Hub asks for no patience."""


class Watch:
    """A watch in a process of its own, and what it tells."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def told(self) -> tuple[str, str, int | None]:
        """The next thing: what happened, to what, as which step."""
        event = json.loads(self._lines.get(timeout=PATIENCE))
        return event["what"], event["model"], event["step"]

    def rest(self) -> tuple[int, str]:
        """The exit code, and what else was told."""
        return self.process.wait(PATIENCE), "".join(iter(lambda: self._lines.get(timeout=PATIENCE), ""))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        return self.rest()


@dataclass
class User:
    """Who runs commands against a Hub, with a cache of their own."""

    hub: Hub
    folder: Path

    def environment(self) -> dict[str, str]:
        return self.hub.environment(self.folder / "home") | {"OMP_NUM_THREADS": "1"}

    def python(self, script: str, *words: object) -> str:
        command = [sys.executable, "-c", script, *map(str, words)]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def watching(self, store: Path, query: str, *words: str) -> Iterator[Watch]:
        command = [sys.executable, "-m", "merging", "continual", "watch", str(store), "--from", query, "--json", *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen([*command, "--interval", "0.1"], env=self.environment(), **pipes) as process:
            try:
                yield Watch(process)
            finally:
                process.kill()

    def arrived(self) -> int:
        """The bytes of a download that is not finished."""
        return sum(path.stat().st_size for path in (self.folder / "home").rglob("*.part"))


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(hub, tmp_path)


def fetched(hub: Hub, repo: str) -> list[str | None]:
    """The ranges of the weights of a repository that were asked for, None for a whole file."""
    return [each.range for each in hub.log() if each.path.startswith(f"/storage/{repo}/") and each.method == "GET"]


GROW = """
import json, sys
from merging import ContinualStore
from merging.errors import MergingError
base, store, local, *models = sys.argv[1:]
grown = ContinualStore.create(store, base=base)
for model in models:
    step = grown.add(model, threads=1)
    print(json.dumps([step and step.source]))
grown.add(local, threads=1)  # what lies here has the same content
print(json.dumps(grown.verify().problems))
grown.export("out", threads=1)
try:
    grown.add(base)
except MergingError as error:
    print(json.dumps(str(error)))
"""


def test_base_and_models_on_the_hub(user: User, tmp_path: Path) -> None:
    """As the same files from here, in the same states; pinned to their commits; and fetched once, shards and all."""
    base, (one, two) = tiny.checkpoint(tmp_path / "local", 2, width=64, layers=4)
    sharded = tiny.save(tmp_path / "local" / "sharded", tiny.load(two), shards=3)
    (base / "tokenizer.json").write_text("{}")
    shas = {name: user.hub.put(f"org/{name}", path) for name, path in (("base", base), ("one", one))}
    shas["two"] = user.hub.put("org/two", sharded)
    user.hub.put("org/one", {"README.md": b"the same weights"})
    names = [f"org/one@{shas['one']}", f"hf://org/two@{shas['two']}", "org/one"]
    printed = user.python(GROW, "org/base", "store", one, *names).splitlines()
    first, second, again, problems, refused = map(json.loads, printed)
    assert (first, second, again) == ([f"org/one@{shas['one']}"], [f"org/two@{shas['two']}"], [None])
    assert problems == [] and "is the base of the store itself" in refused
    assert fetched(user.hub, "org/one").count(None) == 1  # whole; of the later commit no more than the header

    store = ContinualStore.create(tmp_path / "here", base=base)
    for model in (one, sharded):
        assert store.add(model, threads=1)
    here, there = store.manifest(), ContinualStore(tmp_path / "store").manifest()
    assert there.base.path == f"org/base@{shas['base']}"
    assert there.base.sha256 == here.base.sha256
    assert [(step.sha256, step.parts) for step in there.steps] == [(step.sha256, step.parts) for step in here.steps]
    assert tiny.identical(export(store, tmp_path / "expected"), tiny.load(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert f"org/two@{shas['two']}" in (tmp_path / "out" / "README.md").read_text()


def test_watch_takes_what_a_query_finds(user: User, tmp_path: Path) -> None:
    hub = user.hub
    base, tuned = tiny.checkpoint(tmp_path, 4)
    store = ContinualStore.create(tmp_path / "store", base=base)
    bad = tiny.save(tmp_path / "bad", tiny.model(layers=2))
    one, refused, two = (
        hub.put(f"org/{name}", path) for name, path in (("z", tuned[0]), ("bad", bad), ("a", tuned[1]))
    )
    hub.put("other/x", tuned[2])
    hub.page(2)
    hub.clear()
    with user.watching(store.path, "hub:author=org") as watch:
        assert watch.told() == ("added", f"org/z@{one}", 1)  # the oldest first
        assert watch.told() == ("refused", f"org/bad@{refused}", None)
        assert watch.told() == ("added", f"org/a@{two}", 2)
        assert fetched(hub, "org/bad").count(None) == 0  # refused by its header
        (note,) = store.manifest().refused
        assert (note.source, note.fingerprint) == ("org/bad", refused) and "lacks" in note.reason

        # an outage is told of once, and stood; a model whose files do not come is left for later
        hub.fail("GET /storage/org/lost/", [500] * 3 * TRIES, retry_after=0)
        hub.fail("GET /api/models$", [520] * 3)
        assert watch.told() == ("unreachable", "hub:author=org", None)
        lost, late = (hub.put(f"org/{name}", path) for name, path in (("lost", tuned[2]), ("late", tuned[3])))
        assert watch.told() == ("unreachable", f"org/lost@{lost}", None)
        assert watch.told() == ("added", f"org/late@{late}", 3)
        assert watch.told() == ("added", f"org/lost@{lost}", 4)

        # a new revision is looked at: one of the same weights is known, one of others is a model
        card = hub.put("org/a", {"README.md": b"words"})
        assert watch.told() == ("known", f"org/a@{card}", None)
        mended = hub.put("org/bad", tiny.save(tmp_path / "mended", tiny.fine_tune(tiny.load(base), 9)))
        assert watch.told() == ("added", f"org/bad@{mended}", 5)
        assert watch.end() == (0, "")
    manifest = store.manifest()
    assert [step.source for step in manifest.steps] == [
        f"org/{name}@{sha}" for name, sha in (("z", one), ("a", two), ("late", late), ("lost", lost), ("bad", mended))
    ]
    assert (manifest.refused, store.verify().problems) == ((), [])


def test_watch_goes_on_with_a_download(user: User, tmp_path: Path) -> None:
    """Broken off by SIGKILL, and by SIGTERM, which does not wait for its end; then in, of the bytes that had come."""
    hub = user.hub
    big = {"w": torch.randn(10_000_000, generator=torch.Generator().manual_seed(1))}
    store = ContinualStore.create(tmp_path / "store", base=tiny.save(tmp_path / "base", big))
    sha = hub.put("org/big", tiny.save(tmp_path / "big", {"w": big["w"] * 1.01}))
    hub.throttle("GET /storage/org/big", 10_000_000)
    held = [0]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        with user.watching(store.path, "hub:search=big") as watch:
            until(lambda: user.arrived() > held[-1])
            assert watch.end(number) == (code, "")
        held.append(user.arrived())
        assert store.manifest().steps == () and not list((store.path / "states").iterdir())
    assert 0 < held[1] <= held[2] < 40_000_000
    hub.clear()
    with user.watching(store.path, "hub:search=big", "--once") as watch:
        assert watch.told() == ("added", f"org/big@{sha}", 1)
        assert watch.rest() == (0, "")
    assert f"bytes={held[2]}-" in fetched(hub, "org/big")
    assert store.verify().problems == []


def test_query_that_is_none(tmp_path: Path) -> None:
    base, _ = tiny.checkpoint(tmp_path, 1)
    store = ContinualStore.create(tmp_path / "store", base=base)
    for query, told in (("hub:auther=org", "did you mean 'author'"), ("hub:author=org", "HF_HUB_OFFLINE")):
        with pytest.raises(Exception, match=told):
            store.watch(query, once=True)
