"""Models in object stores: read by ranges, pinned, and merged to the bytes of the same models on the disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors import safe_open
from safetensors.torch import save_file

import merging
from merging.api.inspect import inspect
from merging.errors import FormatError, InputError, OptionError, OutputError
from merging.hub.open_model import open_model
from merging.plan.mergekit.writing import write_documents
from merging.pool.candidates import candidates_in
from merging.sources import Adapter, Checkpoint
from support.object_stores import MemoryStore, memory_store
from support.tiny import adapters, checkpoint, fine_tune, identical, load, model, save

__all__ = ["memory_store"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", merging.errors.ResultWarning)
        yield


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_merge_of_a_store_has_the_bytes_of_a_merge_of_the_disk(memory_store: MemoryStore, tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path, 2)
    save(tmp_path / "sharded", fine_tune(model(), 7), shards=3)
    local = [*tuned, tmp_path / "sharded"]
    addresses = [memory_store.put(each) for each in local]
    options = {"method": "ties", "density": 0.5}
    merging.merge(local, base=base, output=tmp_path / "one", **options)
    merged = merging.merge(addresses, base=memory_store.put(base), output=tmp_path / "other", **options)
    assert identical(load(tmp_path / "one"), load(tmp_path / "other"))
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "other/config.json").read_bytes()
    assert merged.tensors == len(load(tmp_path / "one"))
    stated = header(tmp_path / "other/model.safetensors")
    assert json.loads(stated["merging_recipe"])["models"] == addresses
    sources = {each["model"]: each for each in json.loads(stated["merging_sources"])}
    assert set(sources["memory://box/sharded"]["etags"]) == {
        "config.json",
        *(f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")),
    }
    assert "memory://box/tuned0" in (tmp_path / "other/README.md").read_text()


def test_headers_come_first_and_by_ranges(memory_store: MemoryStore, tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(600, 600)}
    address = memory_store.put(save(tmp_path / "a", tensors))
    opened = open_model(address)
    assert isinstance(opened, Checkpoint)
    assert (str(opened.path), str(opened.path.parent)) == (address, "memory://box")
    assert memory_store.downloaded() == []
    assert ("a/model.safetensors", 1 << 16) in memory_store.reads
    assert sum(size for _, size in memory_store.reads) < 100_000
    assert inspect(address)["parameters"] == 360_000
    assert memory_store.downloaded() == []
    assert opened.tensors["model.layers.0.mlp.up_proj.weight"].read().sum() == 360_000
    assert memory_store.downloaded() == ["model.safetensors"]
    memory_store.reads.clear()  # a later process finds the file in the cache
    again = open_model(address)
    assert isinstance(again, Checkpoint)
    assert again.tensors["model.layers.0.mlp.up_proj.weight"].read().sum() == 360_000
    assert not [name for name, _ in memory_store.reads if name.endswith("model.safetensors")]


def test_adapters_and_single_files(memory_store: MemoryStore, tmp_path: Path) -> None:
    base, made = adapters(tmp_path, 2)
    folder = memory_store.put(made[0])
    file = memory_store.put(made[1] / "adapter_model.safetensors", "loose.safetensors")
    opened = open_model(folder)
    assert isinstance(opened, Adapter)
    assert opened.base == "tiny/base"
    assert isinstance(open_model(f"{folder}/adapter_model.safetensors"), Adapter)
    merging.merge([folder, file], method="linear", base=memory_store.put(base), output=tmp_path / "x.safetensors")
    merging.merge(
        [made[0], made[1] / "adapter_model.safetensors"], method="linear", base=base, output=tmp_path / "y.safetensors"
    )
    assert identical(load(tmp_path / "x.safetensors"), load(tmp_path / "y.safetensors"))


def test_a_file_is_not_read_without_neighbors_that_cannot_be_listed_now(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config next to it states the alpha; where nobody may list the folder, the file alone is all there is."""
    folder = memory_store.put(adapters(tmp_path, 1)[1][0])
    monkeypatch.setattr("merging.object_stores.retries.time.sleep", lambda seconds: None)

    def fail(error: Exception) -> None:
        def ls(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(MemoryFileSystem, "ls", ls)

    fail(ConnectionError("reset"))
    with pytest.raises(InputError, match="the store cannot be reached, or fails: reset: try again later"):
        open_model(f"{folder}/adapter_model.safetensors")
    fail(PermissionError("no listing"))
    assert open_model(f"{folder}/adapter_model.safetensors").files[0].name == "adapter_model.safetensors"


def test_streamed_models_pass_through_the_disk(memory_store: MemoryStore, tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path, 2)
    addresses = [memory_store.put(each) for each in tuned]
    merging.merge(addresses, method="linear", output=tmp_path / "streamed", stream=True)
    assert memory_store.downloaded() == []
    merging.merge(tuned, method="linear", output=tmp_path / "whole")
    assert identical(load(tmp_path / "streamed"), load(tmp_path / "whole"))


def test_a_file_that_changes_after_the_header_is_an_error(memory_store: MemoryStore, tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path, 2)
    address = memory_store.put(tuned[0])
    opened = open_model(address)
    memory_store.put(tuned[1], "tuned0")
    assert isinstance(opened, Checkpoint)
    with pytest.raises(
        FormatError, match=r"memory://box/tuned0/model\.safetensors: changed while it was read: .* ETag"
    ):
        opened.tensors["model.norm.weight"].read()
    assert memory_store.downloaded() == []
    fresh = open_model(address)  # a new call takes the new file
    assert isinstance(fresh, Checkpoint)
    assert torch.equal(fresh.tensors["model.norm.weight"].read(), load(tuned[1])["model.norm.weight"])


def test_a_file_that_becomes_shorter_is_an_error(memory_store: MemoryStore, tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path, 1)
    opened = open_model(memory_store.put(tuned[0]))
    MemoryFileSystem().pipe_file("/box/tuned0/model.safetensors", b"short")
    assert isinstance(opened, Checkpoint)
    with pytest.raises(FormatError, match=r"changed while it was read: it had .* and has 5 bytes"):
        opened.tensors["model.norm.weight"].read()


def test_rerun_compares_etags(memory_store: MemoryStore, tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path, 3)
    addresses = [memory_store.put(each) for each in tuned[:2]]
    merging.merge(addresses, method="linear", output=tmp_path / "out")
    (tmp_path / "unrelated.txt").write_text("x")
    memory_store.put(tmp_path / "unrelated.txt", "tuned0/unrelated.txt")  # not read, and so not compared
    merging.rerun(tmp_path / "out", output=tmp_path / "again")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert merging.verify_against_sources(tmp_path / "out").findings[0].severity == "ok"
    memory_store.put(tuned[2], "tuned1")
    with pytest.raises(InputError, match=r"memory://box/tuned1 has another .* than then \(ETag .* then, .* now\)"):
        merging.rerun(tmp_path / "out", output=tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_a_merge_goes_on_only_with_the_same_etags(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tuned = checkpoint(tmp_path, 3)
    addresses = [memory_store.put(each) for each in tuned[:2]]

    def fail(self: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("merging.storage.writer.TensorWriter.finish", fail)
        with pytest.raises(OutputError, match="the finished work stays in"):
            merging.merge(addresses, method="linear", output=tmp_path / "out", resume=True)
    memory_store.put(tuned[2], "tuned1")
    with pytest.raises(OutputError, match=r"memory://box/tuned1/\S+ was the ETag .*, and is the ETag .* now"):
        merging.merge(addresses, method="linear", output=tmp_path / "out", resume=True)


def test_the_other_commands(memory_store: MemoryStore, tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path, 2)
    addresses = [memory_store.put(each) for each in (*tuned, base)]
    compared = merging.compare(addresses[:2], base=addresses[2])
    assert compared.cosines is not None
    recipe = tmp_path / "folder" / "recipe.yml"
    recipe.parent.mkdir()
    recipe.write_text(f"models: {addresses[:2]}\nbase: {addresses[2]}\nmethod: task_arithmetic\n")
    loaded = merging.load_recipe(recipe)
    assert loaded.models == tuple(addresses[:2])
    merging.merge([loaded, addresses[0]], method="linear", output=tmp_path / "out")  # a stage of its own
    assert (tmp_path / "out/model.safetensors").exists()


def test_file_addresses_mean_local_paths(tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path, 2)
    merging.merge([f"file://{each}" for each in tuned], method="linear", output=tmp_path / "out")
    merging.merge(tuned, method="linear", output=tmp_path / "same")
    assert identical(load(tmp_path / "out"), load(tmp_path / "same"))
    merging.rerun(tmp_path / "out", output=tmp_path / "again")
    with pytest.raises(InputError, match="there is no such file or folder"):
        open_model(f"file://{tmp_path}/none")


def test_adapters_of_a_store_are_candidates_of_a_pool(memory_store: MemoryStore, tmp_path: Path) -> None:
    _, made = adapters(tmp_path, 2)
    addresses = [memory_store.put(each, f"many/{each.name}") for each in made]
    memory_store.put(made[0] / "adapter_model.safetensors", "many/loose.safetensors")
    assert [each.name for each in candidates_in("memory://box/many")] == [
        *addresses,
        "memory://box/many/loose.safetensors",
    ]
    assert [each.name for each in candidates_in(addresses[0])] == addresses[:1]
    (tmp_path / "none.txt").write_text("x")
    memory_store.put(tmp_path / "none.txt", "empty/none.txt")
    with pytest.raises(InputError, match="holds no adapter"):
        candidates_in("memory://box/empty")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("memory://box/none", "memory://box/none: there is no such file or folder"),
        ("memory://box/none.safetensors", "memory://box/none.safetensors: there is no such file or folder"),
        ("memory://box/a/config.txt", "is no folder with files: name a folder, or a file with its ending"),
        ("memory://box/a/other.safetensors", r"memory://box/a holds no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(memory_store: MemoryStore, tmp_path: Path, name: str, said: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    memory_store.put(tmp_path / "x.safetensors", "a/config.txt")
    with pytest.raises(InputError, match=said):
        open_model(name)


def test_names_that_lead_out_of_the_folder_are_left_out(memory_store: MemoryStore, tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path, 1)
    address = memory_store.put(tuned[0])
    MemoryFileSystem.store["/box/tuned0/..\\config.json"] = MemoryFileSystem.store["/box/tuned0/config.json"]
    MemoryFileSystem.store["/box/tuned0/x/../../y.safetensors"] = MemoryFileSystem.store["/box/tuned0/config.json"]
    opened = open_model(address)
    assert isinstance(opened, Checkpoint)
    assert [file.name for file in opened.files] == ["model.safetensors"]


def test_a_config_may_not_be_endless(
    memory_store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.hub.object_folder.LIST_LIMIT", 10)
    _, tuned = checkpoint(tmp_path, 1)
    with pytest.raises(FormatError, match=r"memory://box/tuned0/config\.json: has .*, more than"):
        open_model(memory_store.put(tuned[0]))
    assert [name for name, _ in memory_store.reads] == []


def test_mergekit_reads_no_stores() -> None:
    recipe = merging.load_recipe("models: [memory://a, memory://b]\nmethod: linear")
    with pytest.raises(OptionError, match="mergekit reads no object stores"):
        write_documents(recipe)
