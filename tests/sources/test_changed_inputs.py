"""Files that are written to, cut or replaced while they are read: refused by name, and nothing is mixed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging import os_calls
from merging.compression import compress, decompress
from merging.continual import ContinualStore, step
from merging.errors import FormatError, MergingError
from merging.pool import Pool, files
from merging.pool.candidates import candidates_in
from support.tiny import adapters, checkpoint, load

Verb = Callable[[Path], tuple[Path, Callable[[], object]]]
"""Makes inputs in a folder; says which file is harmed, and what reads it."""


def full(folder: Path) -> tuple[Path, Callable[[], object]]:
    _, tuned = checkpoint(folder)
    return tuned[1] / "model.safetensors", lambda: merging.merge(tuned, method="ties", base=folder / "base", output=out)


def full_twice(folder: Path) -> tuple[Path, Callable[[], object]]:
    _, tuned = checkpoint(folder)
    return tuned[0] / "model.safetensors", lambda: merging.merge(tuned, method="linear", output=out, threads=2)


def pickled(folder: Path) -> tuple[Path, Callable[[], object]]:
    _, tuned = checkpoint(folder)
    for path in tuned:
        torch.save(load(path), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return tuned[1] / "pytorch_model.bin", lambda: merging.merge(tuned, method="linear", output=out)


def factors(folder: Path) -> tuple[Path, Callable[[], object]]:
    _, made = adapters(folder, 2)
    return made[0] / "adapter_model.safetensors", lambda: merging.merge(made, method="linear", output=out)


def compared(folder: Path) -> tuple[Path, Callable[[], object]]:
    base, tuned = checkpoint(folder)
    return tuned[0] / "model.safetensors", lambda: merging.compare(tuned, base=base)


def packed(folder: Path) -> tuple[Path, Callable[[], object]]:
    _, made = adapters(folder, 1)
    pack = out.with_suffix(".safetensors")
    return made[0] / "adapter_model.safetensors", lambda: compress(made[0], pack)


def unpacked(folder: Path) -> tuple[Path, Callable[[], object]]:
    _, made = adapters(folder, 1)
    pack = compress(made[0], folder / "pack.safetensors").path
    return pack, lambda: decompress(pack, out)


def added(folder: Path) -> tuple[Path, Callable[[], object]]:
    base, tuned = checkpoint(folder)
    store = ContinualStore.create(folder / "store", base=base)
    return tuned[0] / "model.safetensors", lambda: store.add(tuned[0], threads=1)


def exported(folder: Path) -> tuple[Path, Callable[[], object]]:
    base, tuned = checkpoint(folder)
    store = ContinualStore.create(folder / "store", base=base)
    store.add(tuned[0], threads=1)
    (state,) = (folder / "store" / "states").rglob("*.safetensors")
    return state, lambda: store.export(out, threads=1)


VERBS = [full, full_twice, pickled, factors, compared, packed, unpacked, added, exported]
out = Path("out")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Harm:
    """Harms a file just before its last read, which an undisturbed run tells."""

    def __init__(self, path: Path, how: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.how, self.reads, self.last = path, how, 0, 0
        self._inode = path.stat().st_ino
        self._plain = os_calls.read_at
        monkeypatch.setattr(os_calls, "read_at", self.read_at)

    def read_at(self, fd: int, buffer: memoryview, offset: int) -> None:
        if os.fstat(fd).st_ino == self._inode:
            self.reads += 1
            if self.reads == self.last:
                self.how(self.path)
        self._plain(fd, buffer, offset)


def rewrite(path: Path) -> None:
    """In place: as many bytes, and others."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remains(folder: Path) -> set[str]:
    """What could be an output, whole or half."""
    return {path.name for path in folder.iterdir() if path.name.startswith((".", "out"))}


