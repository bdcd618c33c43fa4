"""Work shared out over threads: an interrupt is raised when they have ended, and not while one still writes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import merging
from merging.engine.threads import share_out
from merging.errors import OptionError
from support.systems import POSIX
from support.tiny import checkpoint


@POSIX
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_interrupt_waits_for_what_is_under_way(threads: int) -> None:
    """Python up to 3.12 takes a thread for ended where Ctrl-C comes while it is waited for (its own `join`)."""
    begun: list[int] = []
    ended: list[int] = []

    def work(worker: None, unit: int) -> None:
        begun.append(unit)
        if len(begun) == threads:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.append(unit)

    with pytest.raises(KeyboardInterrupt):
        share_out(range(50), lambda device: None, work, lambda unit: None, threads=threads)
    assert sorted(ended) == sorted(begun)
    assert len(begun) < 50


@POSIX
def test_what_can_be_stopped_is_not_waited_for() -> None:
    stop, late = threading.Event(), threading.Event()

    def work(worker: None, unit: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(10)
        late.wait(10)

    with pytest.raises(KeyboardInterrupt):
        share_out(range(2), lambda device: None, work, lambda unit: None, threads=1, stop=stop)
    assert stop.is_set()
    late.set()


def test_the_first_error_ends_all() -> None:
    done: list[int] = []

    def work(worker: None, unit: int) -> None:
        if unit == 3:
            raise ZeroDivisionError
        done.append(unit)

    with pytest.raises(ZeroDivisionError):
        share_out(range(10_000), lambda device: None, work, lambda unit: None, threads=2)
    assert len(done) < 10_000


@pytest.mark.parametrize("threads", ["2", 1.5, True, float("nan"), [2]], ids=repr)
def test_threads_that_are_no_number(threads: Any, tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path)
    with pytest.raises(OptionError, match="threads should be a whole number, and is"):
        merging.merge(tuned, method="linear", output=tmp_path / "out", threads=threads)
