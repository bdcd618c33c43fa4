"""Quantised outputs: held against transformers' own code, and to the bytes of the base where nothing changes."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import merging
from merging.errors import FormatError, InputError, OptionError
from merging.hub.open_model import open_model
from merging.sources.checkpoint import Checkpoint
from support.commands import ok, refused
from support.paths import TESTS
from support.tiny import identical, load

SIZES = {"vocab_size": 40, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128}
OSS = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
OSS_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
UP = "model.layers.0.mlp.up_proj.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, a mixture of experts and a gpt-oss in bfloat16, and a LoRA of each on one weight."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)),
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **HEADS, **EXPERTS)),
        "oss": GptOssForCausalLM(GptOssConfig(**OSS, **OSS_HEADS, num_local_experts=2, num_experts_per_tok=1)),
    }
    for name, model in made.items():
        model.bfloat16().save_pretrained(root / name)
    lora(root / "lora", "model.layers.0.mlp.up_proj", (256, 128), base=str(root / "llama"))
    lora(root / "moe-lora", "model.layers.0.mlp.experts.1.up_proj", (128, 128), base=str(root / "moe"))
    lora(root / "oss-lora", "model.layers.0.self_attn.q_proj", (32, 64), base=str(root / "oss"))
    return root


def lora(folder: Path, module: str, shape: tuple[int, int], base: str) -> Path:
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(3)
    factors = {"A": torch.randn(2, shape[1], generator=random) / 9, "B": torch.randn(shape[0], 2, generator=random) / 9}
    save_file(
        {f"base_model.model.{module}.lora_{each}.weight": value for each, value in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def numbers(folder: Path) -> dict[str, Tensor]:
    """The numbers that we say a quantised model stands for."""
    model = open_model(folder, dequantize=True)
    assert isinstance(model, Checkpoint)
    return {name: stored.read() for name, stored in model.tensors.items()}


def loaded(folder: Path) -> dict[str, Tensor]:
    """The weights of a model as transformers dequantises them on a CPU, every one found and none left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)
    assert not any(report.values())
    return dict(model.state_dict())


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# ---- new formats


