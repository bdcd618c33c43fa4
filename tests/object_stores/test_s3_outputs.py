"""Outputs on a real server of S3 on the own machine: whole or absent, whatever is killed or fails."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import merging
from merging.errors import InputError, OutputError
from merging.storage import uploaded_file
from support.commands import ok
from support.faulty_s3 import WITH_S3, FaultyS3, faulty_s3
from support.tiny import adapters, checkpoint

__all__ = ["faulty_s3"]

pytestmark = [
    pytest.mark.exhaustive,
    WITH_S3,
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),  # aiohttp's, of parts given as bytes
]

OUT = "s3://box/out"
LINEAR: dict[str, Any] = {"method": "linear", "threads": 1}
FAULTS = Path(__file__).parents[1] / "faults" / "object_stores.py"


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No waiting before another try, and a folder for temporary files, which is empty in the end."""
    monkeypatch.setattr("merging.object_stores.retries.time.sleep", lambda seconds: None)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert not [*(tmp_path / "temporary").glob(".*")]


@pytest.fixture
def tuned(tmp_path: Path) -> list[Path]:
    return checkpoint(tmp_path / "models", 2, width=64, vocab=2048, layers=2)[1]


def bucket() -> Any:
    """The server's file system."""
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)


def files_in_bucket() -> dict[str, bytes]:
    """All files of the bucket, which has no unfinished upload."""
    system = bucket()
    assert not system.call_s3("list_multipart_uploads", Bucket="box").get("Uploads")
    return {path.removeprefix("box/"): system.cat_file(path) for path in system.find("box")}


def files_at(path: Path) -> dict[str, bytes]:
    """All files of an output on the disk, named alike."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {each.relative_to(path.parent).as_posix(): each.read_bytes() for each in files}


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_merge_stream_and_push_back(faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path], name: str) -> None:
    """From a bucket into the same bucket, new and over an old output, with the bytes of merges on the disk."""
    sources = [faulty_s3.put(each) for each in tuned]
    there = files_in_bucket()
    for number, options in enumerate(([], ["--overwrite", "--weights", "0.9,0.1"])):
        shards = ["--shard-size", "200000"] if name == "out" else []
        words = ["--method", "linear", *sources, *shards, *options]
        ok(*words, "-o", tmp_path / str(number) / name)
        done = ok(*words, "-o", f"s3://box/{name}", "--stream")
        assert "hunter2" not in done.output
        assert files_in_bucket() == {**there, **files_at(tmp_path / str(number) / name)}
    assert "linear" in ok("inspect", f"s3://box/{name}").output


def test_many_parts(faulty_s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of several parts of the size that S3 wants, from several threads, with one part that fails at first."""
    monkeypatch.setattr(uploaded_file, "PART", 5 << 20)
    models = checkpoint(tmp_path / "models", 2, width=512, vocab=8192, layers=2)[1]
    merging.merge(models, output=tmp_path / "out", method="linear", threads=3)
    faulty_s3.fail(r"PUT /box/out/model\.safetensors", "503 SlowDown")
    merging.merge(models, output=OUT, method="linear", threads=3)
    assert files_in_bucket() == files_at(tmp_path / "out")
    assert sum("PUT /box/out/model.safetensors" in each for each in faulty_s3.requests) == 9


def test_adapters(faulty_s3: FaultyS3, tmp_path: Path) -> None:
    changes = adapters(tmp_path / "models", 2)[1]
    for name in ("lora", "lora.safetensors"):
        merging.merge(changes, output=tmp_path / name, **LINEAR)
        merging.merge(changes, output=f"s3://box/{name}", **LINEAR)
    assert files_in_bucket() == {**files_at(tmp_path / "lora"), **files_at(tmp_path / "lora.safetensors")}


@pytest.mark.parametrize(
    "asked",
    [
        r"POST /box/out/model-00002",  # begins an upload
        r"PUT /box/out/model-00001",  # uploads a part
        r"PUT /box/\.out\.\w+\.partial/uploads.json",
        r"PUT /box/out/config.json",
    ],
)
def test_requests_that_keep_failing(faulty_s3: FaultyS3, tuned: list[Path], asked: str) -> None:
    """One error with the address, and nothing is left in the store."""
    faulty_s3.fail(asked, "403 AccessDenied", times=1000)
    with pytest.raises(InputError, match="the store refuses access") as caught:
        merging.merge(tuned, output=OUT, shard_size=200_000, **LINEAR)
    assert "hunter2" not in str(caught.value)
    assert not files_in_bucket()


def test_a_failure_while_the_output_is_put_in_place(faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path]) -> None:
    """It says so, and `merge clean` does the rest."""
    merging.merge(tuned, output=tmp_path / "out", **LINEAR)
    weights = r"POST /box/out/model.safetensors"
    faulty_s3.before(weights, lambda: None)  # where the upload begins
    faulty_s3.before(weights, lambda: faulty_s3.fail(r"POST /box/out/config.json", "403 AccessDenied", times=1000))
    said = (
        rf"^{OUT}: is in the store, and not yet in place: `merge clean {OUT} --remove` puts it there \(.*refuses access"
    )
    with pytest.raises(OutputError, match=said):
        merging.merge(tuned, output=OUT, **LINEAR)
    faulty_s3.mend()
    assert "box/out/config.json" not in bucket().find("box")
    assert "put in place" in ok("clean", OUT, "--remove").output
    assert files_in_bucket() == files_at(tmp_path / "out")


def test_two_writers(faulty_s3: FaultyS3, tmp_path: Path, tuned: list[Path]) -> None:
    """The first to finish has the address; the other is refused, and its uploads are gone."""
    merging.merge(tuned, output=tmp_path / "out", **LINEAR)

    def overtake(done: int, total: int) -> None:
        if not overtaken:
            overtaken.append(merging.merge(tuned, output=OUT, **LINEAR))

    overtaken: list[object] = []
    with pytest.raises(OutputError, match="was created by someone else meanwhile"):
        merging.merge(tuned, output=OUT, weights=[0.9, 0.1], progress=overtake, **LINEAR)
    assert files_in_bucket() == files_at(tmp_path / "out")


INTERRUPTED = """
import os, signal, sys, merging
from merging.cli.errors import exit_with_message, handle_errors

def interrupt(done, total):
    os.kill(os.getpid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        pass

with exit_with_message(), handle_errors():
    merging.merge(sys.argv[1:], method="linear", output="s3://box/out", progress=interrupt)
"""


def test_an_interruption_leaves_nothing(faulty_s3: FaultyS3, tuned: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, tuned)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted: nothing was written.\n")
    assert not files_in_bucket()


def test_kills() -> None:
    """A small version of the command, which has hundreds of kills and failures."""
    done = subprocess.run(
        [sys.executable, str(FAULTS), "--calls", "1", "--kills", "4"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: 0" in done.stdout
