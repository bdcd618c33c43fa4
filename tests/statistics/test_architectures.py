"""Statistics of models of images and of two parts, against inputs seen by transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import merging
from merging.errors import FormatError, InputError
from merging.maths.layer_statistics import InputGram
from merging.sources.statistics_file import REST, StoredStatistics, open_statistics
from merging.statistics.layers import find_layers
from merging.statistics.naming import name_as_stored
from merging.statistics.writing import GatheredLayers
from support.adapters import quiet
from support.architectures import build
from support.example_statistics import save_runnable, write_texts

pytestmark = pytest.mark.exhaustive

TOWERS = {
    "vit": ("ViTImageProcessor", "vit.encoder.layer.1.output.dense", "vit.layers.1.mlp.fc2"),
    "clip": ("CLIPImageProcessor", "vision_model.encoder.layers.1.mlp.fc2", ""),
}
"""The image processor of a model, a layer's name on the disk, and its name in memory if that is another one."""
RENAMED = ["vit", "dinov2", "swin", "segformer", "llava", "mixtral", "granite-moe", "qwen3-moe", "phi3", "gpt2", "t5"]
"""Architectures that transformers renames, joins or stacks in loading, and some that it does not."""


@pytest.mark.parametrize("architecture", RENAMED)
def test_names_on_the_disk(architecture: str, tmp_path: Path) -> None:
    """Every layer has a tensor there, and values of all parameters become the very tensors of the file."""
    with quiet():
        network = build(architecture, 3)
        network.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    values = {name: value.detach() for name, value in network.named_parameters()}
    gram = InputGram(torch.ones(1, 1), torch.ones(1))
    layers = [layer.name for layer in find_layers(network)]
    shared = dict.fromkeys(layers[1:2], layers[0])
    gathered = GatheredLayers({name: gram for name in layers if name not in shared}, shared, values)
    named = name_as_stored(gathered, network, {name: tuple(value.shape) for name, value in disk.items()})
    assert len(named.grams) + len(named.shared) >= len(layers)
    assert named.grams.keys() | named.shared.keys() <= disk.keys()
    assert set(named.shared.values()) <= named.grams.keys()
    assert named.fisher.keys() >= {name for name, value in disk.items() if value.dim() == 2}
    assert all(torch.equal(value, disk[name]) for name, value in named.fisher.items())


def write_images(folder: Path, count: int, seed: int) -> Path:
    draw = numpy.random.default_rng(seed)
    for number in range(count):
        path = folder / ("deep" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=numpy.uint8)).save(path)
    (folder / "labels.csv").write_text("not an image")
    return folder


def save_tower(folder: Path, architecture: str) -> tuple[Path, list[Path]]:
    with quiet():
        processor = getattr(transformers, TOWERS[architecture][0])(
            size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}
        )
        paths = [folder / name for name in ("base", "one", "two")]
        model = build(architecture, 5)
        for seed, path in enumerate(paths):
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for value in model.parameters():
                    value.add_(0.02 * torch.randn(value.shape, generator=draw) if seed else 0)
            model.save_pretrained(path)
            processor.save_pretrained(path)
    return paths[0], paths[1:]


def watch(network: Any, name: str, seen: list[Tensor]) -> None:
    network.get_submodule(name).register_forward_hook(
        lambda module, given, out: seen.append(given[0].detach().flatten(0, -2))
    )


def check(file: Path, name: str, seen: list[Tensor]) -> None:
    opened = open_statistics(file)
    (stored,) = [each for each in opened.layers(REST) if each.endswith(f"{name}.weight")]
    gram = StoredStatistics(opened, opened.layers(REST)[stored], None).read_inputs()
    assert gram is not None
    x = torch.cat(seen).double()
    assert torch.allclose(gram.dense(), x.T @ x / len(x), atol=2e-3 * float(x.square().mean()) + 1e-6)


@pytest.mark.parametrize("architecture", TOWERS)
def test_images(architecture: str, tmp_path: Path) -> None:
    base, tuned = save_tower(tmp_path, architecture)
    data = [write_images(tmp_path / f"images{number}", 5, number) for number in range(2)]
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for model, images, file in zip(tuned, data, files, strict=True):
        found = merging.collect_statistics(model, images, file, fisher="sampled" if architecture == "vit" else None)
        assert (found.examples, found.tokens) == (5, 0)
    with quiet():
        network = getattr(transformers, json.loads((tuned[0] / "config.json").read_text())["architectures"][0])
        network = network.from_pretrained(tuned[0]).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(tuned[0])
    _, name, renamed = TOWERS[architecture]
    seen: list[Tensor] = []
    watch(network, renamed if renamed in dict(network.named_modules()) and renamed else name, seen)
    for path in sorted(data[0].rglob("*.png")):
        with Image.open(path) as image, torch.no_grad():
            pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
            (network.get_image_features if architecture == "clip" else network)(pixel_values=pixels)
    check(files[0], name, seen)
    for method in ("regmean", "esm"):
        merged = merging.merge(tuned, method=method, base=base, stats=files, output=tmp_path / method)
        assert any("without statistics" in each for each in merged.notices) == (architecture == "clip"), "its text part"
    through = merging.collect_merged_statistics(tuned, data, tmp_path / "through", base=base)
    merging.merge(tuned, method="regmean", base=base, stats=[each.path for each in through], output=tmp_path / "out")


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    _, (model, _) = save_tower(tmp_path, "vit")
    output = tmp_path / "s.safetensors"
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: holds no images"):
        merging.collect_statistics(model, tmp_path / "none", output)
    images = write_images(tmp_path / "images", 2, 0)
    (images / "0.png").write_bytes(b"\x89PNG cut off")
    with pytest.raises(FormatError, match=r"0\.png: is no image that can be read"):
        merging.collect_statistics(model, images, output)
    (images / "0.png").unlink()
    (images / "0.png").symlink_to(tmp_path / "base" / "config.json")
    with pytest.raises(FormatError, match=r"0\.png: is a link out of its folder"):
        merging.collect_statistics(model, images, output)
    assert not output.exists()


@pytest.mark.parametrize("completions", [False, True])
def test_encoder_and_decoder(completions: bool, tmp_path: Path) -> None:
    """The prompt goes to the encoder, and the completion, or the prompt again, to the decoder."""
    _, (model, _) = save_runnable(tmp_path, "t5")
    data = write_texts(tmp_path / "texts.jsonl", count=4)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    if completions:
        lines = [{**line, "completion": " ".join(line["text"].split()[:3])} for line in lines]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "s.safetensors"
    found = merging.collect_statistics(model, data, file, fisher="labels")
    assert (found.examples, found.tokens) == (4, 24)
    with quiet():
        network = transformers.T5ForConditionalGeneration.from_pretrained(model).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    names = ["encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.1.layer.1.EncDecAttention.q"]
    names.append("decoder.block.0.layer.1.EncDecAttention.k")
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        watch(network, name, seen[name])
    for line in lines:
        labels = torch.tensor([tokenizer(line.get("completion", line["text"]))["input_ids"]])
        with torch.no_grad():
            network(input_ids=torch.tensor([tokenizer(line["text"])["input_ids"]]), labels=labels)
    for name in names:
        check(file, name, seen[name])
