"""What is added, what is refused with the store as it was, and what is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merging import os_calls
from merging.continual import ContinualStore
from merging.errors import InputError, MergingError, OutputError
from support.adapters import QUIRKS, assert_close, edit_tensors
from support.stores import (
    Models,
    at_once,
    contents,
    export,
    grown,
    ok,
    said,
    states,
    unchanged,
)
from support.tiny import fine_tune, load, model, save

pytestmark = QUIRKS


def test_the_same_content_again(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 2)
    copy = Path(shutil.copytree(full.tuned[0], tmp_path / "copy"))
    with unchanged(store.path):
        assert store.add(copy) is None
        told = ok("add", store.path, copy)
        assert "a model of the same content was added before: nothing to do (--again adds it)" in told
        assert json.loads(ok("add", store.path, copy, "--json")) == {"model": str(copy), "step": None}
    assert ok("add", store.path, copy, "--again").startswith(f"step 3: {copy}: change of norm ")
    wanted = at_once(tmp_path / "batch", full.base, [*full.tuned[:2], copy], "opcm")
    assert_close(export(store, tmp_path / "out"), wanted)


def test_adapters_of_other_settings_are_other_content(lora: Models, tmp_path: Path) -> None:
    """The config's scale is content as much as the factors are."""
    store = grown(tmp_path / "store", lora, 1)
    copy = Path(shutil.copytree(lora.tuned[0], tmp_path / "copy"))
    assert store.add(copy) is None
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    assert store.add(copy) is not None


def test_added_models_may_be_deleted(full: Models, tmp_path: Path) -> None:
    shutil.copytree(full.tuned[0], tmp_path / "first")
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    store.add(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    store.add(full.tuned[1])
    assert_close(export(store, tmp_path / "out"), at_once(tmp_path / "batch", full.base, full.tuned[:2], "opcm"))


def spoilt(folder: Path, path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model with other tensors."""
    tensors = load(path)
    edit(tensors)
    return save(folder / "spoilt", tensors)


NAME = "model.layers.1.mlp.up_proj.weight"


def _cut(folder: Path, models: Models) -> Path:
    copy = Path(shutil.copytree(models.tuned[0], folder / "cut"))
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    return copy


def _garbage(folder: Path, models: Models) -> Path:
    (folder / "garbage.safetensors").write_bytes(b"not a model at all" * 9)
    return folder / "garbage.safetensors"


def _empty(folder: Path, models: Models) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _one_value(value: float) -> Callable[[Path, Models], Path]:
    return lambda folder, models: spoilt(folder, models.tuned[0], lambda t: t[NAME].view(-1)[17:18].fill_(value))


SPOILT: dict[str, tuple[Callable[[Path, Models], Path], str]] = {
    "another model": (lambda f, m: save(f / "other", model(seed=9)), "hardly a fine-tune"),
    "other shapes": (lambda f, m: save(f / "wide", model(width=6)), "shape"),
    "fewer layers": (lambda f, m: save(f / "short", model(layers=2)), "lacks"),
    "a tensor of another shape": (
        lambda f, m: spoilt(f, m.tuned[0], lambda t: t.update({NAME: t[NAME][:-1].clone()})), "shape",
    ),
    "NaN": (_one_value(float("nan")), "not finite|NaN|nan"),
    "infinite": (_one_value(float("inf")), "not finite|inf"),
    "cut off": (_cut, "cut"),
    "no weights": (_garbage, "garbage.safetensors"),
    "empty folder": (_empty, "empty"),
    "nothing there": (lambda f, m: f / "missing", "no such file"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "told"), SPOILT.values(), ids=SPOILT)
def test_refused(full: Models, tmp_path: Path, make: Callable[[Path, Models], Path], told: str) -> None:
    path = make(tmp_path, full)
    for method in ("opcm", "ties"):
        store = grown(tmp_path / method, full, 1, method)
        with unchanged(store.path):
            with pytest.raises(MergingError, match=told) as refusal:
                store.add(path, threads=2)
            assert path.name in str(refusal.value)
    assert path.name in said("add", store.path, path)


def test_adapters_are_refused_for_their_reasons(lora: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", lora, 1)
    other, narrow, lost, spoilt = (Path(shutil.copytree(lora.tuned[1], tmp_path / name)) for name in "onls")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/other-base"}))
    edit_tensors(narrow, lambda t: {n: v[:, :-1] if "lora_A" in n else v for n, v in t.items()})
    edit_tensors(lost, lambda t: {n.replace("q_proj", "z_proj"): v for n, v in t.items()})
    edit_tensors(spoilt, lambda t: {n: v / 0 if "layers.2" in n else v for n, v in t.items()})
    with unchanged(store.path):
        for path, told in ((other, "some/other-base"), (narrow, "shape"), (lost, "z_proj"), (spoilt, "finite|NaN")):
            with pytest.raises(MergingError, match=told):
                store.add(path, threads=1)
    assert "--allow-different-bases" in said("add", store.path, other)
    ok("add", store.path, other, "--allow-different-bases")
    with unchanged(store.path), pytest.raises(InputError, match="hardly a fine-tune"):
        store.add(save(tmp_path / "random", {n: v + torch.randn_like(v) for n, v in load(lora.base).items()}))


def test_options_that_cannot_be_are_refused(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 1)
    with unchanged(store.path):
        for words, told in (
            (["--threads", 0], "threads = 0"),
            (["--device", "abacus"], "abacus"),
            (["--device", "cuda:77"], "77"),
            (["--max-memory", "1"], "is too little"),
        ):
            assert told in said("add", store.path, full.tuned[1], *words)
        assert "No such option" in said("add", store.path, full.tuned[1], "--alpha", 1, code=2)


def test_several_models_stop_at_the_first_that_is_refused(full: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", full, 1)
    assert "missing" in said("add", store.path, full.tuned[1], tmp_path / "missing", full.tuned[2])
    assert [step.source for step in store.manifest().steps] == [str(path.resolve()) for path in full.tuned[:2]]


@pytest.mark.parametrize("method", ["opcm", "ties"])
def test_full_disk(full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    store = grown(tmp_path / "store", full, 2, method)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((os_calls, "allocate"), (os, "pwrite"), (os, "fsync"), (os, "mkdir")):
        with monkeypatch.context() as patch, unchanged(store.path):
            patch.setattr(owner, name, fail)
            with pytest.raises(OutputError, match="No space left"):
                store.add(full.tuned[2], threads=1)
    store.add(full.tuned[2], threads=1)
    assert states(store.path) == states(grown(tmp_path / "other", full, 3, method).path)


def test_a_step_that_cannot_be_committed_leaves_no_state(
    full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk that has room for a state and none for the manifest."""
    store = grown(tmp_path / "store", full, 1)
    plain = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target.name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with unchanged(store.path), pytest.raises(OutputError, match="No space left"):
        store.add(full.tuned[1], threads=1)


def test_the_base_must_be_the_same(full: Models, tmp_path: Path) -> None:
    base = Path(shutil.copytree(full.base, tmp_path / "base"))
    store = grown(tmp_path / "store", Models(base, full.tuned), 1)
    before = contents(store.path)
    save(base, fine_tune(load(base), 77))
    for doing in (lambda: store.add(full.tuned[1]), lambda: store.export(tmp_path / "out")):
        with pytest.raises(InputError, match="no longer the base"):
            doing()
    assert ["no longer the base" in problem for problem in store.verify().problems] == [True]
    shutil.rmtree(base)
    with pytest.raises(InputError, match="base"):
        store.add(full.tuned[1])
    assert len(store.verify().problems) == 1
    assert contents(store.path) == before
