"""LoRAs written for llama.cpp, tensor by tensor as its converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.api.usage import describe_usage
from merging.errors import InputError, MergingError, OptionError, OutputError
from merging.serving import verify
from support.adapters import QUIRKS, quiet, save_base, train
from support.gguf_files import write_gguf_lora

pytestmark = QUIRKS

TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"],
    "qwen2": ["q_proj", "up_proj", "embed_tokens"],
    "gemma3": ["k_proj", "gate_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}
Tensors = dict[str, tuple[int, np.ndarray]]


def tensors_of(path: Path) -> Tensors:
    return {each.name: (int(each.tensor_type), np.array(each.data)) for each in gguf.GGUFReader(path).tensors}


def field(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, (kind, values) in one.items():
        assert (kind, values.shape) == (other[name][0], other[name][1].shape), name
        assert np.array_equal(values, other[name][1]), name


def made(folder: Path, name: str, targets: list[str] | None = None, **config: Any) -> tuple[Path, Path]:
    """A base and an adapter of PEFT, in folders."""
    with quiet():
        base = save_base(folder / "base", name)
        fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
        return base, train(folder / "adapter", base, 1, targets or TARGETS[name], **fan, **config)


@pytest.mark.parametrize("name", TARGETS)
def test_the_tensors_are_those_of_the_converter(name: str, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, name)
    merged = merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "peft.folder", rank=4)
    assert merged.rank == 4
    written = merging.merge(
        [adapter], method="passthrough", base=base, output=tmp_path / "a.gguf", format="gguf", rank=4
    )
    assert written.format == "gguf"
    reference = write_gguf_lora(tmp_path / "reference.gguf", tmp_path / "peft.folder", base)
    assert_equal(tensors_of(tmp_path / "a.gguf"), tensors_of(reference))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert field(tmp_path / "a.gguf", key) == field(reference, key)


@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
def test_experts_are_stacked(tmp_path: Path) -> None:
    base, adapter = made(
        tmp_path, "mixtral", ["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    options: dict[str, Any] = {"method": "passthrough", "base": base}
    merging.merge([adapter], output=tmp_path / "apart", experts="apart", rank=4, **options)
    merging.merge([adapter], output=tmp_path / "a.gguf", format="gguf", rank=4, **options)
    reference = write_gguf_lora(tmp_path / "reference.gguf", tmp_path / "apart", base)
    assert_equal(tensors_of(tmp_path / "a.gguf"), tensors_of(reference))
    merging.merge([tmp_path / "apart"], output=tmp_path / "b.gguf", format="gguf", rank=4, **options)
    assert_equal(tensors_of(tmp_path / "b.gguf"), tensors_of(reference))
    for number, given in enumerate((adapter, tmp_path / "a.gguf")):
        merging.merge([given], method="task_arithmetic", base=base, kind="model", output=tmp_path / str(number))
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in "01")
    assert all(torch.allclose(one[each], other[each], rtol=0, atol=1e-6) for each in one)


def test_experts_that_nobody_trained_are_zeros(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "mixtral", ["q_proj"])
    stored = load_file(adapter / "adapter_model.safetensors")
    expert = "base_model.model.model.layers.0.block_sparse_moe.experts.2.w1"
    stored |= {f"{expert}.lora_A.weight": torch.ones(4, 32), f"{expert}.lora_B.weight": torch.ones(48, 4)}
    save_file(stored, adapter / "adapter_model.safetensors")
    merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "a.gguf", format="gguf", rank=4)
    lower, upper = (tensors_of(tmp_path / "a.gguf")[f"blk.0.ffn_gate_exps.weight.lora_{each}"][1] for each in "ab")
    assert (lower.shape, upper.shape) == ((4, 4, 32), (4, 48, 4))
    products = upper @ lower
    assert [bool(np.any(each)) for each in products] == [False, False, True, False]


@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
def test_experts_of_several_ranks_are_refused(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "mixtral", ["q_proj"], target_parameters=["mlp.experts.down_proj"])
    merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "apart", experts="apart", rank=4)
    with pytest.raises(InputError, match=r"factors of the ranks \d to \d, and llama\.cpp stacks them: choose one rank"):
        merging.resize(tmp_path / "apart", output=tmp_path / "a.gguf", base=base, format="gguf", energy=0.7)


def test_unequal_ranks_have_one_alpha(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "qwen2", ["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    result = merging.resize(adapter, output=tmp_path / "a.gguf", base=base, format="gguf", energy=0.9999)
    ranks = {values.shape[-1] for name, (_, values) in tensors_of(tmp_path / "a.gguf").items() if name.endswith("b")}
    assert len(ranks) > 1
    assert field(tmp_path / "a.gguf", "adapter.lora.alpha") == max(ranks) == result.rank
    for number, given in enumerate((adapter, tmp_path / "a.gguf")):
        merging.merge([given], method="task_arithmetic", base=base, kind="model", output=tmp_path / str(number))
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in "01")
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    assert (one[name] - other[name]).norm() < 0.03 * (one[name] - before).norm()


def test_it_is_read_without_its_base_and_made_again(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", ["q_proj", "k_proj"])
    merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "folder", format="gguf")
    file = tmp_path / "folder" / "folder.gguf"
    assert sorted(each.name for each in (tmp_path / "folder").iterdir()) == ["README.md", "folder.gguf"]
    assert verify(str(tmp_path / "folder")).served
    merging.merge([tmp_path / "folder"], method="passthrough", output=tmp_path / "back", rank=4)
    merging.merge([adapter], method="passthrough", output=tmp_path / "once", rank=4)
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("back", "once"))
    assert all(torch.allclose(one[each], other[each], atol=1e-6) for each in one)
    merging.rerun(file, output=tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_llama_cpp_takes_it(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "qwen2", ["q_proj"])
    merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "a.gguf", format="gguf")
    assert verify(str(tmp_path / "a.gguf")).programs == ("llama.cpp",)
    findings = verify(str(tmp_path / "a.gguf"), ["llama.cpp", "peft"]).findings
    said = {(each.program, each.severity) for each in findings}
    assert ("llama.cpp", "ok") in said and ("peft", "refuses") in said
    assert describe_usage(tmp_path / "a.gguf") == f"llama-server -m MODEL.gguf --lora {tmp_path / 'a.gguf'}"


def test_types(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "qwen2", ["q_proj"])
    for dtype, kind in {"float16": 1, "bfloat16": 30, "float32": 0, "float64": 0}.items():
        out = tmp_path / f"{dtype}.gguf"
        merging.merge([adapter], method="passthrough", base=base, output=out, format="gguf", dtype=dtype)
        assert {each for each, _ in tensors_of(out).values()} == {kind}


def test_extracted(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "qwen2", ["q_proj", "up_proj"])
    merging.merge([adapter], method="task_arithmetic", base=base, kind="model", output=tmp_path / "tuned")
    merging.extract(
        tmp_path / "tuned", output=tmp_path / "a.gguf", base=base, format="gguf", rank=4, norms="base", biases="base",
        embeddings="base", heads="base",
    )  # fmt: skip
    merging.merge([tmp_path / "a.gguf"], method="task_arithmetic", base=base, kind="model", output=tmp_path / "again")
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("tuned", "again"))
    assert all(torch.allclose(one[each], other[each], atol=1e-4) for each in one)


REFUSED: dict[str, tuple[type[MergingError], str, dict[str, Any]]] = {
    "no base": (InputError, "depend on the architecture: give the model with base=", {"base": None}),
    "a model": (OutputError, "is not written as a GGUF file here: name a folder", {"kind": "model", "format": None}),
    "no format": (OutputError, 'is not written as a GGUF file here: add format="gguf"', {"format": None}),
    "another ending": (OutputError, "name a single file ending in .gguf, or a folder", {"output": "a.safetensors"}),
    "experts apart": (OptionError, "llama.cpp stacks experts: leave it out", {"experts": "apart"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    error, words, options = REFUSED[case]
    base, adapter = made(tmp_path, "qwen2", ["q_proj"])
    given = {"base": base, "output": "a.gguf", "format": "gguf", **options}
    method = "task_arithmetic" if given.get("kind") else "passthrough"
    with pytest.raises(error, match=words):
        merging.merge([adapter], method=method, **{**given, "output": tmp_path / given["output"]})


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_changes_that_llama_cpp_does_not_take(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", ["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head\.weight is changed in full, .* make a model with kind=\"model\""):
        merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "a.gguf", format="gguf")
    base, adapter = made(tmp_path / "tied", "llama-tied", ["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match=r"is embedding and head in one, and llama\.cpp loads no factors on either"):
        merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "a.gguf", format="gguf")
    base, adapter = made(tmp_path / "bert", "bert", ["query"])
    with pytest.raises(InputError, match=r"is of the type 'bert', and llama.cpp's names are known here of cohere, "):
        merging.merge([adapter], method="passthrough", base=base, output=tmp_path / "a.gguf", format="gguf")


def test_diffusion_models_have_no_names_in_llama_cpp(tmp_path: Path) -> None:
    """In a folder of diffusers, and in a file without a config."""
    module = "transformer_blocks.0.attn.to_q"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    files = [tmp_path / "base" / "diffusion_pytorch_model.safetensors", tmp_path / "base.safetensors"]
    for file in files:
        save_file({f"{module}.weight": torch.randn(8, 8)}, file)
    factors = {"lora_A.weight": torch.randn(2, 8), "lora_B.weight": torch.randn(8, 2)}
    lora = tmp_path / "lora.safetensors"
    save_file({f"transformer.{module}.{leaf}": value for leaf, value in factors.items()}, lora)
    for base in (tmp_path / "base", files[1]):
        with pytest.raises(InputError, match=r'a diffusion model, and llama\.cpp has none: leave format="gguf" out'):
            merging.merge([lora], method="passthrough", base=base, output=tmp_path / "a.gguf", format="gguf")
