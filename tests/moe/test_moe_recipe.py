"""Recipes of mixtures: mergekit's schema, every mistake with its line, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import merging
from merging.cli.main import cli
from merging.errors import MergingError, MergingWarning
from merging.moe import MoeRecipe, load_moe_recipe

GOOD = """# two experts
base_model: base   # the attention's
gate_mode: hidden_avg
dtype: bfloat16
experts_per_token: 1
architecture: Mixtral
experts:
  - source_model: a
    positive_prompts:
      - "one"
    negative_prompts: ["two"]
    noise_scale: 0.1
    residual_scale: 0.5
  - source_model: {model: {path: org/b, revision: main}, lora: {path: org/lora}}
    positive_prompts: ["three"]
"""

MISTAKES = {
    "an unknown key": (
        "gate_mode:",
        "gatemode:",
        "line 3: a recipe of a mixture has no key 'gatemode' .did you mean 'gate_mode'",
    ),
    "an unknown key of an expert": (
        "    noise_scale",
        "    noise_scal",
        "line 12: an expert has no key 'noise_scal' .*noise_scale",
    ),
    "an unknown key of a model": (
        "revision: main",
        "revisoin: main",
        "line 14: a path has no key 'revisoin' .*'revision'",
    ),
    "an unknown mode": (
        "hidden_avg",
        "hidden_average",
        "line 3: gate_mode = 'hidden_average': there is no.*hidden_avg",
    ),
    "an unknown type": ("bfloat16", "bfloat", "line 4: dtype = 'bfloat': there is no.*did you mean 'bfloat16'"),
    "an architecture": ("Mixtral", "Mixtrall", "line 6: there is no architecture 'Mixtrall'.*did you mean 'mixtral'"),
    "too many a token": ("per_token: 1", "per_token: 3", "line 5: each token should reach 3 experts .* there are 2"),
    "none a token": ("per_token: 1", "per_token: 0", "line 5: experts_per_token = '0': should be at least 1"),
    "no rank": ("per_token: 1", "per_token: 1\nrank: -1", "line 6: rank = '-1': should be at least 1"),
    "no prompts": (
        '    positive_prompts: ["three"]\n',
        "",
        "line 14: expert 1 .org/b@main.org/lora. has no positive_prompts",
    ),
    "no base": ("base_model: base   # the attention's\n", "", "the recipe has no 'base_model'"),
    "no source": ("  - source_model: a\n    pos", "  - pos", "line 8: the expert has no 'source_model'"),
    "a number for a prompt": ('["three"]', "[3]", "line 15: experts.1.positive_prompts.0 = '3': should be text"),
    "a text for a number": (
        "noise_scale: 0.1",
        "noise_scale: much",
        "line 12: .*noise_scale = 'much': should be a number",
    ),
    "negative noise": ("noise_scale: 0.1", "noise_scale: -1", "line 12: .*noise_scale = '-1': should be at least 0"),
    "a scale without end": ("residual_scale: 0.5", "residual_scale: .inf", "line 13: .*residual_scale = 'inf'"),
    "a key twice": ("dtype: bfloat16", "gate_mode: random", "'gate_mode' stands twice"),
    "a recipe of a merge": (
        "gate_mode: hidden_avg",
        "merge_method: linear",
        "line 3: .*it belongs to a merge: use `merge run`",
    ),
    "no experts": ("experts:\n", "experts: []\nshared_experts:\n", "line 7: experts is empty"),
    "a base that is a list": (
        "base_model: base ",
        "base_model: [base] ",
        "line 2: base_model should name a model, and is",
    ),
    "smile's setting": ("architecture: Mixtral", "rank: 4", "line 6: rank is a setting of gate_mode: smile"),
    "prompts with smile": ("hidden_avg\n", "smile\n", "line 6: a mixture by smile has no architecture"),
    "a lora without a name": (
        "source_model: a\n",
        "source_model: a+\n",
        "line 8: .*one . joins a model and an adapter",
    ),
}


def test_the_schema(tmp_path: Path) -> None:
    (tmp_path / "moe.yml").write_text(GOOD)
    recipe = load_moe_recipe(tmp_path / "moe.yml")
    assert [str(each.source_model) for each in recipe.experts] == [str(tmp_path / "a"), "org/b@main+org/lora"]
    first = recipe.experts[0]
    assert (first.positive_prompts, first.negative_prompts) == (("one",), ("two",))
    assert (first.noise_scale, first.residual_scale) == (0.1, 0.5)
    assert recipe.base_model.model == str(tmp_path / "base")
    assert load_moe_recipe(recipe.to_yaml()) == recipe
    assert load_moe_recipe(recipe.to_dict()) == recipe
    assert load_moe_recipe(recipe) is recipe
    assert isinstance(recipe, MoeRecipe)
    smile = load_moe_recipe({"base_model": "base", "gate_mode": "smile", "experts": [{"source_model": "a"}] * 2})
    both = smile.model_copy(update={"experts_per_token": 2})
    assert (smile.experts_per_token, load_moe_recipe(both.to_yaml())) == (1, both)
    with pytest.raises(MergingError, match="each token should reach 3 experts"):
        load_moe_recipe(smile.model_copy(update={"experts_per_token": 3}))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path: Path, name: str) -> None:
    old, new, message = MISTAKES[name]
    assert old in GOOD
    (tmp_path / "moe.yml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(MergingError, match=message):
        load_moe_recipe(tmp_path / "moe.yml")


def test_unknown_keys_may_be_ignored(tmp_path: Path) -> None:
    (tmp_path / "moe.yml").write_text(GOOD.replace("dtype:", "tokenizer_source: union\ndtype:"))
    with pytest.warns(MergingWarning, match="line 4: a recipe of a mixture has no key 'tokenizer_source'.*ignored"):
        recipe = load_moe_recipe(tmp_path / "moe.yml", lenient=True)
    assert recipe.dtype == "bfloat16"


def test_a_recipe_in_the_wrong_command(tmp_path: Path) -> None:
    (tmp_path / "moe.yml").write_text(GOOD)
    code, text = run("run", tmp_path / "moe.yml", "-o", tmp_path / "out")
    assert code == 1 and "gate_mode" in text and "use `merge moe`" in text


def test_a_recipe_on_a_page(tmp_path: Path) -> None:
    """In the block of a model card."""
    (tmp_path / "README.md").write_text(f"# A model\n\n```yaml\n{GOOD}```\n\nText.\n")
    assert load_moe_recipe(tmp_path / "README.md").gate_mode == "hidden_avg"
    (tmp_path / "two.yml").write_text(f"{GOOD}---\n{GOOD}")
    with pytest.raises(MergingError, match="line 18: a recipe of a mixture is one document"):
        load_moe_recipe(tmp_path / "two.yml")


def test_prompts_that_are_all_the_same() -> None:
    experts = [{"source_model": name, "positive_prompts": ["x"]} for name in "ab"]
    with pytest.raises(MergingError, match="all experts have the same prompts"):
        load_moe_recipe({"base_model": "base", "experts": experts})
    assert load_moe_recipe({"base_model": "base", "experts": experts, "gate_mode": "random"}).gate_mode == "random"


def test_a_plus_in_a_path_that_exists(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    (tmp_path / "moe.yml").write_text(
        "base_model: a+b\ngate_mode: random\nexperts: [{source_model: a+b}, {source_model: c}]\n"
    )
    assert load_moe_recipe(tmp_path / "moe.yml").base_model.lora is None


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    return done.exit_code, done.output


def test_the_command(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the recipe are relative to its folder; a dry run touches nothing; errors write nothing."""
    file, out = dense / "llama" / "moe.yml", tmp_path / "out"
    values: dict[str, Any] = {
        "base_model": "base",
        "gate_mode": "cheap_embed",
        "experts": [{"source_model": n, "positive_prompts": [p]} for n, p in (("a", "one"), ("b", "cat"))],
    }
    file.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    code, text = run("moe", file, "-o", out, "--dry-run")
    assert code == 0 and "Mixtral: 2 experts into" in text and "writes" in text
    assert list(tmp_path.iterdir()) == []
    assert json.loads(run("moe", file, "-o", out, "--dry-run", "--json")[1])["architecture"] == "Mixtral"
    code, text = run("moe", file, "-o", out)
    assert code == 0 and "Mixtral of 2 experts, 42 tensors" in text and "from_pretrained" in text
    code, text = run("moe", file, "-o", out)
    assert code == 1 and "--overwrite" in text
    assert run("moe", file, "-o", out, "--overwrite", "--threads", "1", "--json")[0] == 0
    assert json.loads(run("inspect", out, "--json")[1])
    file.write_text(yaml.safe_dump({**values, "gate_mod": "random"}))
    code, text = run("moe", file, "-o", tmp_path / "other")
    assert code == 1 and "did you mean 'gate_mode'" in text and not (tmp_path / "other").exists()
    file.unlink()
    card = (out / "README.md").read_text()
    assert "gate_mode: cheap_embed" in card and "moe" in card
    assert merging.make_moe.__doc__


