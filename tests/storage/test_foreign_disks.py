"""Outputs and stores on file systems that lack links, locks, syncs, sizes in advance, or renames with flags."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import merging
from merging import os_calls
from merging.continual import ContinualStore
from merging.continual.folder import Busy
from merging.errors import OutputError
from merging.sources.links import link_or_copy
from merging.storage.atomic import place_new_file
from merging.storage.leftovers import find_leftovers
from merging.storage.locks import lock_file, lock_folder
from merging.storage.staging import StagedOutput
from support.foreign_disk import LACKS, lack
from support.systems import POSIX
from support.tiny import checkpoint

pytestmark = POSIX

LINEAR = {"method": "linear", "threads": 1}

CASES = [(each, name) for each, names in LACKS.items() for name in names]

EVERYDAY = {("locks", "ENOLCK"), ("links", "EPERM"), ("any size in advance", "EPERM")}


def contents(path: Path) -> dict[str, bytes]:
    """All files of an output."""
    files = [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]
    return {str(each.relative_to(path.parent)): each.read_bytes() for each in files}


def cases() -> list[object]:
    everything = ("everything", "ENOSYS")
    return [
        pytest.param(*case, marks=[] if case in {*EVERYDAY, everything} else pytest.mark.exhaustive)
        for case in (*CASES, everything)
    ]


@pytest.fixture
def tuned(tmp_path: Path) -> list[Path]:
    return checkpoint(tmp_path / "models", layers=1)[1]


@pytest.mark.parametrize(("thing", "error"), cases())
def test_merges_are_the_same(
    tmp_path: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch, thing: str, error: str
) -> None:
    """New and over an old output, a file and a folder; an existing one is refused; nothing is left."""
    wanted = {}
    for name in ("out", "out.safetensors"):
        merging.merge(tuned, output=tmp_path / name, **LINEAR)
        wanted[name] = contents(tmp_path / name)
    work = tmp_path / "work"
    work.mkdir()
    lack(monkeypatch, LACKS if thing == "everything" else [thing], getattr(errno, error))
    for name in wanted:
        merging.merge(tuned, output=work / name, **LINEAR)
        assert contents(work / name) == wanted[name]
        with pytest.raises(OutputError, match="exists already"):
            merging.merge(tuned, output=work / name, **LINEAR)
        merging.merge(tuned, output=work / name, weights=[0.9, 0.1], overwrite=True, **LINEAR)
        assert contents(work / name) != wanted[name]
        merging.merge(tuned, output=work / name, overwrite=True, resume=True, **LINEAR)
        assert contents(work / name) == wanted[name]
    assert sorted(path.name for path in work.iterdir()) == sorted(wanted)


@pytest.mark.parametrize(
    ("thing", "error"),
    [("locks", "ENOLCK"), *(pytest.param("locks", name, marks=pytest.mark.exhaustive) for name in LACKS["locks"][1:])],
)
def test_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: str, error: str) -> None:
    """A store grows, and has one writer at a time."""
    base, tuned = checkpoint(tmp_path / "models", layers=1)
    lack(monkeypatch, [thing], getattr(errno, error))
    store = ContinualStore.create(tmp_path / "store", base=base, method="ties")
    (store.path / ".lock").touch()  # as a disk with locks leaves it
    held = lock_file(store.path / ".lock")
    assert held is not None
    with pytest.raises(Busy):
        store.add(tuned[0], threads=1, wait=0.0)
    held.release()
    store.add(tuned[0], threads=1, wait=0.0)
    assert len(store.manifest().steps) == 1
    assert [path.name for path in store.path.glob(".*")] == [".lock"]


@pytest.mark.parametrize("things", [["locks of folders"], ["locks"]])
def test_leftovers_without_locks(
    tmp_path: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch, things: list[str]
) -> None:
    """A living run keeps its folder; a dead run's is listed, and removed by the next merge."""
    script = f"""
import os, signal, errno, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import pytest
from pathlib import Path
from support.foreign_disk import lack
from merging.storage.staging import StagedOutput
lack(pytest.MonkeyPatch(), {things!r}, errno.ENOLCK)
with StagedOutput(Path({str(tmp_path / "out")!r}), overwrite=False, file=False) as staged:
    (staged.folder / "model.safetensors").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    lack(monkeypatch, things, errno.ENOLCK)
    with StagedOutput(tmp_path / "other", overwrite=False, file=False) as alive:
        assert [each.output.name for each in find_leftovers(tmp_path)] == ["out"]
        assert alive.folder.is_dir()
    merging.merge(tuned, output=tmp_path / "out", **LINEAR)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_nobody_locked_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks, only a run's own record shows that it is dead."""
    lack(monkeypatch, ["locks"], errno.ENOLCK)
    folder = tmp_path / ".out.abcd_123.partial"
    (folder / "out").mkdir(parents=True)
    assert lock_folder(folder) is None
    assert not find_leftovers(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_new_file_never_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without links by a rename that replaces nothing, without either by a look before the rename."""
    for number, things in enumerate((["links"], ["links", "renames with flags"])):
        with monkeypatch.context() as patch:
            lack(patch, things, errno.EPERM)
            built, there, free = (tmp_path / f"{name}{number}" for name in ("built", "there", "free"))
            built.write_text("ours")
            there.write_text("theirs")
            with pytest.raises(FileExistsError):
                place_new_file(built, there)
            place_new_file(built, free)
            assert (there.read_text(), free.read_text(), built.exists()) == ("theirs", "ours", False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux renames with flags")
def test_renames_that_replace_nothing(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("one")
    assert os_calls.rename_new(one, other)
    one.write_text("two")
    with pytest.raises(FileExistsError):
        os_calls.rename_new(one, other)
    assert other.read_text() == "one"


def test_failures_of_the_disk_are_no_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk and a broken one are reported, whichever call meets them."""
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        with monkeypatch.context() as patch:
            lack(patch, ["fallocate", "syncs", "modes"], number)
            for call in (
                lambda: os_calls.reserve(fd, 10),
                lambda: os_calls.sync(fd),
                lambda: os_calls.sync_folder(tmp_path),
                lambda: os_calls.set_mode(path, 0o600),
            ):
                with pytest.raises(OSError, match=os.strerror(number)):
                    call()
    os.close(fd)


def test_a_copy_for_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").write_text("content")
    lack(monkeypatch, ["symbolic links"], errno.EPERM)
    link_or_copy(tmp_path / "place", tmp_path / "target")
    assert (tmp_path / "place").read_text() == "content"
