"""Outputs in a store in memory: the same files as on the disk, whole or absent, and nothing left."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

import merging
from merging.cli.main import cli
from merging.errors import InputError, MergingError, OptionError, OutputError
from merging.object_stores.store import Store, open_store
from merging.object_stores.store_path import StorePath, output_path
from merging.object_stores.upload_record import find_records, new_record
from merging.object_stores.uploads import begin_upload
from merging.storage import uploaded_file
from merging.storage.store_destination import settle_records
from merging.storage.store_output import StoreOutput
from merging.storage.uploaded_file import PART, UploadedFile, Uploader, part_size
from support.tiny import adapters, checkpoint

OUT = "memory://box/out"
LINEAR: dict[str, Any] = {"method": "linear", "threads": 1}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store, and a folder for temporary files, which is empty in the end."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield open_store(OUT)[0]
    assert not [*(tmp_path / "temporary").glob(".*")]


@pytest.fixture
def tuned(tmp_path: Path) -> list[Path]:
    return checkpoint(tmp_path / "models", layers=1)[1]


def files_in(store: Store) -> dict[str, bytes]:
    """All files of the store by the end of their address."""
    return {path.removeprefix("/box/"): store.read(path) for path in store.files("/box")}


def files_at(path: Path) -> dict[str, bytes]:
    """All files of an output on the disk, named alike."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {each.relative_to(path.parent).as_posix(): each.read_bytes() for each in files}


@pytest.mark.parametrize("shard_size", [None, 600])
def test_folders_of_models(tmp_path: Path, tuned: list[Path], store: Store, shard_size: int | None) -> None:
    """New, over an old one that has other shards, and refused without `overwrite`."""
    for overwrite, options in ((False, {"shard_size": 400}), (True, {"shard_size": shard_size})):
        local = merging.merge(tuned, output=tmp_path / "out", overwrite=overwrite, **LINEAR, **options)
        merged = merging.merge(tuned, output=OUT, overwrite=overwrite, **LINEAR, **options)
        assert files_in(store) == files_at(tmp_path / "out")
        assert (str(merged.path), merged.to_dict()["path"], merged.bytes) == (OUT, OUT, local.bytes)
    before = files_in(store)
    with pytest.raises(OutputError, match=rf"^{OUT}: exists already: choose another output=, or use overwrite=True$"):
        merging.merge(tuned, output=OUT, **LINEAR)
    assert files_in(store) == before


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_adapters(tmp_path: Path, store: Store, name: str) -> None:
    changes = adapters(tmp_path / "models", 2)[1]
    for overwrite in (False, True):
        merging.merge(changes, output=tmp_path / name, overwrite=overwrite, **LINEAR)
        merging.merge(changes, output=f"memory://box/{name}", overwrite=overwrite, **LINEAR)
        assert files_in(store) == files_at(tmp_path / name)


def test_other_commands(tmp_path: Path, store: Store) -> None:
    """Baking, extraction, and an output made once more: every command whose result is a model or an adapter."""
    base, changes = adapters(tmp_path / "models", 1)
    merging.bake(changes, base=base, output=tmp_path / "baked", threads=1)
    merging.bake(changes, base=base, output="memory://box/baked", threads=1)
    merging.extract(tmp_path / "baked", base=base, output=tmp_path / "lora", rank=2, threads=1)
    merging.extract(tmp_path / "baked", base=base, output="memory://box/lora", rank=2, threads=1)
    again = merging.rerun(tmp_path / "baked", output="memory://box/again", threads=1)
    assert f"memory://box/again is in an object store, and is not compared with {tmp_path / 'baked'}" in again.notices
    written = files_in(store)
    assert {name: written[name] for name in files_at(tmp_path / "lora")} == files_at(tmp_path / "lora")
    assert written["again/model.safetensors"] == written["baked/model.safetensors"]


