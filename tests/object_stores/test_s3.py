"""Models on a real server of S3 on the own machine, with its real driver: faults, changes, refusals, and commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.object_stores.retries import Unreachable
from merging.sources import Checkpoint
from support.commands import ok, refused
from support.faulty_s3 import WITH_S3, FaultyS3, faulty_s3
from support.tiny import adapters, checkpoint, fine_tune, identical, load, model, save

__all__ = ["faulty_s3"]

pytestmark = [pytest.mark.exhaustive, WITH_S3]

WEIGHTS = r"GET /box/tuned\d/model\.safetensors"


@pytest.fixture
def tuned(tmp_path: Path) -> list[Path]:
    return checkpoint(tmp_path, 2, layers=2)[1]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.object_stores.retries.time.sleep", lambda seconds: None)


def opened(name: str) -> Checkpoint:
    found = open_model(name)
    assert isinstance(found, Checkpoint)
    return found


def values(name: str) -> dict[str, torch.Tensor]:
    return {name: each.read() for name, each in opened(name).tensors.items()}


def test_commands(faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path]) -> None:
    """Merge, stream, plan, inspect, compare, verify, and rerun, with nothing secret in any output."""
    base = tmp_path / "base"
    save(tmp_path / "sharded", fine_tune(model(layers=2), 9), shards=2)
    one, two, sharded = (faulty_s3.put(each) for each in (*tuned, tmp_path / "sharded"))
    stored_base = faulty_s3.put(base)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"models: [{one}, {two}, {sharded}]\nbase: {stored_base}\nmethod: ties\n")
    done = [
        ok("plan", recipe),
        ok("inspect", sharded),
        ok("compare", one, two, "--base", stored_base),
        ok("verify", one, "--for", "transformers"),
        ok("run", recipe, "-o", tmp_path / "out"),
        ok("run", recipe, "-o", tmp_path / "streamed", "--stream"),
        ok("rerun", tmp_path / "out", "-o", tmp_path / "again"),
        ok("verify", tmp_path / "out", "--against-sources"),
    ]
    assert "hunter2" not in "".join(each.output for each in done)
    merging.merge([*tuned, tmp_path / "sharded"], base=base, method="ties", output=tmp_path / "local")
    for name in ("out", "streamed", "again"):
        assert identical(load(tmp_path / name), load(tmp_path / "local")), name
    assert b"hunter2" not in (tmp_path / "out/model.safetensors").read_bytes()
    assert "127.0.0.1" not in (tmp_path / "out/README.md").read_text()


def test_headers_are_read_by_ranges(faulty_s3: FaultyS3, tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(600, 600)}
    address = faulty_s3.put(save(tmp_path / "a", tensors))
    faulty_s3.requests.clear()
    found = opened(address)
    assert [each for each in faulty_s3.requests if "model.safetensors" in each and "GET" in each] == [
        "GET /box/a/model.safetensors bytes=0-65535"
    ]
    assert float(found.tensors["model.layers.0.mlp.up_proj.weight"].read().sum()) == 360_000


def test_large_files_come_in_chunks(faulty_s3: FaultyS3, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.arange(7_000_000, dtype=torch.float32).view(7000, 1000)}
    address = faulty_s3.put(save(tmp_path / "a", tensors))
    faulty_s3.fail("GET /box/a/model.safetensors", "503 SlowDown", 2)
    faulty_s3.cut("GET /box/a/model.safetensors", 1000)
    assert identical(values(address), tensors)
    assert sum("GET /box/a/model.safetensors" in each for each in faulty_s3.requests) >= 5


@pytest.mark.parametrize("status", ["503 SlowDown", "500 InternalError", "503 ServiceUnavailable"])
def test_errors_that_pass(faulty_s3: FaultyS3, tuned: list[Path], status: str) -> None:
    address = faulty_s3.put(tuned[0])
    faulty_s3.fail("GET /box", status, 2)
    assert identical(values(address), load(tuned[0]))


def test_a_body_that_is_cut_comes_again(faulty_s3: FaultyS3, tuned: list[Path]) -> None:
    address = faulty_s3.put(tuned[0])
    faulty_s3.cut(WEIGHTS, 100, 2)
    assert identical(values(address), load(tuned[0]))


def test_a_server_that_always_fails(faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path]) -> None:
    addresses = [faulty_s3.put(each) for each in tuned]
    faulty_s3.fail("GET /box/tuned1/model", "503 SlowDown", 10_000)
    with pytest.raises(Unreachable, match=r"s3://box/tuned1/model\.safetensors: the store cannot be reached, or fails"):
        merging.merge(addresses, method="linear", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_meanwhile(faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path]) -> None:
    """Between the header and the values, and during the download of the values."""

    def save_other(folder: Path) -> None:
        faulty_s3.put(folder, "tuned0")

    address = faulty_s3.put(tuned[0])
    found = opened(address)
    save_other(tuned[1])
    with pytest.raises(FormatError, match=r"s3://box/tuned0/model\.safetensors: changed while it was read: .* ETag"):
        found.tensors["model.norm.weight"].read()
    found = opened(address)
    faulty_s3.before(WEIGHTS, lambda: save_other(tuned[0]))
    with pytest.raises(FormatError, match="changed while it was read"):
        found.tensors["model.norm.weight"].read()
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors*") if path.is_file()]


def test_rerun_names_the_changed_file(faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path]) -> None:
    addresses = [faulty_s3.put(each) for each in tuned]
    merging.merge(addresses, method="linear", output=tmp_path / "out")
    faulty_s3.put(tuned[0], "tuned1")
    said = refused("rerun", tmp_path / "out", "-o", tmp_path / "again")
    assert "s3://box/tuned1 has another model.safetensors than then (ETag " in said
    assert not (tmp_path / "again").exists()


def test_refusals(faulty_s3: FaultyS3, tuned: list[Path]) -> None:
    address = faulty_s3.put(tuned[0])
    for name, said in {
        "s3://nobucket/tuned0": "s3://nobucket/tuned0: there is no bucket nobucket",
        "s3://box/none": "s3://box/none: there is no such file or folder",
        f"{address}/none.safetensors": "holds no such file or folder",
        "s3://box/none/none.safetensors": "s3://box/none/none.safetensors: there is no such file or folder",
    }.items():
        with pytest.raises(InputError, match=said):
            open_model(name)
    faulty_s3.fail(WEIGHTS, "403 AccessDenied", 100)
    with pytest.raises(InputError, match=r"model\.safetensors: the store refuses access"):
        open_model(address)


def test_a_file_whose_folder_nobody_may_list(faulty_s3: FaultyS3, tmp_path: Path) -> None:
    _, made = adapters(tmp_path, 1)
    address = faulty_s3.put(made[0] / "adapter_model.safetensors", "deep/a.safetensors")
    faulty_s3.fail("GET /box/?$", "403 AccessDenied", 100)
    assert open_model(address).files[0].name == "a.safetensors"


def test_no_credentials(
    faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = faulty_s3.put(tuned[0])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    assert "the store wants credentials, and none are found: `aws configure`" in refused("inspect", address)


def test_a_download_that_was_killed_goes_on(faulty_s3: FaultyS3, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.arange(7_000_000, dtype=torch.float32).view(7000, 1000)}
    address = faulty_s3.put(save(tmp_path / "a", tensors))
    found = opened(address)
    faulty_s3.fail("model.safetensors bytes=16777216-", "403 AccessDenied", 100)
    with pytest.raises(InputError, match="refuses access"):
        found.tensors["model.embed_tokens.weight"].read()
    (part,) = (tmp_path / "cache").rglob("*.part")
    assert part.stat().st_size == 16777216
    faulty_s3.mend()
    assert torch.equal(found.tensors["model.embed_tokens.weight"].read(), tensors["model.embed_tokens.weight"])
    ranges = [each for each in faulty_s3.requests if "model.safetensors bytes=" in each]
    assert len(ranges) == 2
    assert "model.safetensors bytes=0-" not in "".join(ranges)
