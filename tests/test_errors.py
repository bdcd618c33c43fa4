"""Messages of errors can be printed, whatever a file holds, and are in our own words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merging
from merging.continual import ContinualStore
from merging.continual.manifest import read_manifest
from merging.errors import FormatError, MergingError
from merging.hub.open_model import open_model
from merging.plan.recipe_values import make_recipe
from merging.recycling.settings import make_settings
from support.paths import ROOT
from support.tiny import adapters, checkpoint

PYDANTIC = re.compile(
    r"Input |Field required|Extra inputs|[Vv]alid (string|integer|number|boolean|dictionary|list|tuple)|Unable to|"
    r"[Uu]nable to parse|instance of|should match pattern|validation error|Value error|object to extract|pydantic"
)
"""Phrases of pydantic's messages."""


def test_messages_can_be_printed() -> None:
    r"""What a file holds may be an escape of a terminal, half a character, or a book."""
    message = str(FormatError("a\x1b[2J\u202e\ud800\0 b\nc é 模型"))
    assert message == "a\\x1b[2J\\u202e\\ud800\\x00 b\\nc é 模型"
    assert len(str(FormatError("x" * 10**6))) < 6100


def damaged(value: Any) -> Iterator[Any]:
    """Copies of a document, each with one fault: a value of another kind, a missing key, or one too many."""
    if isinstance(value, dict):
        yield {**value, "surprise": 1}
        for key, each in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for other in damaged(each):
                yield {**value, key: other}
    elif isinstance(value, list) and value:
        for other in damaged(value[0]):
            yield [other, *value[1:]]
    yield from (other for other in (None, "x", -1, 1.5, [], {}, [None], 1e400) if type(other) is not type(value))
    yield from (-1, 1e400) if isinstance(value, (int, float)) else ("x",) if isinstance(value, str) else ()


def refusals(read: Callable[[Any], object], document: Any) -> list[str]:
    """What is said of damaged copies of a document, where they are refused."""

    def refusal(copy: Any) -> str:
        try:
            read(copy)
        except MergingError as error:
            return str(error)
        return ""

    return list(filter(None, map(refusal, damaged(document))))


def test_damaged_manifests_are_described_in_our_words(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path)
    ContinualStore.create(tmp_path / "store", base=base, method="task_arithmetic").add(tuned[0])
    file = tmp_path / "store" / "manifest.json"
    manifest = json.loads(file.read_text())

    def read(stated: Any) -> None:
        file.write_text(json.dumps(stated))
        read_manifest(file.parent)

    said = refusals(read, manifest)
    assert len(said) == len(list(damaged(manifest))) - 2 > 100  # the first stores had no checksum, and are read
    assert [each for each in said if PYDANTIC.search(each)] == []
    assert f"{file}: is not the manifest of a store, or is damaged: base.path: is missing" in said
    assert f"{file}: is not the manifest of a store, or is damaged: surprise: is not known here" in said


@pytest.mark.parametrize("coding", ["golomb", "bitmap"])
def test_damaged_packs_are_described_in_our_words(coding: Any, tmp_path: Path) -> None:
    _, (adapter,) = adapters(tmp_path, 1)
    pack = merging.compress(adapter, tmp_path / "pack.safetensors", coding=coding).path
    tensors = load_file(pack)
    with safe_open(pack, "pt") as found:
        manifest = json.loads(found.metadata()["merging_pack"])
    broken = tmp_path / "broken.safetensors"

    def read(stated: Any) -> None:
        save_file(tensors, broken, {"merging_pack": json.dumps(stated)})
        open_model(broken)

    said = refusals(read, manifest)
    assert len(said) > 50
    assert [each for each in said if PYDANTIC.search(each)] == []
    assert any("tensors.0.coding: should be 'raw', 'ternary', 'sparse', 'bands'" in each for each in said)


def test_wrong_settings_and_recipes_are_described_in_our_words() -> None:
    recipe = {"models": ["a", "b"], "base": "c", "method": "ties", "rank": 4, "dtype": "float16", "layers": 2}
    settings = {"rank": 4, "seed": 0, "dtype": "float32"}
    said = refusals(make_settings, settings) + [
        each
        for key in recipe
        for each in refusals(lambda value, key=key: make_recipe({**recipe, key: value}), recipe[key])
    ]
    assert len(said) > 20
    assert [each for each in said if PYDANTIC.search(each)] == []


def test_the_phrases_are_those_of_pydantic() -> None:
    """So that the tests above would fail on its messages."""
    from pydantic import BaseModel, ValidationError

    class Example(BaseModel, extra="forbid"):
        number: int
        text: str
        pairs: dict[str, tuple[int, ...]]

    with pytest.raises(ValidationError) as error:
        Example.model_validate({"number": "x", "text": torch.zeros(1), "surprise": 1})
    assert all(PYDANTIC.search(each["msg"]) for each in error.value.errors())
    users = [path.name for path in (ROOT / "merging").rglob("*.py") if re.search(r"""\["msg["']\]""", path.read_text())]
    assert users == ["errors.py"]
