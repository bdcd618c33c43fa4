"""A base is a full model: whoever wants one refuses an adapter in its place, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import merging
from merging.errors import InputError
from merging.hub.open_model import open_base
from merging.pool import Pool
from support.paths import EXAMPLES

ADAPTER = EXAMPLES / "bbc"

READERS: dict[str, Callable[[Path], object]] = {
    "--base": lambda folder: open_base(ADAPTER, "--base"),
    "a merge": lambda folder: merging.merge([ADAPTER], base=ADAPTER, method="linear", output=folder / "out"),
    "a comparison": lambda folder: merging.compare([ADAPTER], base=ADAPTER),
    "a pack": lambda folder: merging.compress(ADAPTER, folder / "p.safetensors", base=ADAPTER),
    "a pool": lambda folder: Pool.create(folder / "pool", ADAPTER),
    "a store": lambda folder: merging.ContinualStore.create(folder / "store", base=ADAPTER, method="opcm"),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_adapter_is_no_base(reader: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is an adapter, and .* wants the full model that the others were trained"):
        READERS[reader](tmp_path)
    assert not list(tmp_path.iterdir())