@pytest.mark.parametrize("gate_mode", ["hidden", "random", "smile"])
def test_a_mixture_is_made_again(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate_mode: str) -> None:
    """With the same bytes, also from models that were moved; and not from others."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        shutil.copytree(dense / "llama" / name, name)
    prompts = {} if gate_mode == "smile" else {"a": "one", "b": "cat"}
    experts = [
        {"source_model": name, **({"positive_prompts": [prompts[name]]} if prompts else {})} for name in ("a", "b")
    ]
    Path("moe.yml").write_text(yaml.safe_dump({"base_model": "base", "gate_mode": gate_mode, "experts": experts}))
    assert run("moe", "moe.yml", "-o", "one")[0] == 0
    shutil.move("a", "moved")
    code, text = run("rerun", "one", "-o", "two")
    assert code == 1 and "a, a model of one/model.safetensors, is not at hand" in text
    code, text = run("rerun", "one", "-o", "two", "--source", "a=moved")
    assert code == 0, text
    assert "two has the same bytes as one" in text
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    assert json.loads(run("rerun", "one", "-o", "two", "--source", "a=moved", "--dry-run", "--json")[1])["tensors"]
    code, text = run("rerun", "one", "-o", "three", "--source", "a=b")
    assert code == 1 and "has other weights than then" in text and not Path("three").exists()
    code, text = run("rerun", "one", "-o", "three", "--source", "a=b", "--allow-changed")
    assert code == 0 and "has other bytes than one" in text
    code, text = run("rerun", "one", "--source", "a=moved")
    assert code == 1 and "name it with -o" in text
