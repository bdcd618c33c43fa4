"""What a store is made of, and what can be seen of it."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from merging.continual import ContinualStore
from merging.display.tables import format_size
from merging.errors import FormatError, OptionError
from support.adapters import QUIRKS
from support.stores import (
    Models,
    contents,
    grown,
    ok,
    said,
    unchanged,
)
from support.tiny import fine_tune, load, save

pytestmark = QUIRKS


def test_status_and_log(full: Models, lora: Models, tmp_path: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=lora.base, max_rank=9)
    facts = json.loads(ok("status", store.path, "--json"))
    assert (facts["steps"], facts["holds"], facts["method"]) == ([], ["nothing yet"], "opcm")
    assert json.loads(ok("log", store.path, "--json")) == []
    for path in lora.tuned[:2]:
        store.add(path)
    facts = json.loads(ok("status", store.path, "--json"))
    assert facts == store.status()
    assert (facts["base"], facts["max_rank"]) == (str(lora.base.resolve()), 9)
    assert [step["kind"] for step in facts["steps"]] == ["adapter", "adapter"]
    table = ok("status", store.path)
    assert table.startswith(f"{store.path}: 2 models by opcm, on {lora.base.resolve()}\n")
    assert all(str(path) in table for path in lora.tuned[:2])
    size = sum(path.stat().st_size for path in sorted((store.path / "states").iterdir())[-1].iterdir())
    assert f"  a state of {format_size(size)} (sum)\n" in table
    assert f"  an export multiplies the merged changes by {facts['scale']:.4g}\n" in table
    assert "the state was removed" not in table
    assert [step["number"] for step in json.loads(ok("log", store.path, "--json"))] == [2, 1]
    assert ok("log", store.path).startswith("step 2  20")


def test_plot(full: Models, tmp_path: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    assert "holds no model yet" in said("plot", store.path, "-o", tmp_path / "a.png")
    store.add(full.tuned[0])
    store.add(full.tuned[1])
    for ending, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        output = tmp_path / f"plot{ending}"
        assert ok("plot", store.path, "-o", output) == f"{output}\n"
        assert output.read_bytes().startswith(begin)
    assert "a plot is a .png, .svg or .pdf" in said("plot", store.path, "-o", tmp_path / "a.txt")
    assert "cannot be written" in said("plot", store.path, "-o", output / "a.png")


def test_plot_shows_negative_cosines(full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that undoes most of the merge so far."""
    base = load(full.base)
    large, undone = fine_tune(base, 5), fine_tune(base, 5)
    undone = {name: base[name] - 0.5 * (large[name] - base[name]) for name in base}
    models = Models(full.base, [save(tmp_path / "large", large), save(tmp_path / "undone", undone)])
    store = grown(tmp_path / "store", models, None, "task_arithmetic")
    assert store.manifest().steps[-1].cosine < -0.9
    drawn = []
    plain = Figure.savefig

    def keep(self: Any, *args: Any, **options: Any) -> None:
        drawn.append(self)
        plain(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    ok("plot", store.path, "-o", tmp_path / "plot.svg")
    for panel in drawn[0].axes:
        low, high = panel.get_ylim()
        assert all(low <= value <= high for line in panel.lines for value in line.get_ydata())


def test_layout_of_the_manifest(full: Models, tmp_path: Path) -> None:
    """Other programs read it, and later versions must: what changes here is a new schema."""
    store = ContinualStore.create(tmp_path / "store", base=full.base, method="ties", density=0.5)
    store.add(full.tuned[0])
    manifest = json.loads((store.path / "manifest.json").read_text())
    checksum = manifest.pop("checksum")
    assert checksum == sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (step,) = manifest.pop("steps")
    base = manifest.pop("base")
    assert manifest.pop("parameters")["density"] == 0.5
    assert manifest == {"schema_version": 1, "method": "ties", "max_rank": None, "refused": []}
    assert base.keys() == {"path", "key", "sha256"}
    assert base["sha256"].keys() == {"model.safetensors"}
    assert step.keys() == {
        "number", "source", "sha256", "kind", "stated_base", "time", "parts", "norm", "kept", "cosine", "merged",
        "rank", "factored", "full", "discarded", "licence", "notices",
    }  # fmt: skip
    assert step["parts"].keys() == {"positive", "negative", "positive-counts", "negative-counts"}
    for name, part in step["parts"].items():
        assert part.keys() == {"file", "sha256", "bytes"}
        assert re.fullmatch(rf"states/000001-[0-9a-f]{{12}}/{name}\.safetensors", part["file"])
        assert (store.path / part["file"]).stat().st_size == part["bytes"]
    assert sorted(path.name for path in store.path.iterdir()) == [".lock", "manifest.json", "states"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: {**m, "schema_version": 2}, "has the schema 2, and this version reads 1: use the newer one"),
        (lambda m: {**m, "schema_version": None}, "states no schema_version"),
        (lambda m: {**m, "surprise": 1}, "is not the manifest"),
        (lambda m: {key: value for key, value in m.items() if key != "base"}, "is not the manifest"),
        (lambda m: [m], "is not the manifest"),
    ],
)
def test_manifests_that_are_refused(full: Models, tmp_path: Path, spoil: Any, told: str) -> None:
    store = grown(tmp_path / "store", full, 1)
    file = store.path / "manifest.json"
    file.write_text(json.dumps(spoil(json.loads(file.read_text()))))
    for words in (["status"], ["add", full.tuned[1]], ["verify"], ["rollback", "--to", 0]):
        before = contents(store.path)
        assert told in said(words[0], store.path, *words[1:])
        assert contents(store.path) == before


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a store"):
        ContinualStore(tmp_path)
    assert "is not a store: create one with merge continual init" in said("add", tmp_path / "none", "x")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe not json")
    assert "is not the manifest of a store" in said("status", tmp_path)


