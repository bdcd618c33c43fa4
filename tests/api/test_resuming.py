"""Merges that stop and are gone on with: when, and when not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import merging
from merging.api import resuming
from merging.engine import journal
from merging.errors import InputError, OptionError, OutputError
from merging.storage.leftovers import find_leftovers
from support.hub_fixture import Hub
from support.systems import POSIX
from support.tiny import adapters, checkpoint, identical, load

pytestmark = POSIX

Stop = Callable[..., Path]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return checkpoint(tmp_path, 2, layers=2)[1]


@pytest.fixture
def stop(tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Begins a merge that stops as the disk fails, with all but its last bytes recorded; returns its hidden folder."""

    def begin(**options: object) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(journal, "_PERIOD", 0.001)

            def fail(self: object) -> None:
                raise OSError(5, os.strerror(5))

            patch.setattr("merging.storage.writer.TensorWriter.finish", fail)
            with pytest.raises(OutputError, match="the finished work stays in"):
                merging.merge(models, method="linear", output=tmp_path / "out", resume=True, **options)
        (left,) = find_leftovers(tmp_path)
        assert left.resumable
        return left.path

    return begin


def units_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the name of each tensor that is merged from now on."""
    from merging.engine.worker import Worker

    done: list[str] = []
    plain = Worker.merge_unit

    def note(self: Worker, span: object) -> None:
        done.append(span.item.site.name)
        plain(self, span)

    monkeypatch.setattr(Worker, "merge_unit", note)
    return done


@pytest.mark.parametrize("resume", [True, None])
def test_the_same_merge_goes_on(
    stop: Stop, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool | None
) -> None:
    stop()
    done = units_run(monkeypatch)
    merging.merge(models, method="linear", output=tmp_path / "out", resume=resume)
    assert done == []
    monkeypatch.undo()
    merging.merge(models, method="linear", output=tmp_path / "whole")
    assert identical(load(tmp_path / "out"), load(tmp_path / "whole"))
    assert (tmp_path / "out/README.md").read_bytes() == (tmp_path / "whole/README.md").read_bytes()
    assert not find_leftovers(tmp_path)


def test_quantized_tensors_are_not_encoded_again(
    stop: Stop, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "linear", "quantize": "fp8-channel", "resume": True}
    stop(quantize="fp8-channel")
    done = units_run(monkeypatch)
    merged = merging.merge(models, output=tmp_path / "out", **options)
    assert done == []
    monkeypatch.undo()
    whole = merging.merge(models, output=tmp_path / "whole", **options)
    assert merged.quantization_errors == whole.quantization_errors != {}
    assert identical(load(tmp_path / "out"), load(tmp_path / "whole"))
    assert not find_leftovers(tmp_path)


def test_a_lora_in_a_gguf_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, changes = adapters(tmp_path / "models", 2)
    options = {"method": "linear", "base": base, "format": "gguf", "resume": True}

    def fail(self: object) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_PERIOD", 0.001)
        patch.setattr("merging.storage.gguf_writer.GgufWriter.finish", fail)
        with pytest.raises(OutputError, match="the finished work stays in"):
            merging.merge(changes, output=tmp_path / "out.gguf", **options)
    done = units_run(monkeypatch)
    merging.merge(changes, output=tmp_path / "out.gguf", **options)
    assert done == []
    merging.merge(changes, output=tmp_path / "again/out.gguf", **options)
    assert done
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "again/out.gguf").read_bytes()
    assert not find_leftovers(tmp_path)


def test_another_merge_is_refused_with_the_difference(stop: Stop, models: list[Path], tmp_path: Path) -> None:
    left = stop(weights=[0.5, 0.5])
    with pytest.raises(
        OutputError, match=r"stopped, and weights was \[0\.5, 0\.5\], and is \[1\.0, 2\.0\] now: repeat"
    ):
        merging.merge(models, method="linear", output=tmp_path / "out", weights=[1, 2])
    with pytest.raises(OutputError, match="method was linear, and is ties now"):
        merging.merge(models, method="ties", base=tmp_path / "base", output=tmp_path / "out", resume=True)
    assert left.exists()
    merging.merge(models, method="linear", output=tmp_path / "out", weights=[1, 2], resume=False)
    assert not left.exists()


def test_an_input_that_changed_is_named(stop: Stop, models: list[Path], tmp_path: Path) -> None:
    stop()
    weights = models[1] / "model.safetensors"
    os.utime(weights, (1, 1))
    with pytest.raises(OutputError, match=rf"{weights} was .*, and is .* changed at 1970-01-01"):
        merging.merge(models, method="linear", output=tmp_path / "out", resume=True)


def test_another_version_is_refused(
    stop: Stop, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop()
    monkeypatch.setattr("merging.output.header.__version__", "9.9")
    with pytest.raises(OutputError, match=rf"merging was {merging.__version__}, and is 9.9 now"):
        merging.merge(models, method="linear", output=tmp_path / "out")


def test_values_that_changed_in_the_hidden_folder_are_made_again(
    stop: Stop, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stop() / "out/model.safetensors").write_bytes(b"something else")
    done = units_run(monkeypatch)
    merging.merge(models, method="linear", output=tmp_path / "out", resume=True)
    assert done
    monkeypatch.undo()
    merging.merge(models, method="linear", output=tmp_path / "whole")
    assert identical(load(tmp_path / "out"), load(tmp_path / "whole"))


def test_errors_that_come_again_leave_nothing(models: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(models[1] / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, models[1] / "model.safetensors")
    with pytest.raises(InputError):
        merging.merge(models, method="linear", output=tmp_path / "out", resume=True)
    assert not find_leftovers(tmp_path)


def test_large_outputs_can_be_gone_on_with(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.setattr(
        "merging.api.merge_files.Journal", lambda folder: begun.append(folder) or journal.Journal(folder)
    )
    merging.merge(models, method="linear", output=tmp_path / "small")
    assert not begun
    monkeypatch.setattr(resuming, "_LARGE", 1)
    merging.merge(models, method="linear", output=tmp_path / "large")
    assert begun
    merging.merge(models, method="linear", output=tmp_path / "stated", resume=False)
    assert len(begun) == 1


def test_kept_stages_are_not_gone_on_with(models: list[Path], tmp_path: Path) -> None:
    inner = merging.Recipe(models=[str(path) for path in models], method="linear")
    with pytest.raises(OptionError, match="resume=True does not go with keep_stages"):
        merging.merge(
            [inner, models[0]], method="linear", output=tmp_path / "out", resume=True, keep_stages=tmp_path / "kept"
        )


STOP_AND_GO_ON = """
import sys
import merging
from merging.engine import journal
from merging.storage.writer import TensorWriter

