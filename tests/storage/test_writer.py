"""Files as they are written: literal bytes, shards and their index, odd shapes, and no half-written tensor."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import merging
from merging import os_calls
from merging.errors import OutputError
from merging.sources.checkpoint import open_checkpoint
from merging.sources.dtypes import DTYPE_NAMES
from merging.storage.gguf_writer import GgufWriter
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter
from support.tiny import CONFIG, checkpoint, fine_tune, identical, load, model, save


def outs(tensors: dict[str, Tensor]) -> list[OutputTensor]:
    return [OutputTensor(name, DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], shard_size: int | None = None, **metadata: str) -> TensorWriter:
    """Write tensors in halves, the later half first."""
    writer = TensorWriter(folder, "model", outs(tensors), metadata, shard_size)
    for name, value in tensors.items():
        flat, middle = value.flatten(), value.numel() // 2
        writer.write(name, flat[middle:].contiguous(), middle)
        writer.write(name, flat[:middle].contiguous())
    writer.finish()
    return writer


def test_literal_bytes(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.tensor([1.0, -2.0]), "é": torch.tensor(3, dtype=torch.int8)}, note="x")
    header = (
        b'{"__metadata__":{"format":"pt","note":"x"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"\xc3\xa9":{"dtype":"I8","shape":[],"data_offsets":[8,9]}}'
    )
    header += b" " * (-len(header) % 8)
    length = len(header).to_bytes(8, "little")
    want = length + header + b"\x00\x00\x80\x3f\x00\x00\x00\xc0" + b"\x03"
    assert (tmp_path / "model.safetensors").read_bytes() == want


@pytest.mark.parametrize("extra", range(9))
def test_data_begin_at_a_multiple_of_eight(tmp_path: Path, extra: int) -> None:
    """Whatever the header's length, so that readers can map tensors in place."""
    write(tmp_path, {"a" * (extra + 1): torch.ones(3)})
    length = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


@pytest.mark.parametrize("shards", [1, 9])
def test_odd_shapes_and_types(tmp_path: Path, shards: int) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0),
        "empty.matrix": torch.zeros(3, 0, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False, True]),
        "half": torch.arange(5).to(torch.float16),
        "double": torch.arange(6, dtype=torch.float64).view(1, 2, 3),
        "integer": torch.tensor([[-1, 2**40]]),
        "brain": torch.ones(2, 2, dtype=torch.bfloat16),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
    }
    write(tmp_path, tensors, None if shards == 1 else 1)
    assert identical(load(tmp_path), tensors)


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("zabcd")}  # 16 bytes each
    tensors["b"] = torch.ones(50)  # larger than a shard may be
    write(tmp_path, tensors, shard_size=32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [f"model-{i:05}-of-00003.safetensors" for i in range(1, 4)]
    assert index == {
        "metadata": {"total_parameters": 66, "total_size": 264},
        "weight_map": {"a": files[0], "b": files[1], "c": files[2], "d": files[2], "z": files[0]},
    }
    held: dict[str, str] = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
            assert opened.metadata() == {"format": "pt"}
    assert held == index["weight_map"]
    assert identical(load(tmp_path), tensors)
    assert identical({n: s.read() for n, s in open_checkpoint(tmp_path).tensors.items()}, tensors)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    writer = write(tmp_path, {"a": torch.ones(4)}, shard_size=16)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"] == list(writer.files)


@pytest.mark.parametrize("written", [0, 2, 3])
def test_a_tensor_that_was_not_written_completely(tmp_path: Path, written: int) -> None:
    writer = TensorWriter(tmp_path, "model", outs({"a": torch.ones(4), "b": torch.ones(4)}), {}, None)
    writer.write("a", torch.ones(4))
    writer.write("b", torch.ones(written))
    with pytest.raises(AssertionError, match="b and 0 more were not written"):
        writer.finish()
    writer.close()


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_a_full_disk_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Windows would not remove the folder of an open file."""
    opened: list[int] = []

    def fill_disk(fd: int, size: int) -> None:
        opened.append(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os_calls, "reserve", fill_disk)
    wanted = outs({"a": torch.ones(4)})
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        if format == "gguf":
            GgufWriter(tmp_path / "a.gguf", "llama", wanted, {})
        else:
            TensorWriter(tmp_path, "model", wanted, {}, None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_what_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written: No such file or directory"):
        TensorWriter(tmp_path / "nowhere", "model", outs({"a": torch.ones(4)}), {}, None)
    write(tmp_path, {"a": torch.ones(4)})
    with pytest.raises(OutputError, match="File exists"):
        TensorWriter(tmp_path, "model", outs({"a": torch.ones(4)}), {}, None)


@pytest.mark.parametrize("grain", ["linear", "task_arithmetic"])
def test_merges_of_odd_shapes(tmp_path: Path, grain: str) -> None:
    """A tensor without elements, a single number, and integers go through a merge as they are."""
    odd = {
        "scale": torch.tensor(2.0),
        "none": torch.zeros(0, 8),
        "steps": torch.tensor(7),
        "flags": torch.zeros(0).bool(),
    }
    base = {**model(0), **odd}
    one, two = fine_tune(base, 1), fine_tune(base, 2)
    paths = [save(tmp_path / name, each) for name, each in {"base": base, "one": one, "two": two}.items()]
    merging.merge(paths[1:], method=grain, base=paths[0], output=tmp_path / "out")
    got = load(tmp_path / "out")
    assert {name: value.shape for name, value in got.items()} == {name: value.shape for name, value in base.items()}
    sum_ = (one["scale"] + two["scale"]) / 2 if grain == "linear" else one["scale"] + two["scale"] - base["scale"]
    assert torch.allclose(got["scale"], sum_)
    assert got["steps"] == 7


def test_merged_shards_load_in_transformers(tmp_path: Path) -> None:
    """Without a missing or unexpected name, one tensor being larger than a shard may be."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=8, bos_token_id=0, eos_token_id=0)
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
    merging.merge(paths, method="linear", output=tmp_path / "out", shard_size=4000)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 5
    assert max(sizes) > 4000
    loaded, report = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    want = (load(paths[0])["transformer.wte.weight"] + load(paths[1])["transformer.wte.weight"]) / 2
    assert torch.allclose(loaded.lm_head.weight, want)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in load(tmp_path / "out").values())


def test_companions(tmp_path: Path) -> None:
    """What belongs to a model comes along, code and old weights do not, and the card holds the recipe."""
    base, tuned = checkpoint(tmp_path)
    for name in ("tokenizer.json", "LICENSE", "generation_config.json", "modeling.py", "optimizer.pt"):
        (base / name).write_text(name)
    stated = CONFIG | {"_name_or_path": "org/base", "dtype": "float32", "auto_map": {"AutoModel": "modeling.X"}}
    (base / "config.json").write_text(json.dumps(stated))
    done = merging.merge(tuned, method="task_arithmetic", base=base, output=tmp_path / "out", dtype="bfloat16")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "tokenizer.json", "LICENSE", "generation_config.json", "config.json", "README.md", "model.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "_name_or_path" not in config
    assert any("code of its own" in notice for notice in done.notices)
    assert {value.dtype for value in load(tmp_path / "out").values()} == {torch.bfloat16}
    card = (tmp_path / "out" / "README.md").read_text()
    recipe = merging.load_recipe(card.split("```yaml\n")[1].split("```")[0])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["merging_recipe"]) == recipe.to_dict()
        assert opened.metadata()["merging_version"] == merging.__version__
