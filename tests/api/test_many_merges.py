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
