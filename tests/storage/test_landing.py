"""Outputs appear whole or not at all: refusals, full disks, kills, interruptions, and two merges to one place."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import merging
from merging import os_calls
from merging.errors import OutputError
from merging.storage.staging import StagedOutput, check_destination
from support.systems import POSIX
from support.tiny import checkpoint, fine_tune, identical, load, model, save

Usage = namedtuple("Usage", "total used free")


def mean(paths: list[Path]) -> dict[str, torch.Tensor]:
    one, two = map(load, paths)
    return {name: one[name] * 0.5 + two[name] * 0.5 for name in one}


def right(path: Path, tuned: list[Path]) -> bool:
    """Whether the output is the average of two models."""
    got, want = load(path), mean(tuned)
    return got.keys() == want.keys() and all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)


def hidden(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


@pytest.fixture(params=["out", "out.safetensors", "out [1]*?"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A destination: a folder, a file, a name that is also a pattern."""
    return tmp_path / str(request.param)


@pytest.fixture
def tuned(tmp_path: Path) -> list[Path]:
    return checkpoint(tmp_path)[1]


def test_what_is_left_is_the_output_alone(tmp_path: Path, tuned: list[Path], output: Path) -> None:
    before = set(tmp_path.iterdir())
    merging.merge(tuned, method="linear", output=output)
    assert set(tmp_path.iterdir()) - before == {output}
    assert right(output, tuned)


def test_existing_output_is_refused(tmp_path: Path, tuned: list[Path], output: Path) -> None:
    output.write_text("mine")
    with pytest.raises(OutputError, match="exists already: choose another output=, or use overwrite=True"):
        merging.merge(tuned, method="linear", output=output)
    assert output.read_text() == "mine"
    output.unlink()
    output.symlink_to(tmp_path / "dangling")
    with pytest.raises(OutputError, match="exists already"):
        merging.merge(tuned, method="linear", output=output)


def test_overwrite_replaces_all(tmp_path: Path, tuned: list[Path]) -> None:
    """Nothing of the old folder stays: neither its shards nor its index nor its tokenizer."""
    output = save(tmp_path / "out", model(9), shards=3)
    (output / "tokenizer.json").write_text("{}")
    (output / "additional_chat_templates").mkdir()
    (output / "additional_chat_templates" / "tool.jinja").write_text("x")
    merging.merge(tuned, method="linear", output=output, overwrite=True)
    assert {file.name for file in output.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert right(output, tuned)
    assert not hidden(tmp_path)


def test_overwrite_of_files(tmp_path: Path, tuned: list[Path]) -> None:
    (tmp_path / "out.safetensors").write_text("old")
    merging.merge(tuned, method="linear", output=tmp_path / "out.safetensors", overwrite=True)
    assert right(tmp_path / "out.safetensors", tuned)
    assert not hidden(tmp_path)


@POSIX
def test_only_models_are_overwritten(tmp_path: Path, tuned: list[Path]) -> None:
    """Whatever --overwrite says: a thesis, a text file and a pipe stay what they are."""
    thesis, text, pipe = tmp_path / "stuff" / "thesis.txt", tmp_path / "notes", tmp_path / "out.safetensors"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    text.write_text("notes")
    os.mkfifo(pipe)
    for output, reason in (
        (thesis.parent, "something else"),
        (text, "is not a folder"),
        (pipe, "not an ordinary file"),
    ):
        with pytest.raises(OutputError, match=reason):
            merging.merge(tuned, method="linear", output=output, overwrite=True)
    assert (thesis.read_text(), text.read_text(), pipe.is_fifo()) == ("years of work", "notes", True)
    (tmp_path / "empty").mkdir()
    merging.merge(tuned, method="linear", output=tmp_path / "empty", overwrite=True)
    assert right(tmp_path / "empty", tuned)


def test_a_folder_is_no_file(tmp_path: Path, tuned: list[Path]) -> None:
    """Known before anything is merged."""
    (tmp_path / "out.safetensors").mkdir()
    steps: list[tuple[int, ...]] = []
    with pytest.raises(OutputError, match="is a folder, and the output is a file"):
        merging.merge(
            tuned,
            method="linear",
            output=tmp_path / "out.safetensors",
            overwrite=True,
            progress=lambda *done: steps.append(done),
        )
    assert not steps
    assert (tmp_path / "out.safetensors").is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["tuned1", "tuned1/model.safetensors", ".", "base", "link", "tuned0/../tuned1"])
