"""A path that is too long for the system is one error, wherever a command takes a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import refused
from support.tiny import adapters, checkpoint

LONG = "x" * 5000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, adapters, and recipes that name what cannot be."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint(folder)
    adapters(folder / "loras", 2)
    (folder / "recipes").mkdir()
    (folder / "loop").symlink_to("loop")
    for name, path in (("long", LONG), ("nul", "a\\0b"), ("loop", "../loop"), ("fine", "../tuned1")):
        text = f'models: [../tuned0, "{path}"]\nmethod: linear\n'
        (folder / "recipes" / f"{name}.yml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "LONG",
        "help LONG",
        "-m linear LONG",
        "-m linear tuned0 LONG",
        "-m linear tuned0 tuned1 -o LONG",
        "-m linear tuned0 tuned1 -o new/LONG/out",
        "run recipes/long.yml",
        "run recipes/nul.yml",
        "run recipes/loop.yml",
        "run recipes/fine.yml recipes/nul.yml -o new",
        "run recipes/fine.yml recipes/loop.yml -o new",
        "inspect LONG",
        "verify loras/adapter0 --base LONG",
        "compare loras/adapter0 loras/adapter1 --html LONG.html",
        "compress LONG -o new.safetensors",
        "compress loras/adapter0 -o LONG.safetensors",
        "continual init LONG --base base",
        "continual status LONG",
        "pool build LONG loras/adapter0 --base base",
        "pool list LONG",
        "push LONG me/it",
        "recycle loras/adapter0 --base base --train LONG",
    ],
)
def test_names_that_no_file_can_have(words: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    text = refused(*(word.replace("LONG", LONG) for word in words.split()))
    assert text.startswith("Error: ")
    assert text.count("\n") == 1
    assert len(text) < 7000
    assert not (models / "new").exists()
