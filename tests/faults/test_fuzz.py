"""Some of the inputs of tests/faults/fuzz.py, and proof that its guard catches what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits and what a process does are looked up in /proc"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.parametrize("inputs", [15, pytest.param(800, marks=pytest.mark.exhaustive)])
def test_short_run(tmp_path: Path, inputs: int) -> None:
    """Every reader, by the command itself, in a process of its own: what is found is named in its output."""
    options = ["--inputs", str(inputs), "--seed", "11", "--quick", "--kept", str(tmp_path / "kept")]
    words = [sys.executable, str(FUZZ), *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{inputs} inputs (header " in done.stdout and "findings: 0" in done.stdout


def _writes(output: Path) -> None:
    (output.parent / "escaped").write_text("x")


def _removes(output: Path) -> None:
    (output.parent / "there").unlink()


def _hangs(output: Path) -> None:
    while True:
        pass


def _waits(output: Path) -> None:
    time.sleep(60)


def _allocates(output: Path) -> None:
    bytearray(3_000_000_000)


def _starts(output: Path) -> None:
    os.system("true")


def _fails(output: Path) -> None:
    raise KeyError("x")


CAUGHT: dict[str, tuple[Callable[[Path], None], str]] = {
    "file outside": (_writes, "open outside of its output"),
    "file removed": (_removes, "os.remove outside of its output"),
    "endless loop": (_hangs, "takes more than"),
    "endless wait": (_waits, "takes more than"),
    "memory": (_allocates, "MemoryError"),
    "process": (_starts, "does os.system"),
    "other error": (_fails, "KeyError"),
}


@pytest.mark.parametrize("case", CAUGHT)
def test_guard(tmp_path: Path, case: str) -> None:
    from fuzzing import guard

    harm, told = CAUGHT[case]
    (tmp_path / "there").write_text("x")
    child = os.fork()
    if not child:  # limits and hooks are for good
        try:
            guard.SECONDS = guard.PATIENCE = 1
            found = guard.Guard().judge(lambda: harm(tmp_path / "out"), tmp_path / "out")
            os._exit(0 if found is not None and told in found.what else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
