"""What a store holds comes out as a model or an adapter that others load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merging
from merging.continual import ContinualStore
from support.adapters import QUIRKS, assert_close, baked, reload
from support.diffusion_models import build, factors, on_disk, quietly
from support.stores import (
    Models,
    export,
    grown,
    ok,
    run,
    said,
    unchanged,
)
from support.tiny import identical, load

pytestmark = QUIRKS


def test_export_as_model_loads_in_transformers(lora: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", lora)
    merged = store.export(tmp_path / "out", threads=1)
    assert (merged.kind, merged.path) == ("model", tmp_path / "out")
    assert_close(reload(tmp_path / "out").state_dict(), load(tmp_path / "out"), 0)
    facts = json.loads(ok("export", store.path, "-o", tmp_path / "half", "--dtype", "bfloat16", "--json"))
    assert (facts["kind"], facts["path"]) == ("model", str(tmp_path / "half"))
    assert {value.dtype for value in load(tmp_path / "half").values()} == {torch.bfloat16}


def test_export_as_adapter_loads_in_peft(lora: Models, tmp_path: Path) -> None:
    store = grown(tmp_path / "store", Models(lora.base, lora.tuned[:4]))
    wanted = export(store, tmp_path / "model")
    printed = ok("export", store.path, "-o", tmp_path / "adapter", "--as", "adapter")
    assert re.search(r"adapter of rank \d+", printed)
    assert_close(baked(lora.base, tmp_path / "adapter"), wanted)
    small = store.export(tmp_path / "small", kind="adapter", rank=2, threads=1)
    assert_truncated(lora.base, wanted, baked(lora.base, tmp_path / "small"), 2, small.discarded, ("_proj.weight",))
    stated = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (lora.tuned[0], tmp_path / "small")
    ]
    assert stated[1]["base_model_name_or_path"] == stated[0]["base_model_name_or_path"]


def test_store_of_full_models_as_adapter(lora: Models, tmp_path: Path) -> None:
    """Matrices become factors of the rank, everything else saved modules."""
    store = grown(tmp_path / "store", Models(lora.base, lora.tuned[5:]))
    wanted = export(store, tmp_path / "model")
    assert "choose a rank with --rank" in said("export", store.path, "-o", tmp_path / "adapter", "--as", "adapter")
    merged = store.export(tmp_path / "adapter", kind="adapter", rank=4, threads=1)
    assert merged.rank == 4
    factored = ("_proj.weight", "lm_head.weight")
    assert_truncated(lora.base, wanted, baked(lora.base, tmp_path / "adapter"), 4, merged.discarded, factored)
    printed = run("export", store.path, "-o", tmp_path / "again", "--as", "adapter", "--rank", 4).stderr
    assert re.search(r"the rank discards \d+\.\d% of the energy of the change on average", printed)


def assert_truncated(
    base: Path,
    wanted: dict[str, torch.Tensor],
    got: dict[str, torch.Tensor],
    rank: int,
    discarded: dict[str, float],
    factored: tuple[str, ...],
) -> None:
    """Linear weights have a change of this rank that loses next to nothing more than the best, and the loss is told;
    all else is whole."""
    told = {name.removesuffix(".weight"): share for name, share in discarded.items()}
    for name, before in load(base).items():
        change, kept = (values[name].double() - before.double() for values in (wanted, got))
        if not name.endswith(factored):
            assert_close({name: kept}, {name: change})
        elif change.any():
            values = torch.linalg.svdvals(change).square()
            lost = float((change - kept).norm().square() / values.sum())
            assert int(torch.linalg.matrix_rank(kept, atol=1e-6)) <= rank
            assert lost <= 1.01 * float(values[rank:].sum() / values.sum()) + 1e-9
            assert told.get(name.removesuffix(".weight"), 0.0) == pytest.approx(lost, abs=1e-4)


def test_exports_that_are_refused(full: Models, tmp_path: Path) -> None:
    store = ContinualStore.create(tmp_path / "store", base=full.base)
    assert "holds no model yet" in said("export", store.path, "-o", tmp_path / "out")
    store.add(full.tuned[0])
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for words, told in (
        ([tmp_path / "there"], "exists already"),
        ([store.path, "--overwrite"], "would replace the input"),
        ([full.base, "--overwrite"], "would replace the input"),
        ([tmp_path / "out", "--rank", 3], "--rank: only a merged adapter has ranks"),
        ([tmp_path / "file" / "where"], "file is not a folder"),
    ):
        with unchanged(store.path):
            assert told in said("export", store.path, "-o", *words)
    assert not (tmp_path / "out").exists()


def test_export_stands_a_state_that_goes(full: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer may add a step and remove the old state between the manifest and the state that it names."""
    store = grown(tmp_path / "store", full, 1, "task_arithmetic")
    opens, writes = merging.continual.view.open_state, [lambda: (store.add(full.tuned[1]), store.gc(1))]

    def open_late(*given: Any) -> Any:
        if writes:
            writes.pop()()
        return opens(*given)

    monkeypatch.setattr("merging.continual.view.open_state", open_late)
    store.export(tmp_path / "out")
    grown(tmp_path / "other", full, 2, "task_arithmetic").export(tmp_path / "wanted")
    assert identical(load(tmp_path / "out"), load(tmp_path / "wanted"))


@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris"])
def test_store_of_kohya_files(tmp_path: Path, prefix: str) -> None:
    """What programs of diffusion models call the tensors stays known from state to state, as the batch names it."""
    base = tmp_path / "base"
    with quietly():
        build("sd").save_pretrained(base)
    queries = {name: tuple(value.shape) for name, value in on_disk(base).items() if ".attn1.to_q." in name}
    modules = {f"{prefix}_{name[5:-7].replace('.', '_')}": (shape, 4.0) for name, shape in queries.items()}
    files = [factors(tmp_path / f"{seed}.safetensors", modules, seed) for seed in (1, 2)]
    store = ContinualStore.create(tmp_path / "store", base=base, method="task_arithmetic")
    for file in files:
        store.add(file, threads=1)
    store.export(tmp_path / "grown.safetensors", kind="adapter", threads=1)
    merging.merge(files, method="task_arithmetic", base=base, output=tmp_path / "batch.safetensors", threads=1)
    own, batch = (load_file(tmp_path / f"{name}.safetensors") for name in ("grown", "batch"))
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in batch.items()}
    assert {name.partition(".")[0] for name in own} == modules.keys()
    for module in modules:
        one, other = (each[f"{module}.lora_up.weight"] @ each[f"{module}.lora_down.weight"] for each in (own, batch))
        assert torch.allclose(one, other, atol=1e-6)
