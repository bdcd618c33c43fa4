"""Many merges in one process: nothing is left of a merge but its output."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

import merging
from support.tiny import checkpoint

DESCRIPTORS = Path("/proc/self/fd")


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="open files are counted on Linux")
@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_merges_leave_no_objects_and_no_open_files(tmp_path: Path, count: int) -> None:
    base, tuned = checkpoint(tmp_path, 2)

    def merge_all(times: int) -> tuple[int, int]:
        for _ in range(times):
            merging.merge(tuned, method="ties", base=base, output=tmp_path / "out", overwrite=True)
        gc.collect()
        return len(gc.get_objects()), len(list(DESCRIPTORS.iterdir()))

    objects, files = merge_all(3)
    more_objects, more_files = merge_all(count)
    assert more_files == files
    assert more_objects - objects < 20 * min(count, 10), "a merge alone makes thousands"


def test_plans_do_not_keep_garbage_of_others_from_being_freed(tmp_path: Path) -> None:
    """Cycles that a program leaves between plans are as young afterwards as before."""

    class Node:
        alive = 0

        def __init__(self) -> None:
            self.own = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    _, tuned = checkpoint(tmp_path, 2)
    gc.collect()
    for _ in range(20):
        Node()
        merging.preview(tuned, method="linear")
    gc.collect(1)
    assert Node.alive < 10, "only a collection of everything would free them"
