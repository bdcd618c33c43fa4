"""Records of sources in the headers of outputs: they show which model changed, and cost a few samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import merging
from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.plan.provenance import describe_change, parse_sources, record_source
from support.tiny import adapters, checkpoint, fine_tune, load, save


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base, tuned0 and tuned1."""
    checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sources(file: Path) -> list[dict[str, Any]]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["merging_sources"])


def test_every_weights_file_states_the_sources(folder: Path) -> None:
    merging.merge(["tuned0", "tuned1"], base="base", method="task_arithmetic", output="out", shard_size=2000)
    files = list(Path("out").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        stated = sources(file)
        assert [each["model"] for each in stated] == ["tuned0", "tuned1", "base"]
        assert len({each["weights"] for each in stated}) == 3
        assert len({each["files"] for each in stated}) == 1  # the same config
        assert {each["tensors"] for each in stated} == {9}
        assert {each["bytes"] for each in stated} == {sum(value.nbytes for value in load(Path("base")).values())}


def test_a_bare_file_and_an_adapter_state_theirs(folder: Path) -> None:
    adapters(folder / "more", 2)
    merging.merge(["more/adapter0", "more/adapter1"], method="linear", output="out.safetensors")
    assert [each["model"] for each in sources(folder / "out.safetensors")] == ["more/adapter0", "more/adapter1"]


def test_a_model_that_a_recipe_names_twice_is_stated_once(folder: Path) -> None:
    merging.merge(["tuned0", "base"], base="base", method="linear", output="out")
    assert [each["model"] for each in sources(folder / "out" / "model.safetensors")] == ["tuned0", "base"]


def test_changes_of_a_source_are_noticed(folder: Path) -> None:
    def record() -> Any:
        return record_source("tuned0", open_model("tuned0"))

    then, tensors = record(), load(Path("tuned0"))
    assert describe_change(then, record()) is None
    (folder / "tuned0" / "tokenizer_config.json").write_text("{}")
    assert "another config or tokenizer" in str(describe_change(then, record()))
    save(folder / "tuned0", fine_tune(tensors, 9))
    assert "other weights" in str(describe_change(then, record()))
    save(folder / "tuned0", {name: tensors[name] for name in list(tensors)[:-1]})
    assert "9 tensors" in str(describe_change(then, record()))
    assert "8 tensors" in str(describe_change(then, record()))


def test_moving_a_model_or_splitting_it_into_shards_changes_nothing(folder: Path) -> None:
    then = record_source("tuned0", open_model("tuned0"))
    save(folder / "moved", load(Path("tuned0")), shards=3)
    assert describe_change(then, record_source("tuned0", open_model("moved"))) is None


@pytest.mark.parametrize(
    "text",
    ["5", "null", '{"a"', "[" * 100_000, "[5]", "[{}]", '[{"model": [1]}]', '[{"model": "a", "bytes": "1"}]',
     '[{"model": "a", "tensors": null}]', '[{"model": "a", "weights": 1}]', '[{"model": "a", "size": 1}]'],
)  # fmt: skip
def test_a_header_whose_sources_are_no_records_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"^out: its list of sources is not understood: "):
        parse_sources(text, "out")