def test_output_on_top_of_an_input(tmp_path: Path, where: str, overwrite: bool) -> None:
    base, tuned = checkpoint(tmp_path / "inputs")
    (tmp_path / "inputs" / "link").symlink_to(tuned[0])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="the output would replace the input"):
        merging.merge(
            tuned, method="task_arithmetic", base=base, output=tmp_path / "inputs" / where, overwrite=overwrite
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_output_with_no_folder_to_be_in(tmp_path: Path, tuned: list[Path]) -> None:
    (tmp_path / "parent").write_text("x")
    with pytest.raises(OutputError, match="parent is not a folder"):
        merging.merge(tuned, method="linear", output=tmp_path / "parent" / "out")


def test_folder_that_cannot_be_written(tmp_path: Path, tuned: list[Path]) -> None:
    """/proc takes no new names, of root neither."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no folder here that even root cannot write to")
    with pytest.raises(OutputError, match="/proc/self"):
        merging.merge(tuned, method="linear", output="/proc/self/out")
    with pytest.raises(OutputError, match="/proc/self cannot be written to"):
        StagedOutput(Path("/proc/self/out"), overwrite=False, file=False).__enter__()


def test_too_little_space(tmp_path: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 1000))
    with pytest.raises(OutputError, match=r"needs \d+\.\d MB, and \S+ has 0\.0 MB free"):
        merging.merge(tuned, method="linear", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not hidden(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def refuse(*args: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("reserved", [False, True])
def test_disk_that_fills_up_under_way(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserved: bool
) -> None:
    """Space that was reserved cannot be taken by others; where it cannot be reserved, the error is clear."""
    _, tuned = checkpoint(tmp_path / "inputs", width=1024, vocab=2048, layers=1)
    if not reserved:
        monkeypatch.setattr(os_calls, "allocate", refuse)

    def fill(done: int, total: int) -> None:
        with (small_disk / "others").open("ab", buffering=0) as file:
            while (left := shutil.disk_usage(small_disk).free) > 0:
                file.write(bytes(min(left, 1 << 20)))

    if reserved:
        merging.merge(tuned, method="linear", output=small_disk / "out.safetensors", progress=fill)
        assert right(small_disk / "out.safetensors", tuned)
    else:
        with pytest.raises(OutputError, match="No space left on device"):
            merging.merge(tuned, method="linear", output=small_disk / "out", progress=fill)
        assert [path.name for path in small_disk.iterdir()] == ["others"]


SCRIPT = """
import os, resource, signal, sys, torch, merging
from pathlib import Path
from merging.cli.errors import exit_with_message, handle_errors
folder = Path(sys.argv[1])
{setup}
with exit_with_message(), handle_errors():
    merging.merge([folder / "tuned0", folder / "tuned1"], method="linear", output=folder / "out", threads=2{options})
"""


def merge_in_a_process(folder: Path, setup: str = "", options: str = "") -> subprocess.CompletedProcess[str]:
    """A merge to ``folder / "out"`` in a process of its own, as the command line runs it."""
    script = SCRIPT.format(setup=setup, options=options)
    return subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)


@POSIX
def test_file_larger_than_allowed(tmp_path: Path) -> None:
    """A quota stops the writing, before or while tensors are merged."""
    checkpoint(tmp_path, width=64, vocab=4096)
    done = merge_in_a_process(tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))")
    assert done.returncode == 1
    assert "cannot be written: File too large" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not hidden(tmp_path)


@POSIX
def test_kill_and_the_next_merge(tmp_path: Path) -> None:
    """Killed, a merge leaves no output, only a hidden folder, which the next merge to the same place removes."""
    _, tuned = checkpoint(tmp_path, width=64, vocab=4096)
    done = merge_in_a_process(tmp_path, options=", progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = hidden(tmp_path)
    assert left.name.startswith(".out.")
    assert left.suffix == ".partial"
    merging.merge(tuned, method="linear", output=tmp_path / "elsewhere")
    assert hidden(tmp_path) == [left], "another merge has nothing to do with it"
    merging.merge(tuned, method="linear", output=tmp_path / "out")
    assert not hidden(tmp_path)
    assert right(tmp_path / "out", tuned)


def test_abandoned_and_live_folders(tmp_path: Path, tuned: list[Path], output: Path) -> None:
    """Whatever the name; a folder whose owner lives is left alone."""
    abandoned = tmp_path / f".{output.name}.abcd_123.partial" / "out"
    abandoned.mkdir(parents=True)
    (abandoned / "model.safetensors").write_bytes(bytes(100))
    with StagedOutput(output, overwrite=False, file=output.suffix == ".safetensors") as staged:
        assert hidden(tmp_path) == [staged.scratch.parent]
        merging.merge(tuned, method="linear", output=output)
        assert hidden(tmp_path) == [staged.scratch.parent]
    assert not hidden(tmp_path)


INTERRUPT = """
def interrupt(done, total):
    os.kill(os.getpid(), {number:d})
    while signal.getsignal({number:d}) != signal.SIG_IGN:  # until the main thread has seen it
        pass
"""


@POSIX
@pytest.mark.parametrize(
    "number", ["SIGTERM", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("SIGINT", "SIGHUP"))]
)
def test_interruption_leaves_nothing(tmp_path: Path, number: str) -> None:
    """Nor does a second one, while the threads of the merge finish what they are at."""
    base = {f"layers.{i}.weight": torch.zeros(1 << 18, dtype=torch.bfloat16) for i in range(24)}
    for i in range(2):
        save(tmp_path / f"tuned{i}", base)
    before = set(tmp_path.iterdir())
    done = merge_in_a_process(tmp_path, INTERRUPT.format(number=getattr(signal, number)), ", progress=interrupt")
    assert (done.returncode, done.stderr) == (130, "Interrupted: nothing was written.\n")
    assert set(tmp_path.iterdir()) == before


def test_an_error_leaves_nothing(tmp_path: Path, tuned: list[Path], output: Path) -> None:
    before = set(tmp_path.iterdir())

    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merging.merge(tuned, method="linear", output=output, progress=fail)
    assert set(tmp_path.iterdir()) == before


def test_two_merges_to_one_place(tmp_path: Path, tuned: list[Path], output: Path) -> None:
    """The first to finish has it; the other is refused at the end, and neither removes the other's folder."""
    others = [save(tmp_path / f"other{i}", fine_tune(model(), 7 + i)) for i in range(2)]
    finished: list[Path] = []

    def overtake(done: int, total: int) -> None:
        if not finished:
            finished.append(merging.merge(others, method="linear", output=output).path)

    with pytest.raises(OutputError, match="was created by someone else meanwhile: choose another output="):
        merging.merge(tuned, method="linear", output=output, progress=overtake)
    assert right(output, others)
    assert not hidden(tmp_path)


def test_two_processes_to_one_place(tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path, width=64, vocab=4096)
    script = SCRIPT.format(setup="", options="")
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 1]
    loser = next(text for text, process in zip(said, running, strict=True) if process.returncode)
    assert loser.startswith("Error: ") or "merging.errors" in loser or "ClickException" in loser
    assert "Traceback" not in loser.partition("ClickException")[2]
    assert right(tmp_path / "out", tuned)
    assert not hidden(tmp_path)