def test_addresses_of_files(tmp_path: Path, tuned: list[Path]) -> None:
    """`file:///` is a local path, with all that goes for it."""
    merged = merging.merge(tuned, output=f"file://{tmp_path}/out", **LINEAR)
    assert merged.path == tmp_path / "out" and (tmp_path / "out" / "model.safetensors").is_file()


def test_paths_of_addresses() -> None:
    for name in ("s3://bucket/a/b.safetensors", "s3:/bucket/a/b.safetensors", Path("s3://bucket/a/b.safetensors")):
        path = output_path(name)
        assert isinstance(path, StorePath)
        assert (str(path), path.name, path.suffix) == ("s3://bucket/a/b.safetensors", "b.safetensors", ".safetensors")
        assert str(path.parent) == "s3://bucket/a"
    assert not isinstance(output_path("s3/bucket"), StorePath)


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("memory://box", {}, "memory://box: is a whole bucket: name a folder or file in it: choose another output="),
        (OUT, {"resume": True}, f"{OUT}: resume=True goes on with outputs on a local disk alone"),
        ("s3://key:hunter2@bucket/out", {}, r"s3://\.\.\.@bucket/out: an address with a user or key in it"),
        ("s9://bucket/out", {}, "no scheme s9://"),
    ],
)
def test_refusals(tuned: list[Path], store: Store, output: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MergingError, match=said) as caught:
        merging.merge(tuned, output=output, **LINEAR, **options)
    assert "hunter2" not in str(caught.value)
    assert not files_in(store)


def test_what_is_written_to_disks_alone(tmp_path: Path) -> None:
    """No folder with the name of a scheme appears on the disk."""
    changes = [str(path) for path in adapters(tmp_path / "models", 2)[1]]
    for words in (
        ["compress", changes[0], "--base", "x", "-o", "s3://bucket/out.safetensors"],
        ["--method", "linear", *changes, "-o", OUT, "--push", "org/name"],
    ):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 1, done.output
    assert not Path("s3:").exists()


def test_only_models_are_replaced(tuned: list[Path], store: Store) -> None:
    """By the same rule as on the disk, from the names in the store, however hostile."""
    for name, said in (("thesis.txt", r"it holds thesis\.txt"), ("../x", r"holds \.\./x, which no model has")):
        store.system.store.clear()
        merging.merge(tuned, output=OUT, **LINEAR)
        store.system.store[f"/box/out/{name}"] = store.system.store["/box/out/config.json"]
        before = dict(store.system.store)
        with pytest.raises(OutputError, match=rf"^{OUT}: .*{said}"):
            merging.merge(tuned, output=OUT, overwrite=True, **LINEAR)
        assert store.system.store == before
    store.system.rm("/box", recursive=True)
    store.write("/box/out", b"a file")
    with pytest.raises(OutputError, match="is not a folder, and the output is one"):
        merging.merge(tuned, output=OUT, overwrite=True, **LINEAR)


@pytest.mark.parametrize("output", ["tuned0", "tuned0/model.safetensors", "", "base/sub"])
def test_inputs_are_never_replaced(tuned: list[Path], store: Store, output: str) -> None:
    """A model that is merged, the folder around it, a file of it, and a folder in it."""
    for path in (*tuned, tuned[0].parent / "base"):
        store.system.put(f"{path}/", f"/box/models/{path.name}", recursive=True)
    store.write("/box/models/base/sub/model.safetensors", b"another part of it")
    before = files_in(store)
    inputs = [f"memory://box/models/tuned{i}" for i in range(2)]
    options = {**LINEAR, "base": "memory://box/models/base", "method": "task_arithmetic", "overwrite": True}
    with pytest.raises(OutputError, match=r"the output would replace the input memory://box/models/"):
        merging.merge(inputs, output=f"memory://box/models/{output}", **options)
    assert files_in(store) == before
    merging.merge(inputs, output="memory://box/models/tuned0-and-1", **options)
    assert before.items() < files_in(store).items()


