"""``merge rerun``: the same bytes from the recipe of an output, or a refusal that names the source that changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import merging
from merging.api import rerun
from support.commands import ok, refused
from support.tiny import adapters, checkpoint, fine_tune, identical, load, save

OUTPUTS = {
    "a mean": "--method linear tuned0 tuned1 -o out",
    "shards": "--method ties --base base tuned0 tuned1 --density 0.3 --shard-size 2kB -o out",
    "random masks": "--method dare+task_arithmetic --base base tuned0 tuned1 --drop 0.5 --seed 3 -o out",
    "a chain": "--method lines+ties --base base tuned0 tuned1 --density 0.5 -o out",
    "another type": "--method slerp tuned0 tuned1 --t 0.2:0.8 --dtype bfloat16 -o out",
    "a bare file": "--method linear tuned0/model.safetensors tuned1/model.safetensors -o out.safetensors",
    "an adapter": "--method linear more/adapter0 more/adapter1 -o out",
    "an adapter of another rank": "--method ties more/adapter0 more/adapter1 --rank 2 -o out",
    "an adapter's file": "--method lines more/adapter0 more/adapter1 -o out.safetensors",
    "a baked adapter": "--method linear --as model --base more/base more/adapter0 -o out",
    "layers of two models": "stack tuned0 0:2 tuned1 1:3 -o out",
    "a recipe in a recipe": "run tree.yml -o out",
    "stages of mergekit": "run stages.yml -o out",
}

RECIPES = {
    "tree.yml": "models: [{models: [tuned0, tuned1], method: slerp}, base]\nmethod: ties\nbase: base\n",
    "stages.yml": """\
name: first
merge_method: linear
models: [{model: tuned0}, {model: tuned1}]
parameters: {weight: [0.2, 0.8]}
---
merge_method: task_arithmetic
base_model: base
models: [{model: first, parameters: {weight: 0.7}}]
dtype: bfloat16
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with models, adapters of another model, and recipes."""
    checkpoint(tmp_path)
    adapters(tmp_path / "more", 2)
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(path: Path) -> dict[str, bytes]:
    """Return the bytes of all files."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_is_made_again_with_the_same_bytes(folder: Path, kind: str) -> None:
    ok(*OUTPUTS[kind].split())
    out = folder / OUTPUTS[kind].split()[-1]
    again = folder / f"again{out.suffix}"
    done = ok("rerun", out, "-o", again)
    assert content(again) == content(out)
    assert f"{again} has the same bytes as {out}" in done.stderr


def test_an_output_can_replace_itself(folder: Path) -> None:
    ok(*OUTPUTS["a mean"].split())
    before = content(folder / "out")
    assert "exists already" in refused("rerun", "out", "-o", "out")
    assert "out has the same bytes as before" in ok("rerun", "out", "-o", "out", "--overwrite").stderr
    assert content(folder / "out") == before


def test_a_source_that_changed_is_refused_and_named(folder: Path) -> None:
    ok(*OUTPUTS["a mean"].split())
    save(folder / "tuned1", fine_tune(load(folder / "base"), 7))
    message = refused("rerun", "out", "-o", "again")
    assert "tuned1 has other weights than then" in message
    assert "--allow-changed" in message
    assert not (folder / "again").exists()
    done = ok("rerun", "out", "-o", "again", "--allow-changed")
    assert "again has other bytes than out: its sources changed" in done.stderr
    assert not identical(load(folder / "again"), load(folder / "out"))


def test_a_tokenizer_that_changed_is_refused(folder: Path) -> None:
    ok(*OUTPUTS["a mean"].split())
    (folder / "tuned0" / "tokenizer_config.json").write_text("{}")
    assert "tuned0 has the same weights, but another config or tokenizer" in refused("rerun", "out", "-o", "again")


def test_a_source_that_moved_is_named_by_its_place(folder: Path) -> None:
    ok(*OUTPUTS["a mean"].split())
    shutil.move(folder / "tuned0", folder / "elsewhere")
    message = refused("rerun", "out", "-o", "again")
    assert "tuned0, a source of out/model.safetensors, is not at hand" in message
    assert "--source tuned0=PATH" in message
    ok("rerun", "out", "-o", "again", "--source", "tuned0=elsewhere")
    assert load_bytes("again") == load_bytes("out")
    assert "names no tuned2 (did you mean" in refused("rerun", "out", "--source", "tuned2=x")
    assert "write NAME=PATH" in refused("rerun", "out", "--source", "tuned0")


def load_bytes(folder: str) -> bytes:
    """Return the weights with their header, which has the names of the sources."""
    return (Path(folder) / "model.safetensors").read_bytes()


def test_sources_are_found_next_to_the_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(*OUTPUTS["a mean"].split())
    (folder / "inside").mkdir()
    monkeypatch.chdir(folder / "inside")
    ok("rerun", "../out", "-o", "again")
    assert load_bytes("again") == load_bytes("../out")


def test_of_two_models_of_one_name_the_source_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(*OUTPUTS["a mean"].split())
    save(folder / "inside" / "tuned0", fine_tune(load(folder / "base"), 7))
    monkeypatch.chdir(folder / "inside")
    ok("rerun", "../out", "-o", "again")
    assert load_bytes("again") == load_bytes("../out")


def test_bytes_that_differ_are_noticed(folder: Path) -> None:
    ok(*OUTPUTS["a mean"].split())
    file = folder / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert "warning: again has other bytes than out" in ok("rerun", "out", "-o", "again").stderr