def test_fp8_is_what_transformers_reads(root: Path, tmp_path: Path) -> None:
    exact = merging.bake([root / "lora"], output=tmp_path / "exact", dtype="float32")
    made = merging.bake([root / "lora"], output=tmp_path / "fp8", quantize="fp8")
    ours, theirs = numbers(made.path), loaded(made.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stored = load(made.path)
    assert stored[UP].dtype == torch.float8_e4m3fn
    assert stored[UP + "_scale_inv"].shape == (2, 1)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    want = load(exact.path)
    assert len(made.quantization_errors) == 7
    for name, error in made.quantization_errors.items():
        assert error == pytest.approx(relative_error(stored_numbers(stored, name), want[name]), rel=1e-3)
        assert error < 0.03
    assert any(notice.startswith("7 weights quantised as FP8 in blocks: ") for notice in made.notices)
    assert config_of(made.path)["quantization_config"]["weight_block_size"] == [128, 128]
    assert "lm_head" in config_of(made.path)["quantization_config"]["modules_to_not_convert"]


def stored_numbers(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Codes times the scales of their blocks, by the definition."""
    codes, scales = tensors[name].float(), tensors[name + "_scale_inv"]
    return codes * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


@pytest.mark.exhaustive
def test_fp8_of_experts_is_what_transformers_reads(root: Path, tmp_path: Path) -> None:
    made = merging.bake([root / "moe-lora"], output=tmp_path / "fp8", quantize="fp8")
    ours, theirs = numbers(made.path), loaded(made.path)
    stacked = theirs["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(stacked[1, 128:], ours["model.layers.0.mlp.experts.1.up_proj.weight"])
    assert torch.equal(stacked[0, :128], ours["model.layers.0.mlp.experts.0.gate_proj.weight"])
    left = config_of(made.path)["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.mlp.gate" in left
    assert ours["model.layers.0.mlp.gate.weight"].equal(theirs["model.layers.0.mlp.gate.weight"])


@pytest.mark.parametrize(("format", "grid"), [("fp8-channel", (256, 1)), ("fp8-tensor", (1,))])
def test_compressed_tensors(root: Path, tmp_path: Path, format: Any, grid: tuple[int, ...]) -> None:
    """The names, shapes and types that vLLM and compressed-tensors read; their own code is run elsewhere."""
    made = merging.bake([root / "lora"], output=tmp_path / "out", quantize=format)
    stored = load(made.path)
    scale = stored[UP + "_scale"]
    assert (stored[UP].dtype, scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, torch.bfloat16, grid)
    stated = config_of(made.path)["quantization_config"]
    assert (stated["quant_method"], stated["format"]) == ("compressed-tensors", "float-quantized")
    assert stated["config_groups"]["group_0"]["weights"]["strategy"] == format.removeprefix("fp8-")
    assert stated["ignore"] == ["lm_head", "model.embed_tokens"]
    assert torch.equal(numbers(made.path)[UP], (stored[UP].float() * scale.float()).bfloat16())


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("format", ["fp8-channel", "fp8-tensor"])
def test_compressed_tensors_itself_reads_the_same(root: Path, tmp_path: Path, format: Any) -> None:
    made = merging.bake([root / "lora"], output=tmp_path / "out", quantize=format)
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.bfloat16)
    model(torch.arange(8)[None])  # weights are decompressed when they are first used
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in numbers(made.path).items())


def test_mxfp4_is_what_transformers_reads(root: Path, tmp_path: Path) -> None:
    made = merging.bake([root / "oss-lora"], output=tmp_path / "out", quantize="mxfp4")
    ours, theirs = numbers(made.path), loaded(made.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(made.quantization_errors) == {name for name in ours if name.endswith(("gate_up_proj", "down_proj"))}
    want = load(root / "oss")[GATE_UP]
    assert made.quantization_errors[GATE_UP] == pytest.approx(relative_error(ours[GATE_UP], want), rel=1e-3)
    assert made.quantization_errors[GATE_UP] < 0.13
    assert config_of(made.path)["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.exhaustive
def test_sizes_that_are_not_divided_stay_in_16_bits(root: Path, tmp_path: Path) -> None:
    """And with them what servers fuse with them; the config says so, so that transformers reads them."""
    torch.manual_seed(1)
    odd = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**SIZES, **odd)).bfloat16().save_pretrained(tmp_path / "odd")
    made = merging.merge([tmp_path / "odd"], method="linear", output=tmp_path / "out", quantize="fp8")
    stored = load(made.path)
    attention = "model.layers.0.self_attn."
    assert stored[f"{attention}q_proj.weight"].dtype == torch.bfloat16
    assert stored[f"{attention}o_proj.weight"].dtype == torch.float8_e4m3fn
    assert any("3 weights stay in 16 bits, as 128 does not" in notice for notice in made.notices)
    assert all(torch.equal(value, loaded(made.path)[name]) for name, value in numbers(made.path).items())


# ---- keep


@pytest.mark.parametrize(
    "format", ["fp8", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("fp8-tensor", "fp8-channel"))]
)
def test_keep_copies_what_nothing_changes(root: Path, tmp_path: Path, format: Any) -> None:
    """Codes and scales bit for bit; the changed weight has the format of the base, and the config is the base's."""
    base = merging.merge([root / "llama"], method="linear", output=tmp_path / "base", quantize=format).path
    kept = merging.bake([root / "lora"], base=base, output=tmp_path / "kept", quantize="keep")
    before, after = load(base), load(kept.path)
    changed = {name for name in before if not identical({name: before[name]}, {name: after[name]})}
    scale = UP + ("_scale_inv" if format == "fp8" else "_scale")
    assert before.keys() == after.keys()
    assert changed <= {UP, scale}
    assert UP in changed
    assert list(kept.quantization_errors) == [UP]
    assert "6 quantised weights copied as they are" in " ".join(kept.notices)
    assert config_of(kept.path) == config_of(base)
    exact = merging.bake([root / "lora"], base=base, output=tmp_path / "exact", quantize="none", dtype="float32")
    want, got = load(exact.path)[UP], numbers(kept.path)[UP]
    assert relative_error(got, want) == pytest.approx(kept.quantization_errors[UP], rel=0.1)
    again = merging.merge([base], method="linear", output=tmp_path / "again", quantize=format)
    assert identical(load(again.path), before)


def test_keep_of_mxfp4(root: Path, tmp_path: Path) -> None:
    base = merging.merge([root / "oss"], method="linear", output=tmp_path / "base", quantize="mxfp4").path
    kept = merging.bake([root / "oss-lora"], base=base, output=tmp_path / "kept", quantize="keep")
    before, after = load(base), load(kept.path)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    assert not kept.quantization_errors
    assert "2 quantised weights copied as they are" in kept.notices
    other = dict(load(root / "oss"))
    other[GATE_UP] = other[GATE_UP] * 1.1
    save_model(tmp_path / "other", root / "oss", other)
    merged = merging.merge([base, tmp_path / "other"], method="linear", output=tmp_path / "merged", quantize="keep")
    want = (numbers(base)[GATE_UP].float() + other[GATE_UP].float()) / 2
    assert merged.quantization_errors[GATE_UP] == pytest.approx(relative_error(numbers(merged.path)[GATE_UP], want))


def save_model(folder: Path, like: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    return folder


def test_blocks_that_nothing_changes_keep_their_codes(root: Path, tmp_path: Path) -> None:
    """Also in a weight that is changed elsewhere: here in its first 128 rows alone."""
    base = merging.merge([root / "llama"], method="linear", output=tmp_path / "base", quantize="fp8").path
    tensors = load_file(base / "model.safetensors")
    tensors[UP][128:] = (torch.randn(128, 128) * 9).to(torch.float8_e4m3fn)  # far from the largest code
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    factors = load_file(root / "lora" / "adapter_model.safetensors")
    up = next(name for name in factors if "lora_B" in name)
    factors[up][128:] = 0
    half = lora(tmp_path / "half", "model.layers.0.mlp.up_proj", (256, 128), base=str(base))
    save_file(factors, half / "adapter_model.safetensors")
    kept = load(merging.bake([half], output=tmp_path / "kept", quantize="keep").path)
    assert torch.equal(kept[UP][128:].float(), tensors[UP][128:].float())  # but for signs of zeros
    assert torch.equal(kept[UP + "_scale_inv"][1], tensors[UP + "_scale_inv"][1])
    assert not torch.equal(kept[UP][:128].view(torch.uint8), tensors[UP][:128].view(torch.uint8))


def integers(folder: Path, base: Path) -> Path:
    """A Llama whose first up projection has 8-bit integers with scales by row, as compressed-tensors stores them."""
    tensors = load(base)
    weight = tensors.pop(UP).float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    tensors |= {UP: (weight / scale).round().to(torch.int8), UP + "_scale": scale.bfloat16()}
    tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor([0.5])
    save_model(folder, base, tensors)
    stated = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (folder / "config.json").write_text(json.dumps(config_of(base) | {"quantization_config": stated}))
    return folder


def test_keep_of_integers_and_scales_of_activations(root: Path, tmp_path: Path) -> None:
    base = integers(tmp_path / "base", root / "llama")
    made = merging.bake([root / "lora"], base=base, output=tmp_path / "out", quantize="keep")
    stored = load(made.path)
    assert stored.keys() == load(base).keys()
    assert stored[UP].dtype == torch.int8
    assert made.quantization_errors[UP] < 0.01
    assert any("scales of activations (model.layers.0.mlp.up_proj.input_scale) are base's" in n for n in made.notices)


# ---- the same bytes, sizes and memory


def test_bytes_do_not_depend_on_threads_and_shards(root: Path, tmp_path: Path) -> None:
    one = merging.bake([root / "lora"], output=tmp_path / "one", quantize="fp8", threads=1)
    more = merging.bake([root / "lora"], output=tmp_path / "more", quantize="fp8", threads=3, shard_size=60_000)
    assert len(list(more.path.glob("model-*.safetensors"))) > 2
    assert identical(load(one.path), load(more.path))
    index = json.loads((more.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == more.bytes == one.bytes


def test_sizes_are_known_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "linear", "quantize": "fp8", "base": root / "llama"}
    plan = merging.preview([root / "llama"], **options)
    made = merging.merge([root / "llama"], output=tmp_path / "out", **options)
    assert plan.out_bytes == made.bytes == sum(value.nbytes for value in load(made.path).values())
    assert len(plan.outs) == made.tensors == len(load(made.path))


def test_it_is_made_again_by_rerun(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = ok("bake", str(root / "lora"), "-o", "out", "--quantize", "fp8", "--json")
    errors = json.loads(printed.stdout)["quantization_errors"]
    assert len(errors) == 7
    assert "has the same bytes" in ok("rerun", "out", "-o", "again").output
    recipe = ok("bake", str(root / "lora"), "--quantise", "fp8", "--recipe-only").stdout
    assert "quantize: fp8" in recipe
    Path("recipe.yml").write_text(recipe)
    ok("run", "recipe.yml", "-o", "ran")
    assert identical(load(tmp_path / "ran"), load(tmp_path / "out"))
    ok("run", "recipe.yml", "--set", "quantize=fp8-tensor", "-o", "by-tensor")
    assert load(tmp_path / "by-tensor")[UP + "_scale"].shape == (1,)


def test_none_is_dequantize(root: Path, tmp_path: Path) -> None:
    base = merging.merge([root / "llama"], method="linear", output=tmp_path / "base", quantize="fp8").path
    recipes = [
        merging.Recipe(models=[str(base)], method="linear", **options)
        for options in ({"quantize": "none"}, {"dequantize": True})
    ]
    assert recipes[0] == recipes[1]
    assert recipes[0].to_dict() == {"models": [str(base)], "method": "linear", "dequantize": True}
    made = recipes[0].run(tmp_path / "out")
    assert identical(load(made.path), numbers(base))
    assert "quantization_config" not in config_of(made.path)


# ---- refused


def test_refusals(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama, adapter = root / "llama", root / "lora"
    with pytest.raises(InputError, match=r"llama: has no quantised weights in a format that could be kept: use qu"):
        merging.bake([adapter], output="out", quantize="keep")
    with pytest.raises(
        OptionError, match="quantize= is of a full model, and this merge makes an adapter: leave it out"
    ):
        merging.merge([adapter], method="linear", output="out", quantize="fp8")
    with pytest.raises(
        InputError, match='mxfp4" is for experts of gpt-oss, with inputs that 32 divides, and there are'
    ):
        merging.merge([llama], method="linear", output="out", quantize="mxfp4")
    save_model(tmp_path / "unet", llama, {"proj.weight": torch.ones(128, 128)})
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(OptionError, match='quantize="fp8" is for models of transformers, which unet is not: leave it'):
        merging.merge(["unet"], method="linear", output="out", quantize="fp8")
    inner = merging.Recipe(models=[str(llama)], method="linear", quantize="fp8")
    with pytest.raises(OptionError, match=r"models.0: quantize= is for the output of the whole recipe: give it there"):
        merging.merge([inner], method="linear", output="out")
    with pytest.raises(OptionError, match=r"quantize = 'int4': should be 'keep', 'fp8', .*, 'mxfp4' or 'none'"):
        merging.merge([llama], method="linear", output="out", quantize="int4")  # type: ignore[arg-type]
    printed = refused("--method", "linear", str(llama), "--quantize", "int4", "-o", "out", code=2)
    assert "'int4' is not one of 'keep', 'fp8'" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(root: Path, tmp_path: Path, value: float) -> None:
    """A code of E4M3 would hold NaN, but the scale of its block would be lost; nothing is written."""
    tensors = load(root / "llama")
    tensors[UP][3, 5] = value
    model = save_model(tmp_path / "m", root / "llama", tensors)
    with pytest.raises(InputError, match="holds NaN or infinite values, which would spread over the merge"):
        merging.merge([model], method="linear", output=tmp_path / "out", quantize="fp8")
    with pytest.raises(InputError, match=f"{UP}: holds NaN or infinite values, which FP8 in blocks cannot hold"):
        merging.merge([model], method="linear", output=tmp_path / "out", quantize="fp8", allow_nonfinite=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_copied_codes_that_are_not_finite(root: Path, tmp_path: Path, part: str) -> None:
    base = merging.merge([root / "llama"], method="linear", output=tmp_path / "base", quantize="fp8").path
    tensors = load_file(base / "model.safetensors")
    other = UP.replace("up_proj", "gate_proj")
    if part == "codes":
        tensors[other].view(torch.uint8)[7, 7] = 0x7F
    else:
        tensors[other + "_scale_inv"][1, 0] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{other}.* holds NaN or infinite values"):
        merging.bake([root / "lora"], base=base, output=tmp_path / "out", quantize="keep")
    made = merging.bake([root / "lora"], base=base, output=tmp_path / "out", quantize="keep", allow_nonfinite=True)
    assert identical({other: load(made.path)[other]}, {other: tensors[other]})


def test_copied_exponents_that_stand_for_no_number(root: Path, tmp_path: Path) -> None:
    base = merging.merge([root / "oss"], method="linear", output=tmp_path / "base", quantize="mxfp4").path
    tensors = load_file(base / "model.safetensors")
    tensors[GATE_UP + "_scales"][1, 2, 1] = 255
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{GATE_UP}_scales holds NaN or infinite values"):
        merging.bake([root / "oss-lora"], base=base, output=tmp_path / "out", quantize="keep")


def test_a_scale_is_missing(root: Path, tmp_path: Path) -> None:
    base = merging.merge([root / "llama"], method="linear", output=tmp_path / "base", quantize="fp8").path
    tensors = load_file(base / "model.safetensors")
    del tensors[UP + "_scale_inv"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"{UP} holds F8_E4M3 codes without their scales"):
        merging.bake([root / "lora"], base=base, output=tmp_path / "out", quantize="keep")


def test_keep_of_a_format_that_is_not_written(root: Path, tmp_path: Path) -> None:
    """Weights in 4 bits of bitsandbytes are copied, and refused where they change."""
    recorded = load_file(TESTS / "golden" / "bitsandbytes.safetensors")
    case = "nf4.bfloat16.double.uint8/"
    shape = tuple(recorded[case + "wanted"].shape)
    tensors = load(root / "llama")
    del tensors[UP]
    parts = {
        UP + name.removeprefix(case + "weight"): each for name, each in recorded.items() if case + "weight" in name
    }
    base = save_model(tmp_path / "base", root / "llama", tensors | parts)
    adapter = lora(tmp_path / "one", "model.layers.0.mlp.down_proj", (128, 256), base=str(base))
    kept = load(merging.bake([adapter], output=tmp_path / "kept", quantize="keep").path)
    assert identical({name: kept[name] for name in parts}, parts)
    adapter = lora(tmp_path / "two", "model.layers.0.mlp.up_proj", (shape[0], shape[1]), base=str(base))
    with pytest.raises(InputError, match=f'{UP} changes, and quantize="keep" does not write its format'):
        merging.bake([adapter], output=tmp_path / "out", quantize="keep")


def pipeline(folder: Path, seed: int) -> Path:
    """A pipeline of two models in FP8 without scales, with a scale of activations each."""
    random = torch.Generator().manual_seed(seed)
    for name in ("unet", "vae"):
        values = (torch.randn(16, 16, generator=random) * 9).to(torch.float8_e4m3fn)
        (folder / name).mkdir(parents=True)
        tensors = {"proj.weight": values, "proj.input_scale": torch.tensor([0.5]), "proj.bias": torch.ones(16).half()}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    parts = {name: ["diffusers", "AutoencoderKL"] for name in ("unet", "vae")}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **parts}))
    return folder


def test_keep_of_one_component(tmp_path: Path) -> None:
    """The other is copied with its file, and both keep what belongs to their quantised weights."""
    base, tuned = pipeline(tmp_path / "base", 1), pipeline(tmp_path / "tuned", 2)
    options: dict[str, Any] = {"base": base, "components": "unet", "quantize": "keep"}
    made = merging.merge([tuned], method="task_arithmetic", output=tmp_path / "out", **options)
    got, want = load(made.path / "unet"), load(tuned / "unet")
    assert identical(got, want)
    assert made.quantization_errors == {"unet.proj.weight": 0}
    assert identical(load(made.path / "vae"), load(base / "vae"))