def test_states_may_be_read_by_whom_the_store_may(full: Models, tmp_path: Path) -> None:
    """A state is made in a private folder; it does not stay private."""
    before = os.umask(0o022)
    try:
        store = grown(tmp_path / "store", full, 1)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in store.path.rglob("*") if path.is_dir()}
    assert modes == {0o755}


# ---- making one


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("opmc", {}, "did you mean 'opcm'"),
        ("tsv", {}, "a store cannot grow by tsv"),
        ("dare+ties", {}, r"a store cannot grow by dare\+ties"),
        ("lines+opcm", {}, r"a store cannot grow by lines\+opcm"),
        ("task_arithmetic", {"weights": [1, 2]}, "all have the weight 1"),
        ("task_arithmetic", {"weights": 0.5}, "all have the weight 1"),
        ("linear", {"normalize": False}, "normalize"),
        ("ties", {"scope": "tensor"}, "scope = model"),
        ("ties", {"density": [0.1, 0.2]}, "one density"),
        ("ties", {"density": 0.0}, "density"),
        ("opcm", {"alpha": 1.5}, "alpha"),
        ("opcm", {"mode": "sideways"}, "mode"),
        ("opcm", {"density": 0.5}, "density"),
        ("lines+task_arithmetic", {"scale": 0.5}, "scale must be 1 under lines"),
        ("opcm", {"max_rank": 0}, "max_rank = 0: at least 1 is needed"),
        ("magmax", {"max_rank": 3}, "max_rank"),
        ("ties", {"max_rank": 3}, "max_rank"),
    ],
)
def test_methods_that_are_refused(full: Models, tmp_path: Path, method: str, given: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        ContinualStore.create(tmp_path / "store", base=full.base, method=method, **given)
    assert not (tmp_path / "store").exists()


def test_bases_and_places_that_are_refused(full: Models, lora: Models, tmp_path: Path) -> None:
    for base, told in ((lora.tuned[0], "is an adapter"), (tmp_path / "none", "no such file"), (tmp_path, "weights")):
        assert told in said("init", tmp_path / "store", "--base", base)
        assert not (tmp_path / "store").exists()
    store = grown(tmp_path / "store", full, 1)
    with unchanged(store.path):
        assert "exists already" in said("init", store.path, "--base", full.base)
    assert "cannot be made" in said("init", full.base / "config.json" / "store", "--base", full.base)
    (tmp_path / "empty").mkdir()
    assert ok("init", tmp_path / "empty", "--base", full.base) == f"{tmp_path / 'empty'}: grows by opcm\n"
    words = ["--base", full.base, "-m", "ties", "--density", 0.4, "--json"]
    assert json.loads(ok("init", tmp_path / "ties", *words))["method"] == "ties"
    assert ContinualStore(tmp_path / "ties").manifest().parameters["density"] == 0.4
    assert "No such option" in said("init", tmp_path / "other", "--base", full.base, "--density", 0.4, code=2)
