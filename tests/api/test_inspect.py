"""`merge inspect` on a gallery of real files: one screen each that says what matters, or one message of why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import merging
from merging.cli.inspect import inspect_command
from support.adapters import LLAMA, QUIRKS, edit_config, edit_tensors, train
from support.architectures import build
from support.peft_types import TYPES, make
from support.pipelines import diffusion_pipeline, sentence_encoder
from support.serving_loras import UNET, kohya

pytestmark = [*QUIRKS, *TYPES]

Make = Callable[[Path], Path]
Facts = dict[str, str | tuple[str, ...]]


def model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Make:
    def make_model(folder: Path) -> Path:
        build(name, 0, dtype).save_pretrained(folder, **settings)
        return folder

    return make_model


def lora(**config: Any) -> Make:
    """A LoRA of a tiny Llama, which lies beside it."""
    return lambda folder: train(folder, model("llama")(folder.with_name("llama")), 1, LLAMA, **config)


def experts(folder: Path) -> Path:
    base = model("mixtral")(folder.with_name("mixtral"))
    return train(folder, base, 1, ["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])


def pickled(folder: Path) -> Path:
    """GPT-2 as older programs saved it: its tied head is in the file a second time."""
    folder.mkdir()
    gpt2 = build("gpt2", 0)
    torch.save(gpt2.state_dict(), folder / "pytorch_model.bin")
    gpt2.config.architectures = ["GPT2LMHeadModel"]
    gpt2.config.save_pretrained(folder)
    return folder


def fp8(folder: Path) -> Path:
    model("llama", torch.bfloat16)(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if ".self_attn." in name]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_head(folder: Path) -> Path:
    model("llama")(folder)
    state = load_file(folder / "model.safetensors")
    last = {name for name in state if "layers.1." in name}
    kept = {name: value for name, value in state.items() if name not in last}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def bare(folder: Path) -> Path:
    return Path(shutil.copy(model("llama")(folder) / "model.safetensors", folder.with_suffix(".safetensors")))


def loha(folder: Path) -> Path:
    factors = {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}
    state = {f"{UNET}.hada_{part}": torch.ones(shape) for part, shape in factors.items()}
    return saved(folder, state | {f"{UNET}.alpha": torch.tensor(1.0)})


def dotted(folder: Path) -> Path:
    state = {}
    for module, width in (
        ("unet.mid_block.attentions.0.proj_in", 8),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 6),
    ):
        state |= {f"{module}.lora_A.weight": torch.ones(2, width), f"{module}.lora_B.weight": torch.ones(8, 2)}
    return saved(folder, state, {"format": "pt"})


def large(folder: Path) -> Path:
    """More kinds of modules, ranks and alphas than have room on a screen."""
    state = {}
    for number in range(60):
        module = f"base_model.model.model.layers.{number}.some_rather_long_name_of_a_projection_{number}"
        state |= {
            f"{module}.lora_A.weight": torch.ones(1 + number, 8),
            f"{module}.lora_B.weight": torch.ones(8, 1 + number),
        }
    path = saved(folder / "adapter_model", state)
    ranks = {f"projection_{number}": 1 + number for number in range(60)}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "rank_pattern": {f".*{k}": v for k, v in ranks.items()}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path.parent


def saved(folder: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder.with_suffix(".safetensors")
    path.parent.mkdir(exist_ok=True)
    save_file(state, path, metadata)
    return path


def merged(folder: Path) -> Path:
    one, two = (train(folder.with_name(name), model("llama")(folder.with_name("llama")), seed, LLAMA)
                for seed, name in ((1, "one"), (2, "two")))  # fmt: skip
    return merging.merge([str(one), str(two)], method="lines", base=str(folder.with_name("llama")), output=folder).path


def merged_file(folder: Path) -> Path:
    base = model("llama")(folder.with_name("llama"))
    one = train(folder.with_name("one"), base, 1, LLAMA) / "adapter_model.safetensors"
    return merging.merge([str(one)] * 2, method="linear", output=folder.with_suffix(".safetensors")).path


def merged_model(folder: Path) -> Path:
    one, two = (model("llama")(folder.with_name(name)) for name in ("one", "two"))
    return merging.merge([str(one), str(two)], method="slerp", t=0.3, output=folder).path


GALLERY: dict[str, tuple[Make, Facts]] = {
    "Llama": (
        model("llama"),
        {
            "kind": "checkpoint", "architecture": "LlamaForCausalLM", "type": "llama", "library": "transformers",
            "files": "1", "format": "safetensors", "parameters": "21,664", "vocabulary": "96",
            "head": "lm_head.weight", "tensors": "21", "dtypes": "F32: 21", "layers": "model.layers: 2",
            "bytes": "86.7 kB",
        },
    ),
    "shards in bfloat16": (
        model("llama-tied", torch.bfloat16, max_shard_size="20KB"),
        {"files": "2", "head": "tied to the embedding", "dtypes": "BF16: 20", "bytes": "37.2 kB"},
    ),
    "FP8": (
        fp8,
        {
            "quantised": "F8_E4M3: 8", "dequantised": "8", "dtypes": "BF16: 21", "bytes": "37.2 kB",
            "notices": "its weights are quantised, and read with dequantize=True or quantize=\"keep\"",
        },
    ),
    "PyTorch's own format": (
        pickled,
        {
            "format": "PyTorch", "architecture": "GPT2LMHeadModel", "layers": "transformer.h: 2",
            "notices": ("a tied model stores its head", "lm_head.weight with transformer.wte.weight"),
        },
    ),
    "half a model": (without_head, {"notices": "blocks are missing, which would be random or an error: model"}),
    "bare file": (bare, {"kind": "checkpoint", "parameters": "21,664", "layers": "model.layers: 2"}),
    "T5": (
        model("t5"),
        {"architecture": "T5ForConditionalGeneration", "layers": "decoder.block: 2, encoder.block: 2"},
    ),
    "ViT": (model("vit"), {"architecture": "ViTForImageClassification", "layers": "vit.encoder.layer: 2"}),
    "Whisper": (
        model("whisper"),
        {"head": "tied to the embedding", "layers": "model.decoder.layers: 2, model.encoder.layers: 2"},
    ),
    "Mixtral": (model("mixtral"), {"architecture": "MixtralForCausalLM", "experts": "4", "parameters": "49,568"}),
    "pipeline": (
        lambda folder: diffusion_pipeline(folder, 0),
        {
            "architecture": "StableDiffusionPipeline", "library": "diffusers", "files": "3",
            "components": "text_encoder, unet, vae", "layers": ("unet.down_blocks: 2", "and 1 more"),
        },
    ),
    "sentence-transformers": (
        lambda folder: sentence_encoder(folder, 0),
        {"architecture": "BertModel", "library": "sentence-transformers", "components": "2_Dense", "files": "2"},
    ),
    "merged model": (merged_model, {"kind": "checkpoint", "merged by": "slerp", "merged from": ("/one, ", "/two")}),
    "LoRA": (
        lora(),
        {
            "kind": "adapter (PEFT LORA)", "about": "low-rank factors", "base": "/llama", "rank": "4", "scales": "1.5",
            "targets": "6", "read as": "factors: 6", "modules": "k_proj, q_proj, up_proj", "needs base": "none",
            "tensors": "12", "layers": "model.layers: 2", "bytes": "6.1 kB",
        },
    ),
    "DoRA": (
        lora(use_dora=True),
        {
            "about": "low-rank factors, DoRA", "read as": "full tensors: 6",
            "needs base": "DoRA gives every output of the base's weight a new length",
        },
    ),
    "rsLoRA": (
        lora(use_rslora=True, rank_pattern={"q_proj": 2}),
        {"about": "low-rank factors, rsLoRA", "rank": "2, 4", "scales": "3, 4.243"},
    ),
    "PiSSA": (
        lora(init_lora_weights="pissa"),
        {"rank": "8", "needs base": "pissa took a part of the base's weight away at the start"},
    ),
    "LoRA and a head in full": (
        lora(modules_to_save=["lm_head"]),
        {
            "about": "low-rank factors, modules saved in full", "read as": "factors: 6, full tensors: 1",
            "modules": "k_proj, lm_head, q_proj, up_proj", "needs base": "it is saved in full",
        },
    ),
    "LoRA of experts": (experts, {"about": "experts or other parameters", "modules": "experts, q_proj"}),
    "LoRA in a bare file": (
        lambda folder: edit_tensors(lora()(folder), dict) / "adapter_model.safetensors",
        {"kind": "adapter (PEFT LORA)", "rank": "4", "scales": "1.5"},
    ),
    "LoRA without a config": (
        lambda folder: (lora()(folder) / "adapter_model.safetensors").rename(folder.with_suffix(".safetensors")),
        {"kind": "adapter (PEFT LORA)", "scales": "1", "notices": ("carries no config", "lora_alpha=")},
    ),
    "IA3": (lambda folder: make(folder, "IA3"), {"kind": "PEFT IA3", "needs base": "IA3 scales the base's weight"}),
    "OFT": (lambda folder: make(folder, "OFT"), {"kind": "PEFT OFT", "needs base": "OFT turns the base's weight"}),
    "VeRA": (
        lambda folder: make(folder, "VeRA"),
        {"kind": "adapter (PEFT VERA)", "about": "shared random factors, scaled", "tensors": "18"},
    ),
    "LoHa": (
        lambda folder: make(folder, "LoHa"),
        {"kind": "adapter (PEFT LOHA)", "about": "the product of two low-rank matrices, entry by entry", "rank": "9"},
    ),
    "LoKr": (
        lambda folder: make(folder, "LoKr"),
        {"kind": "adapter (PEFT LOKR)", "about": "the Kronecker product of two small matrices"},
    ),
    "merged adapter": (
        merged,
        {"merged by": "lines+task_arithmetic", "merged from": ("/one, ", "/two"), "base": "/llama", "rank": "8"},
    ),
    "merged file": (merged_file, {"merged by": "linear", "rank": "8", "scales": "1", "base": "/llama"}),
    "many ranks": (large, {"rank": ("1, 2, 3", "and "), "layers": "model.layers: 60"}),
    "Kohya's LoRA": (
        lambda folder: kohya(folder, ss_base_model_version="sd_v1-5"),
        {"kind": "adapter (Kohya)", "base": "sd_v1-5", "rank": "2", "scales": "0.5", "parts": "lora_unet: 1",
         "modules": "attn1_to_q"},
    ),
    "Kohya's LoHa": (loha, {"kind": "adapter (Kohya)", "rank": "4", "read as": "full tensors: 1"}),
    "diffusers' LoRA": (
        dotted,
        {"kind": "adapter (diffusers)", "parts": "text_encoder: 1, unet: 1", "modules": "fc1, proj_in", "rank": "2"},
    ),
}  # fmt: skip


def shown(path: Path) -> dict[str, str]:
    """The facts on the screen, which they fit on, by their names."""
    done = CliRunner().invoke(inspect_command, [str(path)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    # names of folders of tests are long, and are not cut
    assert all(len(line) <= 110 or str(path.parent) in line for line in lines)
    assert lines[0] == str(path)
    facts: dict[str, str] = {}
    label = ""
    for line in lines[1:]:
        label = line[2:16].strip() or label
        facts[label] = f"{facts.get(label, '')} {line[16:]}".strip()
    return facts


@pytest.mark.parametrize("name", GALLERY)
def test_gallery(name: str, tmp_path: Path) -> None:
    make_it, facts = GALLERY[name]
    told = shown(make_it(tmp_path / "thing"))
    for label, wanted in facts.items():
        for text in (wanted,) if isinstance(wanted, str) else wanted:
            assert text in told[label] if len(text) > 3 else text in told[label].split(", "), (label, told)


def gguf(path: Path) -> Path:
    path.with_suffix(".gguf").write_bytes(b"GGUF" + bytes(60))
    return path.with_suffix(".gguf")


def text(content: str) -> Make:
    def make_file(path: Path) -> Path:
        path.with_suffix(".safetensors").write_text(content)
        return path.with_suffix(".safetensors")

    return make_file


def cut(path: Path) -> Path:
    file = bare(path)
    file.write_bytes(file.read_bytes()[:-5])
    return file


def four_bits(folder: Path) -> Path:
    return edit_config_json(model("llama")(folder), {"quant_method": "hqq", "bits": 4})


def edit_config_json(folder: Path, stated: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return folder


REFUSED: dict[str, tuple[Make, str]] = {
    "GGUF": (gguf, "its version of the format is 0"),
    "empty": (lambda path: saved(path, {}), "holds no tensors"),
    "truncated": (cut, "truncated: has 88,755 bytes of 88,760: download it again"),
    "HTML": (text("<!DOCTYPE html><html><body>Sign in</body></html>"), "is an HTML or XML page, not the file"),
    "Git LFS": (text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"), "run git lfs pull"),
    "4 bits": (four_bits, "is quantised (hqq, says its config)"),
    "wrong rank": (lambda folder: edit_config(lora()(folder), r=5), "has rank 4, and its config says 5"),
    "folder": (lambda path: path.mkdir() or path, "holds no weights: none of model.safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_message(name: str, tmp_path: Path) -> None:
    make_it, message = REFUSED[name]
    path = make_it(tmp_path / "thing")
    done = CliRunner().invoke(inspect_command, [str(path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {path}")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_json_has_every_fact(tmp_path: Path) -> None:
    paths = [str(model("llama")(tmp_path / "m")), str(lora()(tmp_path / "a"))]
    one, two = json.loads(CliRunner().invoke(inspect_command, [*paths, "--json", "--values"]).stdout)
    assert (one["path"], one["vocabulary"], one["nonfinite"], one["notices"]) == (paths[0], 96, [], [])
    assert (two["path"], two["rank"], two["scales"], two["merged_from"]) == (paths[1], 4, [1.5], [])