@pytest.mark.parametrize("how", [rewrite, cut])
@pytest.mark.parametrize("verb", VERBS)
def test_what_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Verb, how: Callable[[Path], None]
) -> None:
    """By name; no output is written, and a store stays as it is."""
    path, read = verb(tmp_path / "undisturbed")
    harm = Harm(path, how, monkeypatch)
    read()
    assert harm.reads, "nothing of it is read"
    for name in remains(tmp_path):
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    path, read = verb(tmp_path / "harmed")
    counted = harm.reads
    os.utime(path, ns=(0, 0))  # a clock of files may tick as seldom as every 10 ms
    harm = Harm(path, how, monkeypatch)
    harm.last = counted
    with pytest.raises(MergingError, match=rf"{path.name}.*(changed|was cut) while it was read"):
        read()
    assert not remains(tmp_path)
    if (tmp_path / "harmed" / "store").is_dir():
        steps = ContinualStore(tmp_path / "harmed" / "store").manifest().steps
        assert len(steps) == (verb is exported)


def test_what_is_replaced_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open file outlives its name: one that is moved to its place changes nothing of this merge."""
    path, read = full(tmp_path / "inputs")

    def replace(path: Path) -> None:
        save_file({"model.norm.weight": torch.zeros(8)}, tmp_path / "other.safetensors")
        (tmp_path / "other.safetensors").replace(path)

    read()
    undisturbed = load(out)
    shutil.rmtree(out)
    Harm(path, replace, monkeypatch).last = 3
    read()
    assert all(torch.equal(value, undisturbed[name]) for name, value in load(out).items())
    assert load(path.parent).keys() == {"model.norm.weight"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say when a file was last changed")
def test_a_time_that_is_set_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = full(tmp_path / "inputs")

    def rewrite_unseen(path: Path) -> None:
        before = path.stat()
        rewrite(path)
        while path.stat().st_ctime_ns == before.st_ctime_ns:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns

    Harm(path, rewrite_unseen, monkeypatch).last = 3
    with pytest.raises(FormatError, match="changed while it was read"):
        read()
    assert not remains(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody rename or remove an open file")
@pytest.mark.parametrize(
    "how",
    [
        lambda path: path.chmod(0o444),
        lambda path: path.with_name("link").hardlink_to(path),
        lambda path: path.rename(path.with_name("moved")),
        lambda path: path.unlink(),
    ],
    ids=["chmod", "link", "rename", "remove"],
)
def test_what_changes_no_byte_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], None]
) -> None:
    path, read = full(tmp_path / "inputs")
    before = path.stat().st_ctime_ns

    def changed(path: Path) -> None:
        held = os.open(path, os.O_RDONLY)
        while os.fstat(held).st_ctime_ns == before:  # until the clock of files ticks
            path.chmod(os.fstat(held).st_mode & 0o777)
        how(path)
        os.close(held)

    harm = Harm(path, changed, monkeypatch)
    harm.last = 3
    read()
    assert harm.reads > 3 and out.is_dir()


def test_what_is_replaced_is_not_noted_as_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store notes the hash of what it merges: not of a file that took its place meanwhile."""
    path, read = added(tmp_path / "inputs")
    other = checkpoint(tmp_path / "other", 2)[1][1] / "model.safetensors"
    hashed = step.sha256_of

    def sha256_of(file: Path) -> str:
        if file == path:
            other.replace(path)
        return hashed(file)

    monkeypatch.setattr(step, "sha256_of", sha256_of)
    with pytest.raises(FormatError, match="changed while it was read"):
        read()
    assert not ContinualStore(tmp_path / "inputs" / "store").manifest().steps


def test_a_pool_keeps_what_it_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that changes between its audit and its copy is not kept, and the others are."""
    base, made = adapters(tmp_path / "inputs", 3)
    plain = files._copy

    def copy(source: Path, *rest: object) -> None:
        plain(source, *rest)  # type: ignore[arg-type]
        if source == made[1] / "adapter_model.safetensors":
            rewrite(source)

    for path in made:
        os.utime(path / "adapter_model.safetensors", ns=(0, 0))
    monkeypatch.setattr(files, "_copy", copy)
    pool = Pool.create(tmp_path / "pool", base, ["tiny/base"])
    pool.build([each for path in made for each in candidates_in(path)])
    kept = {Path(entry.name).name: entry.folder is not None for entry in pool.index.entries()}
    assert kept == {"adapter0": True, "adapter1": False, "adapter2": True}
    assert pool.index.entry("adapter1").verdict == "rejected"
    assert any("changed while it was read" in found.reason for found in pool.index.entry("adapter1").findings)
    assert len(list((tmp_path / "pool" / "adapters").iterdir())) == 2