def merge():
    merging.merge(["org/one", "org/two"], method="linear", output=sys.argv[1], resume=True)

journal._PERIOD = 0.001
finish = TensorWriter.finish
def fail(self):
    raise OSError(5, "Input/output error")
TensorWriter.finish = fail
try:
    merge()
except merging.OutputError as error:
    assert "the finished work stays in" in str(error)
TensorWriter.finish = finish
merge()  # the files were downloaded meanwhile
"""


@pytest.mark.exhaustive
def test_models_of_the_hub_go_on(hub: Hub, models: list[Path], tmp_path: Path) -> None:
    for name, path in zip(("org/one", "org/two"), models, strict=True):
        hub.put(name, path, card={"license": "mit"})
    command = [sys.executable, "-c", STOP_AND_GO_ON, str(tmp_path / "out")]
    done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merging.merge(models, method="linear", output=tmp_path / "whole")
    assert identical(load(tmp_path / "out"), load(tmp_path / "whole"))
    assert not find_leftovers(tmp_path)


def test_an_output_that_was_moved_aside_is_kept(stop: Stop, models: list[Path], tmp_path: Path) -> None:
    """Where two names cannot be exchanged, a kill leaves the old output in the hidden folder."""
    held = stop()
    merging.merge(models, method="linear", output=tmp_path / "old", weights=[1, 2])
    (tmp_path / "old").rename(held / "old")
    with pytest.raises(OutputError, match="exists already"):
        merging.merge(models, method="linear", output=tmp_path / "out", weights=[3, 4], resume=False)
    assert (tmp_path / "out/model.safetensors").is_file()
    assert not find_leftovers(tmp_path)


def test_a_sweep_of_a_statistic_goes_on(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merging.engine.worker import Worker

    gathered: list[object] = []
    plain, whole = Worker.gather, tmp_path / "whole"

    def merge(output: Path, most: int | None = None) -> int:
        """Merge until so many pieces were gathered from; return the number of pieces."""

        def gather(self: Worker, span: object, stage: object) -> None:
            if len(gathered) == most:
                raise OSError(5, os.strerror(5))
            gathered.append(span)
            plain(self, span, stage)

        gathered.clear()
        monkeypatch.setattr(Worker, "gather", gather)
        merging.merge(models, method="ties", base=tmp_path / "base", output=output, resume=True, threads=1)
        return len(gathered)

    monkeypatch.setattr(journal, "_PERIOD", 0)  # finished pieces are handed in at once
    left = merge(whole)
    for number in (left // 7, left // 3, left // 3):  # in the first sweep, the second and the third
        with pytest.raises(OutputError, match="the finished work stays in"):
            merge(tmp_path / "out", number)
        left -= number
    assert merge(tmp_path / "out") == left
    assert identical(load(tmp_path / "out"), load(whole))
    assert not find_leftovers(tmp_path)
