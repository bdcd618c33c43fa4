"""Headers that are kept between the merges of a process."""

from __future__ import annotations

import os
import timeit
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging.sources import known_headers
from merging.sources.known_headers import KnownHeaders


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(known_headers, "_SETTLED", 0)


def write(path: Path, name: str, count: int = 1) -> Path:
    save_file({f"{name}{number}": torch.zeros(2) for number in range(count)}, path)
    return path


def test_a_file_that_stays_is_parsed_once(tmp_path: Path, settled: None) -> None:
    known, path = KnownHeaders(), write(tmp_path / "a.safetensors", "a")
    first = known.read(path)
    assert known.read(path) is first
    (tmp_path / "b.safetensors").symlink_to(path)
    assert known.read(tmp_path / "b.safetensors") is first


def test_a_file_that_changes_is_parsed_again(tmp_path: Path, settled: None) -> None:
    """Also one of the same size whose time of modification is set back."""
    known, path = KnownHeaders(), write(tmp_path / "a.safetensors", "a")
    before = path.stat()
    assert list(known.read(path).entries) == ["a0"]
    write(path, "b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert list(known.read(path).entries) == ["b0"]


def test_a_file_that_was_just_written_is_not_kept(tmp_path: Path) -> None:
    """A later change within the same tick of the file system's clock would not show."""
    known, path = KnownHeaders(), write(tmp_path / "a.safetensors", "a")
    assert known.read(path) is not known.read(path)


def test_the_headers_read_last_are_kept(tmp_path: Path, settled: None) -> None:
    known = KnownHeaders(most=1024)
    paths = [write(tmp_path / f"{number}.safetensors", "a", count=2) for number in range(3)]
    first, second, third = (known.read(path) for path in paths)
    assert known.read(paths[2]) is third
    assert known.read(paths[1]) is second
    assert known.read(paths[0]) is not first
    assert known.read(paths[1]) is second
    assert known.read(paths[2]) is not third
    large = write(tmp_path / "large.safetensors", "a", count=40)
    assert known.read(large) is not known.read(large)


def test_a_header_with_much_metadata_is_not_kept(tmp_path: Path, settled: None) -> None:
    known, path = KnownHeaders(most=1024), tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, path, {"text": "a" * 1024})
    assert known.read(path) is not known.read(path)
    save_file({}, path, {"text": "a" * 1024})
    assert known.read(path) is not known.read(path)


def test_many_small_headers_are_found_fast(tmp_path: Path, settled: None) -> None:
    """The time of one reading does not grow with the headers that are kept."""
    known, path = KnownHeaders(), write(tmp_path / "0.safetensors", "a")
    content = path.read_bytes()
    paths = [tmp_path / f"{number}.safetensors" for number in range(2000)]
    for each in paths:
        each.write_bytes(content)

    def seconds(count: int) -> float:
        return min(timeit.repeat(lambda: [known.read(each) for each in paths[:count]], number=1, repeat=3)) / count

    few = seconds(50)
    assert seconds(2000) < 5 * few
