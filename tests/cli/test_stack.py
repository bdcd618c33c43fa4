"""``merge stack``: words, the recipe, the output, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from torch import equal

from support.commands import ok, refused
from support.tiny import CONFIG, load, model, save


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the models ``a`` and ``b`` of four blocks."""
    for seed, name in enumerate("ab"):
        save(tmp_path / name, model(seed, layers=4), {**CONFIG, "num_hidden_layers": 4})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_blocks_are_repeated(folder: Path) -> None:
    said = ok("stack", "a", "0:3", "1:4", "-o", "out")
    assert "out: model, 1 model by passthrough" in said.stdout
    got, want = load(folder / "out"), load(folder / "a")
    for place, index in enumerate([0, 1, 2, 1, 2, 3]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert equal(got[name.format(place)], want[name.format(index)])
    assert json.loads((folder / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    assert "layers        model.layers: 6" in ok("inspect", "out").stdout


def test_its_recipe_runs(folder: Path) -> None:
    text = ok("stack", "a", "0:3", "b", "1:4", "--dtype", "bfloat16", "--recipe-only").stdout
    assert yaml.safe_load(text) == {
        "stack": [{"model": "a", "layers": "0:3"}, {"model": "b", "layers": "1:4"}],
        "dtype": "bfloat16",
    }
    (folder / "recipe.yml").write_text(text)
    ok("run", "recipe.yml", "-o", "by-recipe")
    ok("stack", "a", "0:3", "b", "1:4", "--dtype", "bfloat16", "-o", "by-words")
    one, other = load(folder / "by-recipe"), load(folder / "by-words")
    assert all(equal(one[name], other[name]) for name in one | other)
    for name in ("README.md", "config.json"):
        assert (folder / "by-recipe" / name).read_bytes() == (folder / "by-words" / name).read_bytes()
    card = (folder / "by-words" / "README.md").read_text()
    assert "2 models merged by `passthrough`:\n\n- `a` (licence: not stated)\n- `b` (licence" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(text)


def test_blocks_that_are_repeated_are_scaled(folder: Path) -> None:
    words = ("stack", "a", "0:3", "1:4", "--scale", "up_proj=0", "--scale", "layernorm=0.5")
    scale = {"up_proj": 0.0, "layernorm": 0.5, "*": 1.0}
    assert yaml.safe_load(ok(*words, "--recipe-only").stdout)["stack"] == [
        {"model": "a", "layers": "0:3"},
        {"model": "a", "layers": "1:3", "scale": scale},
        {"model": "a", "layers": "3:4"},
    ]
    ok(*words, "-o", "out")
    got, want = load(folder / "out"), load(folder / "a")
    assert not got["model.layers.3.mlp.up_proj.weight"].any()
    assert got["model.layers.5.mlp.up_proj.weight"].any()
    assert equal(got["model.layers.4.input_layernorm.weight"], want["model.layers.2.input_layernorm.weight"] * 0.5)


def test_a_plan_reads_no_values(folder: Path) -> None:
    shown = ok("stack", "a", "0:3", "1:4", "-o", "out", "--dry-run").stdout
    assert "passthrough: 1 model into the model out" in shown
    assert "a[0:3] + a[1:4]: 15 of 15 tensors matched" in shown
    facts = json.loads(ok("stack", "a", "0:3", "-o", "out", "--dry-run", "--json").stdout)
    assert facts["models"] == [{"stack": [{"model": "a", "layers": "0:3"}]}] or facts["models"] == [
        {"model": "a", "layers": "0:3"}
    ]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a 0:5", "a: has 4 blocks (model.layers.0 to model.layers.3), and 0:5 is asked for"),
        ("a 2:2", "stack.0.layers = '2:2': is empty: a range has the first block, and the block behind the last"),
        ("a 3:1", "stack.0.layers = '3:1': is reversed: a range has"),
        ("a", "a: no range of blocks follows this model: write 0:8 behind it"),
        ("a 0:2 b", "b: no range of blocks follows this model"),
        ("0:2 a", "0:2: a range of blocks follows the model that it is taken from: write MODEL 0:2"),
        ("a 0-3", "a: no range of blocks follows this model"),
        ("c 0:3", "c: there is no such file or folder"),
        ("a 0:2 --scale x", "--scale x: is no number by name: write --scale o_proj=0"),
        ("a 0:2 --scale x=y", "--scale x=y: is no number by name"),
        ("a 0:2 --scale up_proj=0", "--scale multiplies blocks that are repeated, and none is: leave it out"),
        ("a 0:2 1:3 --scale up_prj=0", "'up_prj' in scale names no tensor (did you mean 'up_proj'?): a pattern"),
        ("a 0:2 1:3 --scale up_proj=nan", "merge stack: stack.1.scale = {'up_proj': nan"),
        ("a encoder=0:2", "a: has no stack of blocks 'encoder': model.layers (4 blocks)"),
        ("a 0:2 -o a", "the output would replace the input"),
    ],
)  # fmt: skip
def test_what_is_refused(folder: Path, words: str, message: str) -> None:
    assert message in refused("stack", *words.split(), *([] if "-o" in words else ["-o", "out"]))
    assert not (folder / "out").exists()
