"""Open files: copies of what holds them."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest

from merging.sources.open_files import File


def test_copies_close_no_file_of_others(tmp_path: Path) -> None:
    """A descriptor that is closed twice may be another file's by then."""
    (tmp_path / "a").write_bytes(b"abc")
    file = File(tmp_path / "a")
    held = [file]
    for copied in (copy.copy(file), copy.deepcopy(held)[0]):
        assert copied is file
    with pytest.raises(TypeError, match="an open file cannot be pickled"):
        pickle.dumps(held)
    del copied
    number = file.fd
    del file, held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
