"""Statistics of examples in memory, and tiny models of several architectures that examples can be run through."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from merging.maths.layer_statistics import InputGram, LayerStatistics
from support.adapters import quiet
from support.architectures import build

__all__ = ["WORDS", "GivenStatistics", "exact_gram", "save_runnable", "write_texts"]

WORDS = [f"w{number}" for number in range(80)]


@dataclass(frozen=True)
class GivenStatistics(LayerStatistics):
    """The statistics of one tensor, given as tensors."""

    gram: InputGram | None = None
    fisher: Tensor | None = None

    def read_inputs(self) -> InputGram | None:
        return self.gram

    def read_fisher(self, start: int, count: int) -> Tensor | None:
        return None if self.fisher is None else self.fisher.flatten()[start : start + count]


def exact_gram(inputs: Tensor) -> InputGram:
    """The Gram matrix of inputs `[tokens, in]` with as many directions as tokens."""
    return InputGram(inputs.double().T / len(inputs) ** 0.5, torch.zeros(inputs.shape[1], dtype=torch.float64))


def write_texts(path: Path, count: int = 6, seed: int = 0, length: int = 6) -> Path:
    """JSON lines with texts of random words and a label."""
    draw = random.Random(seed)
    lines = [{"text": " ".join(draw.choices(WORDS, k=length)), "label": draw.randrange(2)} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def save_runnable(folder: Path, architecture: str, tuned: int = 2) -> tuple[Path, Sequence[Path]]:
    """A base of an architecture with a tokenizer, and fine-tunes of it, whose matrices differ."""
    with quiet():
        model = build(architecture, 5)
        paths = []
        for number in range(tuned + 1):
            path = folder / ("base" if not number else f"tuned{number}")
            model.save_pretrained(path)
            _save_tokenizer(path)
            paths.append(path)
    states = load_file(paths[0] / "model.safetensors")
    for number, path in enumerate(paths[1:], 1):
        draw = torch.Generator().manual_seed(number)
        changed = {name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in states.items()}
        save_file(changed, path / "model.safetensors", {"format": "pt"})
    return paths[0], paths[1:]


def _save_tokenizer(folder: Path) -> None:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