def test_long_names(tuned: list[Path], store: Store) -> None:
    """Longer than a disk's names may be; and no program is said to open the address."""
    out = f"memory://box/{'x' * 300}"
    done = CliRunner().invoke(cli, ["--method", "linear", *map(str, tuned), "-o", out])
    assert (done.exit_code, "to use it" in done.output) == (0, False), done.output
    assert len(files_in(store)) == 3


def test_a_dry_run_changes_nothing(tmp_path: Path, tuned: list[Path], store: Store) -> None:
    words = ["--method", "linear", *map(str, tuned), "-o", OUT, "--dry-run"]
    assert OUT in CliRunner().invoke(cli, words).output
    merging.merge(tuned, output=OUT, **LINEAR)
    before = files_in(store)
    done = CliRunner().invoke(cli, words)
    assert f"{OUT} exists already: the merge needs another -o, or --overwrite" in done.output
    assert files_in(store) == before


def test_an_error_leaves_nothing(tuned: list[Path], store: Store) -> None:
    def fail(done: int, total: int) -> None:
        assert any(".partial/" in path for path in files_in(store)), "the record is there"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merging.merge(tuned, output=OUT, progress=fail, **LINEAR)
    assert not files_in(store)


def test_another_output_that_appears_meanwhile_stays(tuned: list[Path], store: Store) -> None:
    def overtake(done: int, total: int) -> None:
        store.write("/box/out/config.json", b"theirs")

    with pytest.raises(OutputError, match="was created by someone else meanwhile"):
        merging.merge(tuned, output=OUT, progress=overtake, **LINEAR)
    assert files_in(store) == {"out/config.json": b"theirs"}


class Killed(BaseException):
    """The end of a process at a request to the store."""