def test_an_output_that_cannot_be_read_is_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(*OUTPUTS["a mean"].split())
    plain = rerun.hash_weights

    def hash_weights(path: Path) -> tuple[bytes, ...]:
        if path.name == "again":
            raise OSError(5, os.strerror(5), str(path))
        return plain(path)

    monkeypatch.setattr(rerun, "hash_weights", hash_weights)
    reason = "warning: again is in place, and cannot be compared with out: Input/output error"
    assert reason in ok("rerun", "out", "-o", "again").stderr


def test_another_version_is_noticed(folder: Path) -> None:
    ok(*OUTPUTS["a bare file"].split())
    file = folder / "out.safetensors"
    version = merging.__version__.encode()
    file.write_bytes(file.read_bytes().replace(b'"' + version + b'"', b'"' + b"0" * len(version) + b'"', 1))
    assert f"and this is {merging.__version__}" in ok("rerun", "out.safetensors", "-o", "again.safetensors").stderr


def test_a_card_is_enough(folder: Path) -> None:
    ok(*OUTPUTS["shards"].split())
    shutil.copy(folder / "out" / "README.md", folder / "card.md")
    done = ok("rerun", "card.md", "-o", "again")
    assert "states no keys of its sources" in done.stderr
    assert identical(load(folder / "again"), load(folder / "out"))


MERGEKIT = """\
merge_method: slerp
base_model: tuned0
models:
- model: tuned1
parameters: {t: 0.25}
dtype: float32
"""


@pytest.mark.parametrize("card", [False, True])
def test_outputs_of_mergekit_state_their_recipe(folder: Path, card: bool) -> None:
    """mergekit leaves its recipe in a file and on the card; a card alone is enough."""
    merging.load_recipe(MERGEKIT).run("other")
    shutil.rmtree(folder / "out", ignore_errors=True)
    save(folder / "out", load(folder / "other"))
    if card:
        (folder / "out" / "README.md").write_text(f"---\ntags:\n- mergekit\n---\n# Mine\n\n```yaml\n{MERGEKIT}\n```\n")
    else:
        (folder / "out" / "mergekit_config.yml").write_text(MERGEKIT)
    place = "out/README.md, line 8" if card else "out/mergekit_config.yml"
    (facts,) = json.loads(ok("inspect", "out", "--json").stdout)
    assert (facts["merged_by"], facts["merged_from"], facts["recipe"]) == ("slerp", ["tuned0", "tuned1"], place)
    assert f"{place} states no keys of its sources" in ok("rerun", "out", "-o", "again").stderr
    assert identical(load(folder / "again"), load(folder / "other"))


def test_keys_that_mergekit_ignores_are_ignored_where_asked(folder: Path) -> None:
    save(folder / "out", load(folder / "base"))
    (folder / "out" / "mergekit_config.yml").write_text(MERGEKIT + "int8: true\n")
    assert "out/mergekit_config.yml, line 7: a recipe has no key 'int8'" in refused("rerun", "out", "-o", "again")
    ok("rerun", "out", "-o", "again", "--lenient")


def test_an_output_cannot_name_a_file_to_read_as_its_template(folder: Path) -> None:
    """Else an output of a stranger could copy any file with braces, such as one of passwords, into the new output."""
    (folder / "secret.json").write_text('{"password": "x"}')
    save(folder / "out", load(folder / "base"))
    (folder / "out" / "mergekit_config.yml").write_text(MERGEKIT + f"chat_template: {folder}/secret.json\n")
    assert "states the chat template by the name of a file" in refused("rerun", "out", "-o", "again")
    assert not (folder / "again").exists()


def test_stages_on_a_card_are_put_together(folder: Path) -> None:
    stage = MERGEKIT.replace("merge_method", "name: first\nmerge_method")
    last = "merge_method: slerp\nbase_model: base\nmodels:\n- model: first\nparameters: {t: 0.5}"
    (folder / "card.md").write_text(
        f"# Mine\n```yaml\n{stage}```\nand then\n\n  ```yaml\n  {last.replace(chr(10), chr(10) + '  ')}\n  ```\n"
    )
    done = ok("convert", "card.md")
    assert done.stdout.count("method: slerp") == 2


def test_a_recipe_on_a_card_that_is_not_understood_is_none(folder: Path) -> None:
    (folder / "base" / "README.md").write_text("```yaml\nmerge_method: nothing\nmodels:\n- model: a\n```\n")
    (facts,) = json.loads(ok("inspect", "base", "--json").stdout)
    assert facts["merged_by"] is None
    assert "README.md, line 2" in refused("rerun", "base")


def test_what_states_no_recipe_is_refused(folder: Path) -> None:
    assert "states no recipe" in refused("rerun", "base")
    (folder / "two.md").write_text("```yaml\nmodels: [a]\nmethod: linear\n```\n" * 2)
    assert "two.md: holds 2 recipes, in lines 2, 6" in refused("rerun", "two.md")
    assert "no such file" in refused("rerun", "nothing.md")


def test_python_makes_the_same(folder: Path) -> None:
    merging.merge(["tuned0", "tuned1"], method="linear", output="out")
    merged = merging.rerun("out", output="again")
    assert merged.notices[-1] == "again has the same bytes as out"
    assert load_bytes("again") == load_bytes("out")


def test_json_and_dry_run(folder: Path) -> None:
    ok(*OUTPUTS["a mean"].split())
    assert json.loads(ok("rerun", "out", "--dry-run", "--json").stdout)["models"] == ["tuned0", "tuned1"]
    assert not (folder / "merged").exists()
    notices = json.loads(ok("rerun", "out", "-o", "again", "--json").stdout)["notices"]
    assert "again has the same bytes as out" in notices
