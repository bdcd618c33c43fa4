"""Reads, writes and locks of the operating system, and the same bytes where a system lacks a call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import merging
from merging import file_ranges, os_calls
from merging.file_ranges import ReadAhead, WriteBack
from support.tiny import checkpoint

MISSING = ["preadv", "pwrite", "posix_fadvise", "O_DIRECTORY"]


def available() -> list[str]:
    """The calls of this system that can be taken away."""
    return [name for name in MISSING if hasattr(os, name)]


def take_away(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        if hasattr(os, name):
            monkeypatch.delattr(os, name)


@pytest.mark.parametrize("missing", ["", "preadv", "pwrite", "posix_fadvise"])
def test_bytes_come_back_from_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(os_calls, "_PIECE", 3)  # several calls each
    take_away(monkeypatch, missing)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os_calls.reserve(fd, 20)
        assert os.fstat(fd).st_size == 20
        os_calls.write_at(fd, memoryview(b"0123456789"), 5)
        ReadAhead(fd).announce(0, 20)
        os_calls.sync(fd)
        buffer = bytearray(12)
        os_calls.read_at(fd, memoryview(buffer), 4)
        assert bytes(buffer) == b"\x000123456789\x00"
        os_calls.write_at(fd, memoryview(b""), 0)
        os_calls.read_at(fd, memoryview(bytearray()), 99)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789" + bytes(5)


def test_an_empty_file_is_reserved(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        os_calls.reserve(file.fileno(), 0)
    assert (tmp_path / "file").stat().st_size == 0


@pytest.mark.parametrize("missing", ["", "preadv"])
def test_reading_past_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    take_away(monkeypatch, missing)
    (tmp_path / "file").write_bytes(b"12345")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(EOFError, match="ends 4 bytes too early"):
            os_calls.read_at(fd, memoryview(bytearray(6)), 3)
    finally:
        os.close(fd)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    first, second = os_calls.open_folder(tmp_path), os_calls.open_folder(tmp_path)
    if first is None or second is None:
        pytest.skip("this system does not open folders")
    assert os_calls.claim(first)
    assert not os_calls.claim(second)
    os.close(first)
    assert os_calls.claim(second)
    os.close(second)


def test_without_locks_nothing_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody's live folder is taken for abandoned."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (tmp_path / "file").open("wb") as file:
        assert not os_calls.claim(file.fileno())


def test_without_folder_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_away(monkeypatch, "O_DIRECTORY")
    assert os_calls.open_folder(tmp_path) is None
    os_calls.sync_folder(tmp_path)


@pytest.mark.parametrize("missing", [*[[name] for name in available()], available()], ids="+".join)
@pytest.mark.parametrize("single", [False, True])
def test_merges_are_the_same_without_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str], single: bool
) -> None:
    """Byte for byte, with several threads sharing one file position where there are no positional calls."""
    base, tuned = checkpoint(tmp_path, width=32, vocab=4096, layers=6)
    name = "out.safetensors" if single else "out"
    options = {"method": "task_arithmetic", "base": base, "threads": 3}
    merging.merge(tuned, output=tmp_path / name, **options)
    before = files(tmp_path / name)
    take_away(monkeypatch, *missing)
    merging.merge(tuned, output=tmp_path / name, overwrite=True, **options)
    assert files(tmp_path / name) == before
    assert not list(tmp_path.glob(".*"))


def files(path: Path) -> dict[str, bytes]:
    """Everything in a folder or file, by name."""
    return {file.name: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}


FEW_FILES = """
import resource, sys, torch, merging
from pathlib import Path
from safetensors.torch import save_file
folder, soft, hard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
paths = [folder / f"{i}.safetensors" for i in range(120)]
for path in paths:
    save_file({"weight": torch.ones(2, 2)}, path)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(merging.merge(paths, method="linear", output=folder / "out.safetensors", overwrite=True).tensors)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_more_inputs_than_files_that_may_be_open(tmp_path: Path) -> None:
    """The soft limit is raised as far as it may be; beyond that it is one message that says the way out."""

    def run(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FEW_FILES, str(tmp_path), str(soft), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = run(100, 128)
    assert "InputError" in refused.stderr
    assert "allows this process 128 open files, and 12" in refused.stderr
    assert "take fewer inputs at once, or raise its limit (ulimit -n)" in refused.stderr
    done = run(100, 132)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_each_byte_is_announced_once_in_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *range_and_kind: announced.append(range_and_kind[:2]))
    monkeypatch.setattr(file_ranges, "_AT_ONCE", 100)
    ahead = ReadAhead(0)
    for _ in range(2):
        for offset in range(0, 400, 10):
            ahead.announce(offset, 20)
    once = [(0, 100), (100, 100), (200, 100), (300, 100), (400, 100)]
    assert announced == once * 2


def test_many_small_writes_are_written_back_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(file_ranges, "_begin_to_write", lambda fd, *place: begun.append(place))
    monkeypatch.setattr(file_ranges, "_AT_ONCE", 100)
    back = WriteBack(0)
    for offset in (30, 0, 60, 90, 120):
        back.add(offset, 30)
    assert begun == [(0, 120)]
    monkeypatch.undo()
    with (tmp_path / "file").open("wb") as file:
        file.write(b"new")
        file.flush()
        file_ranges._begin_to_write(file.fileno(), 0, 3)
        file_ranges.forget(file.fileno())
    assert (tmp_path / "file").read_bytes() == b"new"
