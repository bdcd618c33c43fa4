"""Signals at any moment of the placing of an output: whole or not there, nothing besides, and said as it is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

import merging
from merging import os_calls
from merging.cli.errors import OutputStatus, exit_with_message, handle_errors
from merging.cli.main import cli
from merging.continual import ContinualStore
from merging.storage.staging import StagedOutput
from support.systems import POSIX
from support.tiny import adapters, fine_tune, load, save

pytestmark = POSIX

TRACED = ("staging.py", "os_calls.py", "tempfile.py", "contextlib.py", Path(__file__).name)


def interrupted_at(moment: int, work: Callable[[], None]) -> bool:
    """Do work that gets SIGINT at the so manieth line or call that matters; whether it came to that."""
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        passed += event in ("call", "line")
        if passed == moment and event in ("call", "line"):
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return passed >= moment


@pytest.mark.parametrize("file", [True, False], ids=["file", "folder"])
@pytest.mark.parametrize("overwrite", [True, False], ids=["overwrite", "new"])
def test_one_signal_leaves_nothing_at_any_moment(
    tmp_path: Path, overwrite: bool, file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    out = tmp_path / "out"
    content = out if file else out / "model.safetensors"
    came, moment = True, 0
    ends = set()

    def place() -> None:
        with StagedOutput(out, overwrite, file) as staged:
            (staged.folder / "model.safetensors").write_text("new")
            staged.commit()

    while came:
        moment += 1
        if overwrite:
            content.parent.mkdir(exist_ok=True)
            content.write_text("old")
        came = interrupted_at(moment, place)
        assert set(tmp_path.iterdir()) <= {out}, moment
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ends.add(content.read_text() if content.exists() else None)
        content.unlink(missing_ok=True)
        if not file and out.exists():
            out.rmdir()
    assert moment > 100
    assert ends == {"old" if overwrite else None, "new"}


def test_only_handlers_that_may_raise_are_held_and_only_where_they_run() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    hangup = signal.getsignal(signal.SIGHUP)

    def elsewhere() -> None:
        with os_calls.delay_signals():
            caught.append(0)

    try:
        with os_calls.delay_signals(), os_calls.delay_signals():
            signal.raise_signal(signal.SIGTERM)
            assert (caught, signal.getsignal(signal.SIGHUP)) == ([], hangup)
        assert caught == [signal.SIGTERM]
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert caught == [signal.SIGTERM, 0]
    finally:
        signal.signal(signal.SIGTERM, before)


COMMANDS = {
    "merge": ("--method linear tuned0 tuned1", ""),
    "run": ("run recipe.yaml", ""),
    "compress": ("compress adapter0", ".safetensors"),
    "decompress": ("decompress pack.safetensors", ""),
    "route": ("route adapter0 adapter1", ".safetensors"),
    "export": ("continual export store", ""),
    "bake": ("--method linear --base base --as model adapter0 adapter1", ""),
}
"""The commands that place an output, and how its name ends."""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the commands read, in the working directory."""
    monkeypatch.chdir(tmp_path)
    base, made = adapters(tmp_path, 2)
    for number, path in enumerate(made):
        path.rename(f"adapter{number}")
        save(tmp_path / f"tuned{number}", fine_tune(load(base), number))
    Path("recipe.yaml").write_text("models: [tuned0, tuned1]\nmethod: linear\n")
    merging.compress("adapter0", output="pack.safetensors")
    ContinualStore.create("store", base="base").add("tuned0")


@pytest.mark.usefixtures("inputs")
def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    """Not even what a kill left."""
    save(tmp_path / ".out.abcd_123.partial" / "old", load(Path("base")))
    (tmp_path / ".out.abcd_124.partial" / "out").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for more in (["--overwrite"], []):
        words = [*COMMANDS["merge"][0].split(), "-o", "out", "--dry-run", *more]
        assert CliRunner().invoke(cli, words).exit_code == 0
        assert sorted(tmp_path.rglob("*")) == before


def test_what_was_being_published_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    status = OutputStatus()
    status.publishing = "me/model"
    with pytest.raises(SystemExit), exit_with_message(), handle_errors(status=status):
        raise KeyboardInterrupt
    said = "Interrupted: nothing was written, and whether it was published is not known: look at me/model.\n"
    assert capsys.readouterr().err == said


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_is_in_place_is_called_so(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal that comes just after its renaming, and one that comes just before, over an output and without."""
    words, ending = COMMANDS[command]
    output = Path(f"out{ending}")
    plain = StagedOutput._put_in_place

    def before(staged: StagedOutput) -> None:
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError

    def after(staged: StagedOutput) -> None:
        plain(staged)
        signal.raise_signal(signal.SIGINT)

    inode = None
    for place, more, said in (
        (before, "", "nothing was written"),
        (after, "", f"{output} is whole and in place"),
        (before, " --overwrite", "nothing was written"),
        (after, " --overwrite", f"{output} is whole and in place"),
    ):
        monkeypatch.setattr(StagedOutput, "_put_in_place", place)
        with pytest.raises(SystemExit) as end:
            cli.main(f"{words} -o {output}{more}".split())
        assert end.value.code == 130
        assert capsys.readouterr().err == f"Interrupted: {said}.\n"
        assert (output.lstat().st_ino if output.exists() else None) != inode or place is before
        inode = output.lstat().st_ino if output.exists() else None
        assert not list(tmp_path.glob(".*"))