def test_overtaken_between_look_and_rename(tmp_path: Path) -> None:
    """A folder that appears at the last moment is never mixed with ours, nor replaced."""
    with StagedOutput(tmp_path / "out", overwrite=False, file=False) as staged:
        (staged.folder / "ours").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("y")
        with pytest.raises(OutputError, match="created by someone else"):
            staged.commit()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert not hidden(tmp_path)


def test_permissions_are_ordinary(tmp_path: Path, tuned: list[Path]) -> None:
    """The umask's, not those of a temporary folder."""
    (tmp_path / "reference").mkdir()
    (tmp_path / "file").touch()
    merging.merge(tuned, method="linear", output=tmp_path / "out")
    merging.merge(tuned, method="linear", output=tmp_path / "out.safetensors")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "reference").stat().st_mode
    assert (tmp_path / "out.safetensors").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_same_bytes_again(tmp_path: Path, tuned: list[Path]) -> None:
    for name in ("one", "two"):
        merging.merge(tuned, method="linear", output=tmp_path / name)
    assert identical(load(tmp_path / "one"), load(tmp_path / "two"))


def test_a_live_claim_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another merge that takes the folder for abandoned, before or after its lock is taken, is stepped aside for."""
    plain, thieves = os_calls.open_folder, []

    def steal_before(path: Path) -> int | None:
        if not thieves:
            thieves.append(path)
            shutil.rmtree(path)  # between its creation and its opening
        return plain(path)

    monkeypatch.setattr(os_calls, "open_folder", steal_before)
    with StagedOutput(tmp_path / "out", overwrite=False, file=False) as staged:
        assert hidden(tmp_path) == [staged.scratch.parent] != thieves

    def steal_after(path: Path) -> int | None:
        opened = plain(path)
        if len(thieves) < 2:
            thieves.append(path)
            shutil.rmtree(path)  # between its opening and the lock
        return opened

    monkeypatch.setattr(os_calls, "open_folder", steal_after)
    with StagedOutput(tmp_path / "out", overwrite=False, file=False) as staged:
        assert hidden(tmp_path) == [staged.scratch.parent] != thieves[1:]

    def hold(path: Path) -> int | None:
        if len(thieves) < 4:
            held = plain(path)
            assert held is not None
            thieves.append(path)
            locks.append(held)
            assert os_calls.claim(held)  # by the other merge, which is about to remove it
        return plain(path)

    locks: list[int] = []
    monkeypatch.setattr(os_calls, "open_folder", hold)
    with StagedOutput(tmp_path / "out", overwrite=False, file=False) as staged:
        assert staged.scratch.parent not in thieves
        assert hidden(tmp_path) == [staged.scratch.parent], "one that only looked leaves it to us"
    for lock in locks:
        os.close(lock)


def test_what_cannot_be_removed_is_said(tmp_path: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a merge as a notice, in a refusal along with it."""

    def fail(*args: object, **named: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", fail)
        done = merging.merge(tuned, method="linear", output=tmp_path / "out")
        (left,) = hidden(tmp_path)
        assert done.notices[-1].startswith(f"the temporary folder {left} could not be removed (Input/output error)")
        patch.setattr(os_calls, "reserve", fail)
        with pytest.raises(OutputError, match=r"cannot be written: Input/output error; the temporary folder \S+ could"):
            merging.merge(tuned, method="linear", output=tmp_path / "out", overwrite=True)
    merging.merge(tuned, method="linear", output=tmp_path / "out", overwrite=True)
    assert not hidden(tmp_path)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_the_disk_does_not_confirm(
    tmp_path: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch, number: int, resume: bool
) -> None:
    """What is in place is called so; a file system that syncs no folders does it in its own time."""
    plain = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) and (tmp_path / "out").is_dir():
            raise OSError(number, os.strerror(number))
        plain(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EINVAL:
        merging.merge(tuned, method="linear", output=tmp_path / "out", resume=resume)
    else:
        message = r"out: is in place, but the disk does not confirm it \(Input/output error\): .* it may be gone$"
        with pytest.raises(OutputError, match=message):
            merging.merge(tuned, method="linear", output=tmp_path / "out", resume=resume)
    assert right(tmp_path / "out", tuned)
    assert not hidden(tmp_path)


def test_a_disk_that_fills_beside_the_weights(
    tmp_path: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the index of shards is written: one message, nothing left."""
    plain = Path.write_text

    def write_text(path: Path, text: str, *args: object, **named: object) -> int:
        if path.name.endswith(".index.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, text, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", write_text)
    before = set(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"out: cannot be written: No space left on device$"):
        merging.merge(tuned, method="linear", output=tmp_path / "out", shard_size=600)
    assert set(tmp_path.iterdir()) == before


def test_only_leftovers_of_this_output_are_touched(tmp_path: Path, tuned: list[Path]) -> None:
    """Another output's, whose name begins alike, with its only model; a person's own folders, named nearly alike."""
    others = [
        save(tmp_path / ".out.v2.abcd_123.partial" / "old", model(9)),
        save(tmp_path / ".out.notes.partial", model(9)),
        save(tmp_path / ".out.my_notes.partial", model(9)),
        save(tmp_path / ".out.abcd_123.partial.old" / "old", model(9)),
    ]
    save(tmp_path / ".out.abcd_123.partial" / "old", model(9))
    merging.merge(tuned, method="linear", output=tmp_path / "out", overwrite=True)
    assert all(identical(load(other), model(9)) for other in others)
    assert not (tmp_path / ".out.abcd_123.partial").exists()
    assert right(tmp_path / "out", tuned)


def test_a_model_that_a_kill_left_aside_is_moved_back(tmp_path: Path, tuned: list[Path]) -> None:
    """By the next merge, also where that is refused; a dry run touches nothing, and counts it as being there."""
    old, rest = tmp_path / ".out.abcd_123.partial" / "old", tmp_path / ".out.abcd_124.partial" / "out"
    save(old, model(9))
    save(rest, model(8))
    remark = check_destination(tmp_path / "out", tuned, 0, overwrite=False, dry=True)
    assert f"out exists already (a merge that was killed left it as {old}): the merge needs" in remark
    assert check_destination(tmp_path / "out", tuned, 0, overwrite=True, dry=True) == ""
    assert old.is_dir() and rest.is_dir() and not (tmp_path / "out").exists()
    (old / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"it holds thesis\.txt"):
        merging.merge(tuned, method="linear", output=tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="exists already: choose another output="):
        merging.merge(tuned, method="linear", output=tmp_path / "out")
    assert identical(load(tmp_path / "out"), model(9)) and (tmp_path / "out" / "thesis.txt").is_file()
    assert not hidden(tmp_path)


def test_a_refused_merge_removes_what_a_kill_left(tmp_path: Path, tuned: list[Path]) -> None:
    """Of a merge that was killed when its output was in place already."""
    merging.merge(tuned, method="linear", output=tmp_path / "out")
    (tmp_path / ".out.abcd_123.partial").mkdir()
    (tmp_path / ".out.abcd_124.partial" / "scratch").mkdir(parents=True)
    with pytest.raises(OutputError, match="exists already: choose another output=, or use overwrite=True"):
        merging.merge(tuned, method="linear", output=tmp_path / "out")
    assert not hidden(tmp_path)
    assert right(tmp_path / "out", tuned)
