"""A tiny CLIP, and fine-tunes and LoRAs of it for three synthetic tasks, in the folder that vision.py reads."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, PreTrainedTokenizerFast

__all__ = ["TASKS", "save_image_tasks"]

SIZE = 16
TASKS = {"color": ["blue", "green", "red"], "ground": ["dark", "light"], "shape": ["bar", "disc", "frame"]}
TEMPLATES = ["a picture of {}", "{} thing"]
WORDS = ["<start>", "<end>", "a", "picture", "of", "thing", *(name for names in TASKS.values() for name in names)]
EXAMPLES = {"train": 40, "test": 20}  # of each class


def _draw(task: str, name: str, draws: random.Random) -> Image.Image:
    """A picture of a class, with all else drawn by chance."""
    chosen = {each: draws.choice(names) for each, names in TASKS.items()} | {task: name}
    ground = 0 if chosen["ground"] == "dark" else 100
    image = Image.new("RGB", (SIZE, SIZE), tuple(ground + draws.randrange(50) for _ in range(3)))
    shade = draws.randrange(170, 256)
    color = tuple(shade if chosen["color"] == each else draws.randrange(40) for each in ("red", "green", "blue"))
    left, top = draws.randrange(9), draws.randrange(8)
    box = (left, top, left + 6, top + 7)
    pencil = ImageDraw.Draw(image)
    if chosen["shape"] == "bar":
        pencil.rectangle((left + 2, top, left + 4, top + 7), fill=color)
    elif chosen["shape"] == "disc":
        pencil.ellipse(box, fill=color)
    else:
        pencil.rectangle(box, outline=color)
    return image


def _save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    options = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>", "model_max_length": 12}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    made.save_pretrained(folder)
    return made


def _base() -> CLIPModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 16}
    text = {"num_hidden_layers": 1, "vocab_size": len(WORDS), "max_position_embeddings": 12}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"num_hidden_layers": 2, "image_size": SIZE, "patch_size": 4}
    config = CLIPConfig(text_config={**sizes, **text, **special}, vision_config={**sizes, **vision}, projection_dim=16)
    return CLIPModel(config)


def _train(network: CLIPModel, encoder: nn.Module, pixels: Tensor, labels: Tensor, head: Tensor, rate: float) -> None:
    """Fine-tune the vision encoder's free parameters for a frozen head."""
    free = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(free, lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        chosen = torch.randint(len(pixels), (32,), generator=generator)
        features = network.visual_projection(encoder(pixel_values=pixels[chosen]).pooler_output)
        logits = 50 * nn.functional.normalize(features, dim=-1) @ head.T
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()


def save_image_tasks(folder: Path, vision: ModuleType) -> None:
    """Draw the tasks, train a fine-tune and a LoRA for each by the inputs and heads of vision.py, and save all."""
    draws = random.Random(0)
    _base().save_pretrained(folder / "base")
    tokenizer = _save_tokenizer(folder / "base")
    listed: dict[str, Any] = {"base": "base", "full": {}, "lora": {}, "tasks": []}
    for task, names in TASKS.items():
        images = {split: _images(folder / task / split, task, count, draws) for split, count in EXAMPLES.items()}
        pixels = vision.to_input(torch.stack([vision.to_pixels(image, SIZE) for image, _ in images["train"]]))
        labels = torch.tensor([label for _, label in images["train"]])
        for kind, rate in (("full", 2e-3), ("lora", 1e-2)):
            network = CLIPModel.from_pretrained(folder / "base")
            encoder: Any = CLIPVisionModel.from_pretrained(folder / "base") if kind == "full" else network.vision_model
            if kind == "lora":
                modules = ["q_proj", "k_proj", "v_proj", "out_proj"]
                encoder = get_peft_model(encoder, LoraConfig(r=4, lora_alpha=4, target_modules=modules))
            _train(network, encoder, pixels, labels, vision.zero_shot_head(network, tokenizer, names, TEMPLATES), rate)
            encoder.save_pretrained(folder / f"{kind}-{task}")
            listed[kind][task] = f"{kind}-{task}"
        listed["tasks"].append({"name": task, "data": task, "templates": TEMPLATES})
    (folder / "tasks.json").write_text(json.dumps(listed), encoding="utf-8")


def _images(folder: Path, task: str, count: int, draws: random.Random) -> Sequence[tuple[Image.Image, int]]:
    found = []
    for label, name in enumerate(TASKS[task]):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = _draw(task, name, draws)
            image.save(folder / name / f"{number}.png")
            found.append((image, label))
    return found
