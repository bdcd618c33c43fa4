"""Files of version 0.1 are read, continued and cleaned up: stores, packs, pools, and what killed commands left.

That version wrote ``version_0_1.zip``, in a folder that is gone. ``files/`` holds two stores (one of them rolled back,
with a step that was killed), packs, a pool and a killed merge; ``expected/`` its outputs from these files. In
``recycling_0_1.zip`` is a run of recycling that was killed in its second step of forty, with its base, adapters and
texts, and the adapter and report of the whole run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.continual import ContinualStore
from merging.errors import OptionError
from merging.pool import Pool
from support.tiny import identical, load

ARCHIVE = Path(__file__).with_name("version_0_1.zip")
KILLED_RUN = Path(__file__).with_name("recycling_0_1.zip")


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


def recycle(**options: Any) -> merging.Recycled:
    """The run that was killed: its pool, texts and settings."""
    settings = {"k": 2, "steps": 40, "every": 1, "lora_steps": 4, "lora_rank": 2, "lora_rates": (0.01,)}
    texts = {part: f"{part}.jsonl" for part in ("train", "valid", "test")}
    return merging.recycle("pool", base="base", output="out", resamples=100, **texts, **settings, **options)


def test_a_killed_run_of_recycling_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the version that began it; another version refuses it, and leaves it as it is."""
    shutil.unpack_archive(KILLED_RUN, tmp_path)
    monkeypatch.chdir(tmp_path / "files")
    journal = Path(".out.recycling")
    before = {path.name: path.read_bytes() for path in journal.iterdir()}
    with pytest.raises(OptionError, match="holds an unfinished run: resume=True continues it"):
        recycle()
    monkeypatch.setattr("merging.recycling.workflow.__version__", "0.2.0")
    with pytest.raises(OptionError, match="the run to resume had another version: give the same again, or start over"):
        recycle(resume=True)
    assert {path.name: path.read_bytes() for path in journal.iterdir()} == before
    monkeypatch.setattr("merging.recycling.workflow.__version__", "0.1.0")
    done = recycle(resume=True)
    # factors are made by a decomposition, whose signs differ between processors
    found, wanted = load(Path("out")), load(tmp_path / "expected" / "out")
    assert {name: each.shape for name, each in found.items()} == {name: each.shape for name, each in wanted.items()}
    expected = json.loads((tmp_path / "expected" / "recycling.json").read_text())
    assert [row.title for row in done.report.rows] == [row["title"] for row in expected["rows"]]
    assert [row.loss for row in done.report.rows] == pytest.approx([row["loss"] for row in expected["rows"]], rel=1e-3)
    assert not journal.exists()