def merge_until(tuned: list[Path], turn: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> bool:
    """Merge until the ``turn``-th request to the store, after which no other reaches it. Return whether it got so far.

    The local folder is removed as if by hand, since this process lives on.
    """
    with monkeypatch.context() as patch:
        plain, asked = Store.ask, [0]

        def ask(self: Store, request: Any, path: str, *options: Any, **more: Any) -> Any:
            asked[0] += 1
            if asked[0] >= turn:
                raise Killed
            return plain(self, request, path, *options, **more)

        patch.setattr(Store, "ask", ask)
        try:
            merging.merge(tuned, output=OUT, **LINEAR, **options)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_kills_at_any_request(
    tmp_path: Path, tuned: list[Path], store: Store, monkeypatch: pytest.MonkeyPatch, old: bool, every: int
) -> None:
    """The old output stays whole until the new one is in the store; then there is none, or the new one.

    What is left is removed, or put in place, by the next command.
    """
    monkeypatch.setattr("merging.object_stores.upload_record.UploadRecord.is_alive", lambda _: False)
    options: dict[str, Any] = {"shard_size": 600, "overwrite": old}
    merging.merge(tuned, output=tmp_path / "out", **LINEAR, shard_size=600)
    before, after = {}, files_at(tmp_path / "out")
    if old:
        merging.merge(tuned, output=tmp_path / "old" / "out", weights=[0.9, 0.1], shard_size=400, **LINEAR)
        before = files_at(tmp_path / "old" / "out")
    seen, turn = set(), 1
    while True:
        store.system.store.clear()
        store.system.pseudo_dirs[:] = [""]
        for name, content in before.items():
            store.write(f"/box/{name}", content)
        if not merge_until(tuned, turn, monkeypatch, **options):
            break
        found = {name: content for name, content in files_in(store).items() if ".partial/" not in name}
        whole = any(record.whole for record in find_records(store, "/box/out"))
        if whole:
            entries = {"out/config.json", "out/model.safetensors.index.json"} & {*found}
            unbegun = [{name: each[name] for name in each if name != "out/config.json"} for each in (before, after)]
            assert not entries or found in (before, after, *unbegun), turn
        else:
            assert found in (before, after), turn
        settle_records(store, "/box/out")
        settled = files_in(store)
        assert settled == (after if whole else found), turn
        seen.add((whole, found == after))
        turn += every
    assert {(False, False), (True, False)} <= seen or every > 1
    assert files_in(store) == after


def test_a_complete_output_is_put_in_place_only_once(tuned: list[Path], store: Store) -> None:
    """A record of a whole output whose parts are gone is given up, and the merge goes on."""
    record = new_record(store, "/box/out")
    lost = {"path": "/box/out/model.safetensors", "hidden": f"{record.folder}/model.safetensors"}
    path = f"{record.folder}/uploads.json"
    store.write(path, json.dumps({"uploads": [lost], "old": [], "whole": True, "owner": {}}).encode())
    assert "are gone" in CliRunner().invoke(cli, ["clean", OUT, "--remove"]).output
    assert not files_in(store)
    store.write(path, json.dumps({"uploads": [lost], "old": [], "whole": True, "owner": {}}).encode())
    merging.merge(tuned, output=OUT, **LINEAR)
    assert sorted(files_in(store)) == ["out/README.md", "out/config.json", "out/model.safetensors"]


@pytest.mark.parametrize(
    "facts",
    [
        {"old": ["/box/precious"]},
        {"old": ["/box/out/../precious"]},
        {"uploads": [{"path": "/box/precious", "hidden": "/box/.out.abcd1234.partial/x"}]},
        {"uploads": [{"path": "/box/out/x", "hidden": "/box/precious"}]},
        {"uploads": [{"path": "/box/out/x", "hidden": "/box/.out.abcd1234.partial/../precious"}]},
        {"uploads": ["x"]},
        {"uploads": [3]},
        {"uploads": 3},
        {"whole": True},
    ],
)
def test_records_of_strangers_touch_nothing_else(store: Store, facts: dict[str, Any]) -> None:
    store.write("/box/precious", b"years of work")
    plain = {"uploads": [], "old": [], "whole": False, "owner": {}} | facts
    store.write("/box/.out.abcd1234.partial/uploads.json", json.dumps(plain).encode())
    assert not find_records(store, "/box/out")
    CliRunner().invoke(cli, ["clean", OUT, "--remove"])
    assert files_in(store)["precious"] == b"years of work"


def test_merge_clean(tuned: list[Path], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists and removes what dead runs left, of an output and of a folder of outputs; a living run is not touched."""
    with StoreOutput(StorePath("memory://box/alive"), overwrite=False, file=False) as alive:
        alive.create_file(alive.folder / "model.safetensors", b"header", 10)
        record = new_record(store, "/box/out")
        store.write(f"{record.folder}/model.safetensors", bytes(1000))
        owner = {"host": "elsewhere", "pid": 1, "start": "1"}
        store.write(
            f"{record.folder}/uploads.json",
            json.dumps({"uploads": [], "old": [], "whole": False, "owner": owner}).encode(),
        )
        for address in (OUT, "memory://box"):
            done = json.loads(CliRunner().invoke(cli, ["clean", address, "--json"]).output)
            (left,) = done["leftovers"]
            assert (left["output"], left["whole"], left["resumable"]) == (OUT, False, False)
            assert left["bytes"] > 1000
        assert "of no use" in CliRunner().invoke(cli, ["clean", OUT]).output
        assert "removed" in CliRunner().invoke(cli, ["clean", "memory://box", "--remove"]).output
        assert "no killed run left anything" in CliRunner().invoke(cli, ["clean", "memory://box"]).output
        assert {name.split("/")[0][:7] for name in files_in(store)} == {".alive."}
    assert not files_in(store)


class Slow:
    """An upload of parts, which arrive late and in any order."""

    def __init__(self, in_any_order: bool) -> None:
        self.in_any_order = in_any_order
        self.parts: dict[int, bytes] = {}

    def put(self, number: int, data: bytes | bytearray) -> None:
        assert self.in_any_order or number == len(self.parts)
        self.parts[number] = bytes(data)

    def finish(self) -> None: ...

    def entry(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("in_any_order", [False, True])
def test_bytes_arrive_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_any_order: bool) -> None:
    """From several threads, in pieces that cross the parts; the file is the same, and no part is left."""
    monkeypatch.setattr(uploaded_file, "PART", 1000)
    content = torch.randint(0, 256, (10_001,), dtype=torch.uint8).numpy().tobytes()
    pieces = [(start, content[start : start + 333]) for start in range(0, len(content), 333)]
    upload, uploader = Slow(in_any_order), Uploader()
    file = UploadedFile(upload, uploader, scratch=tmp_path, size=len(content))

    def write(each: list[tuple[int, bytes]]) -> None:
        for start, piece in each:
            file.write_at(memoryview(piece), start)

    threads = [threading.Thread(target=write, args=(pieces[::-1][number::3],)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.sync()
    file.close()
    uploader.close()
    assert len(upload.parts) == 11 or part_size(len(content)) != 1000
    assert b"".join(upload.parts[number] for number in sorted(upload.parts)) == content


def test_sizes_of_parts() -> None:
    """S3 takes 10,000 parts of at most 5 GB, and a file of 5 TB."""
    assert part_size(1) == part_size(10**9) == PART
    for size in (10**11, 5 * 10**12):
        assert size / part_size(size) <= 10_000 and part_size(size) < 5 * 10**9


def test_an_upload_that_fails_is_one_error(tuned: list[Path], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of its own, while others merge: reported once, and everything is removed."""

    def fail(self: object, number: int, data: bytes) -> None:
        raise OutputError("the store is full")

    with monkeypatch.context() as patch:
        upload = begin_upload(store, "/box/x", "/box/y/x", PART)
        upload.finish()
        patch.setattr(type(upload), "put", fail)
        store.system.store.clear()
        with pytest.raises(OutputError, match=r"^the store is full$"):
            merging.merge(tuned, output=OUT, **LINEAR)
    assert not files_in(store)


def test_resuming_is_an_option_error(tuned: list[Path]) -> None:
    with pytest.raises(OptionError):
        merging.merge(tuned, output=OUT, resume=True, **LINEAR)


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_part_that_failed_is_not_written_twice(store: Store, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A buffered file holds it already, and a file whose end failed passes for closed."""
    upload = begin_upload(store, "/box/x", "/box/y/x", PART)
    asked: list[str] = []

    def fail(*_: object) -> None:
        asked.append(method)
        raise ConnectionError("reset")

    file = upload._file  # type: ignore[attr-defined]
    monkeypatch.setattr(type(file), method, fail)
    with pytest.raises(InputError, match=r"^memory://box/x: the store cannot be reached, or fails: reset"):
        upload.put(0, b"part")
        upload.finish()
    assert asked == [method]
    monkeypatch.undo()


def test_times_of_files_are_the_times_when_their_uploads_began(
    tmp_path: Path, tuned: list[Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in S3: a file that a killed run had put in place is not taken for a file of the old output."""
    merging.merge(tuned, output=tmp_path / "out", **LINEAR)
    began: dict[str, datetime] = {}
    copy, modified = MemoryFileSystem.cp_file, MemoryFileSystem.modified

    def complete(self: MemoryFileSystem, hidden: str, path: str) -> None:
        began[path] = self.created(hidden)
        copy(self, hidden, path)
        if path.endswith("config.json"):
            raise Killed

    monkeypatch.setattr(MemoryFileSystem, "cp_file", complete)
    monkeypatch.setattr(MemoryFileSystem, "modified", lambda self, path: began.get(path) or modified(self, path))
    with pytest.raises(Killed):
        merging.merge(tuned, output=OUT, **LINEAR)
    (record,) = find_records(store, "/box/out")
    for name in ("model.safetensors", "config.json", "README.md"):
        store.remove(f"{record.folder}/{name}")
    record.put_in_place()
    assert files_in(store) == files_at(tmp_path / "out")
