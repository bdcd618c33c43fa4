"""Tiny models with tokenizers, pools of their adapters, and tasks, for tests of recycling."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from merging.recycling.controls import CONTROLS
from merging.recycling.data import read_examples, split
from merging.recycling.load_base import load_model
from merging.recycling.pool_adapters import AdapterRef, Expert, open_expert
from merging.recycling.problem import Problem
from merging.recycling.report import AVERAGE, MERGE, SINGLE
from merging.recycling.settings import make_settings
from support.adapters import quiet, train
from support.architectures import DECODER, ENCODER, T5, tiny

__all__ = ["FAST", "ROWS", "WORDS", "World", "causal", "classifier", "contents", "encoder", "seq2seq", "texts"]

WORDS = [f"w{number}" for number in range(80)]

FAST: dict[str, Any] = {"k": 3, "steps": 10, "every": 5, "lora_steps": 10, "lora_rates": (1e-2,), "lora_rank": 2,
                        "resamples": 200}  # fmt: skip
"""Settings with which a run takes a fraction of a second."""

_LABELS = {"id2label": {0: "low", 1: "high"}, "label2id": {"low": 0, "high": 1}, "num_labels": 2}


@dataclass(frozen=True)
class World:
    """A base, a folder of its adapters, and examples of a task for it."""

    base: Path
    pool: Path
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    test: list[dict[str, Any]] = field(default_factory=list)

    def arguments(self, **settings: Any) -> dict[str, Any]:
        """What ``merging.recycle`` is called with, fast unless the settings say otherwise."""
        parts = {"base": self.base, "train": self.train, "valid": self.valid, "test": self.test}
        return {"pool": self.pool, **parts, **FAST, **settings}

    def problem(self, **settings: Any) -> Problem:
        """The task as methods see it."""
        chosen = make_settings({**FAST, **settings})
        parts = split(read_examples(self.train), read_examples(self.valid), read_examples(self.test), chosen.seed)
        model = load_model(str(self.base), parts, chosen, torch.device("cpu"))
        return Problem(model, tuple(map(model.encode, parts.train)), tuple(map(model.encode, parts.valid)), chosen)

    def experts(self, problem: Problem) -> list[Expert]:
        """All adapters of the pool."""
        folders = sorted(self.pool.iterdir())
        return [open_expert(AdapterRef(str(each), each.name), problem.model.hook_points) for each in folders]


def texts(count: int, seed: int, length: int = 6) -> list[str]:
    """Random words, no text twice."""
    draw = random.Random(seed)
    return list(dict.fromkeys(" ".join(draw.choices(WORDS, k=length)) for _ in range(2 * count)))[:count]


def _tokenizer(folder: Path, start: bool) -> None:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS, "low", "high"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if start:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _saved(folder: Path, make: Any, start: bool = True, louder: float = 1.0) -> Path:
    torch.manual_seed(5)
    make().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    # random models say next to nothing: larger weights make their answers differ
    loud = {name: value * louder if value.dim() == 2 else value for name, value in tensors.items()}
    save_file(loud, folder / "model.safetensors", {"format": "pt"})
    _tokenizer(folder, start)
    return folder


def _pool(folder: Path, base: Path, targets: Sequence[str] | str, count: int = 5, **config: Any) -> Path:
    with quiet():
        for seed in range(count):
            train(folder / f"a{seed}", base, seed, targets, r=2 + seed % 3, lora_alpha=4, **config)
    return folder


def _labelled(count: int, seed: int) -> list[dict[str, Any]]:
    """A text is high if its first word is one of the later half."""
    return [{"text": text, "label": "high" if int(text.split()[0][1:]) >= 40 else "low"} for text in texts(count, seed)]


def classifier(folder: Path) -> World:
    """An encoder with a classification head of its own."""
    make = tiny("BertConfig", "BertForSequenceClassification", ENCODER, pad_token_id=0, **_LABELS)
    base = _saved(folder / "base", make, louder=6.0)
    pool = _pool(folder / "pool", base, ["query", "value", "intermediate.dense"], lora_dropout=0.0)
    return World(base, pool, _labelled(24, 1), _labelled(12, 2), _labelled(60, 3))


def encoder(folder: Path) -> World:
    """An encoder without a head."""
    base = _saved(folder / "base", tiny("BertConfig", "BertModel", ENCODER, pad_token_id=0), louder=6.0)
    return World(
        base, _pool(folder / "pool", base, ["query", "value"]), _labelled(24, 1), _labelled(12, 2), _labelled(60, 3)
    )


def _completed(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"prompt": text, "completion": " ".join(text.split()[:2])} for text in texts(count, seed)]


def causal(folder: Path) -> World:
    """A causal language model."""
    base = _saved(folder / "base", tiny("LlamaConfig", "LlamaForCausalLM", DECODER), louder=6.0)
    return World(
        base,
        _pool(folder / "pool", base, ["q_proj", "up_proj"]),
        _completed(16, 1),
        _completed(8, 2),
        _completed(20, 3),
    )


def seq2seq(folder: Path) -> World:
    """A model that reads a prompt and writes an answer."""
    base = _saved(folder / "base", tiny("T5Config", "T5ForConditionalGeneration", T5), start=False)
    return World(base, _pool(folder / "pool", base, ["q", "v"]), _completed(16, 1), _completed(8, 2), _completed(20, 3))


ROWS = {"base", "few-shot LoRA", SINGLE, AVERAGE, MERGE, *(control.title for control in CONTROLS.values())}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
