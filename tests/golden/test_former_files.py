"""Files of version 0.1 are read, continued and cleaned up: stores, packs, a pool, and what killed commands left.

That version wrote ``version_0_1.zip``, in a folder that is gone. ``files/`` holds two stores (one of them rolled back,
with a step that was killed), packs, a pool and a killed merge; ``expected/`` its outputs from these files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import merging
from merging.continual import ContinualStore
from merging.pool import Pool
from support.tiny import identical, load

ARCHIVE = Path(__file__).with_name("version_0_1.zip")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    shutil.unpack_archive(ARCHIVE, tmp_path)
    return tmp_path / "files"


def assert_as_expected(files: Path, output: Path) -> None:
    expected, found = load(files.parent / "expected" / output.name), load(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["opcm", "ties"])
def test_stores_are_exported_and_continued(name: str, files: Path) -> None:
    store = ContinualStore(files / name)
    before = len(store.log())
    store.relocate(files / "base")
    store.export(files / f"held-{name}", threads=1)
    assert_as_expected(files, files / f"held-{name}")
    assert store.add(files / "three", threads=1)
    assert not store.verify().problems and len(store.log()) == before + 1
    store.export(files / f"grown-{name}", threads=1)
    assert_as_expected(files, files / f"grown-{name}")
    assert not list(files.glob(f"{name}/states/.unfinished*"))
    store.rollback(to=before)
    store.export(files / "back", threads=1)
    assert identical(load(files / "back"), load(files / f"held-{name}"))


def test_packs_are_decoded(files: Path) -> None:
    merging.decompress(files / "adapter.pack.safetensors", files / "from-adapter")
    assert_as_expected(files, files / "from-adapter")
    merging.decompress(files / "one.pack.safetensors", files / "from-one", base=files / "base")
    assert_as_expected(files, files / "from-one")


def test_the_next_merge_removes_what_a_killed_merge_left(files: Path) -> None:
    assert list(files.glob(".merged.*.partial"))
    models = [files / "one", files / "two"]
    merging.merge(models, method="ties", base=files / "base", output=files / "merged", threads=1)
    assert_as_expected(files, files / "merged")
    assert not list(files.glob(".merged.*.partial"))


def test_pools_keep_their_verdicts(files: Path) -> None:
    pool = Pool(files / "pool")
    entries = {Path(entry.name).name: entry for entry in pool.index.entries()}
    assert entries.keys() == {"adapter", "other"}
    assert entries["other"].verdict == "ok" and entries["adapter"].usable
    assert entries["other"].findings[-1].reason == "read"
    for entry in entries.values():
        assert load(entry.place(files / "pool"))
