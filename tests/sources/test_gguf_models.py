"""Models in GGUF files, against the models that they were written from, and against transformers' own reading."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import merging
from merging.errors import InputError, MergingError, OutputError, QuantizedError
from merging.hub.open_model import open_model
from merging.sources import Checkpoint
from merging.sources.gguf import tensor_types
from merging.sources.gguf.architectures import ARCHITECTURES
from merging.sources.gguf.layout import HeadRows
from merging.sources.gguf.tensor_types import BlockTensor, block_type
from merging.sources.stored import MappedTensor
from support.adapters import quiet, reload, save_base
from support.architectures import DECODER, tiny
from support.gguf_files import permute, write_gguf

NAMES = [
    "llama", "llama-tied", "llama-biases", "mixtral", "qwen2", "qwen3", "qwen2-moe", "gemma2", "gemma3", "phi3", "gpt2",
    "olmo2", "cohere",
]  # fmt: skip


def opened(path: Path) -> Checkpoint:
    model = open_model(path, dequantize=True)
    assert isinstance(model, Checkpoint)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back(name: str, tmp_path: Path) -> None:
    """Bit for bit, under its names, with a config by which transformers computes the same."""
    with quiet():
        base = save_base(tmp_path / "base", name)
    if name.startswith("gemma"):  # norms of their own, and llama.cpp's scale of queries
        config = json.loads((base / "config.json").read_text()) | {"query_pre_attn_scalar": 8}
        (base / "config.json").write_text(json.dumps(config))
    file = write_gguf(tmp_path / "model.gguf", base)
    merging.merge([file], method="passthrough", output=tmp_path / "out")
    given, found = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert given.keys() == found.keys()
    assert all(torch.allclose(given[each], found[each], rtol=0, atol=1e-6) for each in given)
    assert [each for each in given if "norm" not in each and not torch.equal(given[each], found[each])] == []
    tokens = torch.tensor([[3, 5, 7, 11, 20]])
    with quiet(), torch.no_grad():
        one, other = (reload(folder)(input_ids=tokens, use_cache=False).logits for folder in (base, tmp_path / "out"))
    assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_values_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    with quiet():
        torch.manual_seed(3)
        tiny("LlamaConfig", "LlamaForCausalLM", DECODER, {"intermediate_size": 64})().save_pretrained(tmp_path / "base")
        file = write_gguf(tmp_path / f"{kind}.gguf", tmp_path / "base", kind)
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
    model = opened(file)
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    assert {stored.dtype for stored in model.tensors.values()} == {dtype}
    assert reference.keys() == model.tensors.keys()
    for name, stored in model.tensors.items():
        assert torch.equal(stored.read(), reference[name].to(dtype)), name


def test_quantised_files_want_the_option(tmp_path: Path) -> None:
    with quiet():
        base = save_base(tmp_path / "base", "llama")
    file = write_gguf(tmp_path / "q.gguf", base, "Q8_0")
    with pytest.raises(QuantizedError, match=r"q\.gguf: is quantised \(Q8_0, says .*: use dequantize=True to merge it"):
        open_model(file)
    merged = merging.merge([file, base], method="linear", output=tmp_path / "out", dequantize=True)
    assert merged.kind == "model"


@pytest.mark.parametrize("kind", [each.name for each in gguf.GGML_QUANT_SIZES])
def test_every_type_is_read_in_any_piece(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    known = block_type(int(number))
    assert known is not None and (known.name, known.elements, known.nbytes) == (kind, elements, nbytes)
    if known.dtype_name is not None:
        return
    codes = torch.randint(0, 256, (7 * nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if not tensor_types.is_dequantizable(known):
        assert kind in ("Q8_1", "Q8_K", "NVFP4", "Q1_0"), kind
        return
    with np.errstate(all="ignore"):
        whole = torch.from_numpy(gguf.quants.dequantize(codes.numpy().reshape(7, nbytes), number)).reshape(-1)
        stored = BlockTensor(known, (7, elements), MappedTensor(codes, ("a", 0)))
        for start, count in ((0, 7 * elements), (3, elements), (elements - 1, 2), (5 * elements + 7, elements), (9, 0)):
            piece = torch.empty(count)
            stored.read_into(piece, start)
            assert torch.equal(piece.nan_to_num(), whole[start : start + count].nan_to_num())


def test_pieces_of_rows_of_heads() -> None:
    weight = torch.randn(24, 5)
    turned = HeadRows(MappedTensor(permute(weight, 3), ("a", 0)), 3)
    assert torch.equal(turned.read(), weight)
    for start, count in ((7, 1), (38, 5), (39, 60), (119, 1)):
        piece = torch.empty(count)
        turned.read_into(piece, start)
        assert torch.equal(piece, weight.flatten()[start : start + count])


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - {"mixtral"}))
def test_names_are_those_of_the_package(arch: str) -> None:
    """llama.cpp's own table has the names of transformers' tensors for the same tensors."""
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, 3)
    for known in [ARCHITECTURES[arch], *([ARCHITECTURES["mixtral"]] if arch == "llama" else [])]:
        for module in [*known.outer, *(f"blk.2.{each}" for each in [*known.block, *known.experts])]:
            renamed = known.name_in_transformers(f"{module}.weight")
            assert renamed is not None
            assert names.get_name(renamed[0].replace(".{}", ""), (".weight",)) == f"{module}.weight"
            if "{}" not in renamed[0]:
                assert known.name_in_gguf(renamed[0]) == (f"{module}.weight", renamed[1])


def test_shards(tmp_path: Path) -> None:
    with quiet():
        base = save_base(tmp_path / "base", "llama")
    (tmp_path / "parts").mkdir()
    write_gguf(tmp_path / "parts" / "m.gguf", base, shard_tensors=6)
    shards = sorted((tmp_path / "parts").iterdir())
    assert len(shards) == 4
    given = load_file(base / "model.safetensors")
    for named in (tmp_path / "parts", shards[0], shards[2]):
        assert opened(named).tensors.keys() == given.keys()
    shards[1].unlink()
    with pytest.raises(InputError, match=r"its shard m-00002-of-00004\.gguf is missing: complete the download"):
        opened(tmp_path / "parts")


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    with quiet():
        base = save_base(tmp_path / "base", "llama")
    (tmp_path / "many").mkdir()
    for name in ("a.gguf", "mmproj-a.gguf"):
        write_gguf(tmp_path / "many" / name, base)
    assert opened(tmp_path / "many").files == (tmp_path / "many" / "a.gguf",)
    write_gguf(tmp_path / "many" / "b.gguf", base)
    with pytest.raises(InputError, match=r"which weights\? The folder holds a\.gguf, b\.gguf: name the file"):
        opened(tmp_path / "many")


def test_scaled_frequencies(tmp_path: Path) -> None:
    """Llama 3's scaling, which files state as a factor of each frequency; other factors are refused."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    with quiet():
        base = save_base(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"head_dim": 16, "rope_parameters": rope}))
    frequencies = [500000.0 ** (-place / 16) for place in range(0, 16, 2)]
    factors = []
    for each in frequencies:
        turns = 8192 * each / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - 1) / 3))
        factors.append(1 / ((1 - smooth) / 8 + smooth))
    file = write_gguf(tmp_path / "a.gguf", base, more={"rope_freqs.weight": np.array(factors, dtype=np.float32)})
    stated = opened(file).config
    assert stated["rope_theta"] == 500000.0
    assert stated["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    odd = write_gguf(tmp_path / "b.gguf", base, more={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)})
    with pytest.raises(MergingError, match="another way than Llama 3"):
        opened(odd)


def test_the_tokenizer_is_rebuilt_or_missed(tmp_path: Path) -> None:
    with quiet():
        known, unknown = (
            write_gguf(tmp_path / f"{each}.gguf", save_base(tmp_path / each, each)) for each in ("llama", "olmo2")
        )
    merged = merging.merge([known], method="passthrough", output=tmp_path / "out")
    assert merged.notices == ()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens([1, 3, 14]) == ["<s>", "\u2581a", "b"]
    merged = merging.merge([unknown], method="passthrough", output=tmp_path / "without")
    assert "the output has no tokenizer, as transformers does not read it from" in " ".join(merged.notices)


def test_a_chat_template_that_is_asked_for_replaces_the_file_s(tmp_path: Path) -> None:
    with quiet():
        file = write_gguf(tmp_path / "a.gguf", save_base(tmp_path / "base", "llama"), template="of the file")
    for name, wanted in (("own", None), ("other", "{{ 'asked for' }}")):
        merging.merge([file], method="passthrough", output=tmp_path / name, chat_template=wanted)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.chat_template == (wanted or "of the file")


def test_a_tokenizer_that_is_not_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(self: object, folder: str, **options: object) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")

    with quiet():
        file = write_gguf(tmp_path / "a.gguf", save_base(tmp_path / "base", "llama"))
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fill_disk)
    with pytest.raises(OutputError, match="the tokenizer cannot be written: No space left"):
        merging.merge([file], method="passthrough", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_diffusion_models_keep_their_names(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    value = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)
    writer.add_array("comfy.gguf.orig_shape.img_in.weight", [32, 32])
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("img_in.weight", gguf.quants.quantize(value, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (name, stored), *_ = opened(tmp_path / "flux.gguf").tensors.items()
    assert (name, stored.shape) == ("img_in.weight", (32, 32))
    assert (stored.read().float().flatten() - torch.from_numpy(value).flatten()).abs().max() < 0.05


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        base = save_base(tmp_path / "base", "llama")
    plain, packed = (write_gguf(tmp_path / f"{kind}.gguf", base, kind) for kind in ("F16", "Q8_0"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    block_type.cache_clear()
    assert opened(plain).layers == 2
    with pytest.raises(InputError, match=r"pip install 'merging\[gguf\]'"):
        opened(packed)
    block_type.cache_clear()
