"""Names and addresses of models: what they mean, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from merging.errors import InputError
from merging.hub.address import hub_address
from merging.hub.open_model import open_model


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "empty name"),
        ("~nobody-of-this-name/model", "no such file"),
        ("x" * 5000, "cannot be looked for"),
        ("https://[::1/a/b", "is not an address"),
        ("a\0b", "no such file"),
    ],
)
def test_names_that_are_none(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        open_model(name)


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"gone: is a link to nowhere, which leads to no file or folder$"):
        open_model(tmp_path / "gone")


@pytest.mark.parametrize("revision", ["main", "refs/pr/3", "feature%2Fx", "refs%2F", "100%25"])
def test_addresses_mean_what_they_print(revision: str) -> None:
    address = hub_address(f"hf://org/name@{revision}/folder")
    assert address is not None and hub_address(f"hf://{address}") == address
    assert str(address) == f"org/name@{revision}/folder"
