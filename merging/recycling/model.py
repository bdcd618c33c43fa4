"""The base model for one task, of any architecture: examples in, losses and right answers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from merging.errors import FormatError, option
from merging.maths.lazy_torch import Tensor, torch
from merging.recycling.data import Example
from merging.recycling.hooks import HookPoint, find_hook_points

__all__ = ["Answers", "Classifier", "Decoder", "EncodedExample", "Encoder", "EncoderDecoder", "Scores", "TaskModel"]

_AT_ONCE = 16
"""Examples in one forward pass without training."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example in tokens: those in the text, and those in the answer (or the position of its label)."""

    tokens: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The predictions of a model: ``logits [n, choices]`` for ``targets [n]``.

    ``of [n]`` holds the number of the example to which each prediction belongs.
    """

    logits: Tensor
    targets: Tensor
    of: Tensor

    def losses(self, examples: int) -> Tensor:
        """Return the mean cross-entropy of each example, float32 ``[examples]``."""
        each = nn.functional.cross_entropy(self.logits.float(), self.targets, reduction="none")
        return self._means(each, examples)

    def entropies(self, examples: int) -> Tensor:
        """Return the mean Shannon entropy of each example's predictions, float32 ``[examples]``."""
        logs = self.logits.float().log_softmax(-1)
        return self._means(-(logs.exp() * logs).sum(-1), examples)

    def right(self, examples: int) -> Tensor:
        """Return 1 for each example whose targets are all predicted (for texts, by greedy decoding), else 0."""
        wrong = (self.logits.argmax(-1) != self.targets).float()
        return (self._means(wrong, examples) == 0).float()

    def _means(self, values: Tensor, examples: int) -> Tensor:
        counts = torch.bincount(self.of, minlength=examples).clamp(min=1)
        return values.new_zeros(examples).index_add(0, self.of, values) / counts


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Loss and right answer (0 or 1) of each example, and the entropy of its predictions where it was asked for.

    Each is float64 ``[examples]`` on the CPU.
    """

    losses: Tensor
    right: Tensor
    entropies: Tensor | None = None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


class TaskModel(ABC):
    """A base model, frozen and in evaluation mode, with its tokenizer; ``task_type`` is PEFT's word for its kind."""

    task_type: str | None = None
    classifies = False
    """Whether an answer is one of few classes, so that the entropy of predictions means something."""

    def __init__(self, network: nn.Module, tokenizer: Any, limit: int) -> None:
        self.network: Any = network.eval().requires_grad_(False)
        self.tokenizer, self.limit = tokenizer, limit
        self.hook_points: dict[str, HookPoint] = find_hook_points(network)
        self.cut = 0
        """The number of texts that were too long and have been cut."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of factors while the model runs."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @abstractmethod
    def encode(self, example: Example) -> EncodedExample:
        """Return an example in tokens. Raises :class:`~merging.errors.FormatError`, with its line."""

    @abstractmethod
    def answers(self, items: Sequence[EncodedExample]) -> Answers:
        """Return the model's predictions for a few examples at once."""

    @torch.no_grad()
    def scores(self, items: Sequence[EncodedExample], *, entropies: bool = False) -> Scores:
        """Return the loss and correctness of each example, and the entropy of its predictions if asked.

        Batches hold examples of similar length.
        """
        by_length = sorted(range(len(items)), key=lambda i: (len(items[i].tokens) + len(items[i].answer), i))
        losses, right, entropy = (torch.zeros(len(items), dtype=torch.float64) for _ in range(3))
        for start in range(0, len(items), _AT_ONCE):
            chosen = by_length[start : start + _AT_ONCE]
            answers = self.answers([items[i] for i in chosen])
            losses[chosen] = answers.losses(len(chosen)).cpu().double()
            right[chosen] = answers.right(len(chosen)).cpu().double()
            if entropies:
                entropy[chosen] = answers.entropies(len(chosen)).cpu().double()
        return Scores(losses, right, entropy if entropies else None)

    def _cut(self, tokens: list[int], room: int, keep_end: bool = False) -> tuple[int, ...]:
        if len(tokens) > room:
            self.cut += 1
            tokens = tokens[-room:] if keep_end else tokens[:room]
        return tuple(tokens)

    def _pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return tokens and their mask, ``[examples, longest]``."""
        pad = self.tokenizer.pad_token_id or 0
        longest = max(map(len, rows))
        tokens = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}

    def _answers(self, logits: Tensor, items: Sequence[EncodedExample]) -> Answers:
        """Return the predictions with the targets of all answers, one after the other."""
        targets = torch.tensor([token for item in items for token in item.answer])
        of = torch.tensor([number for number, item in enumerate(items) for _ in item.answer])
        return Answers(logits, targets.to(self.device), of.to(self.device))


class _Generator(TaskModel):
    """Base class of language models: a prompt is continued."""

    def __init__(self, network: nn.Module, tokenizer: Any, limit: int, chat: bool = False) -> None:
        super().__init__(network, tokenizer, limit)
        if chat and not getattr(tokenizer, "chat_template", None):
            raise FormatError(f"the tokenizer has no chat template: leave {option('chat', True)} out")
        self.chat = chat

    def _prompt(self, text: str) -> list[int]:
        if self.chat:
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]
        return tokens

    def _completion(self, example: Example) -> list[int]:
        tokens: list[int] = self.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return tokens if end is None else [*tokens, end]


class Decoder(_Generator):
    """A causal language model. An answer is right if greedy decoding gives it to its end."""

    task_type = "CAUSAL_LM"

    def encode(self, example: Example) -> EncodedExample:
        prompt, answer = self._prompt(example.text), self._completion(example)
        if prompt and prompt[-1] == self.tokenizer.eos_token_id and example.text:
            prompt = prompt[:-1]  # some tokenizers end every text, and this text continues
        if not prompt:
            start = self.tokenizer.bos_token_id
            prompt, answer = ([start], answer) if start is not None else (answer[:1], answer[1:])
        if not answer or len(answer) >= self.limit:
            raise FormatError(f"{example.where}: the completion has {len(answer)} tokens, of at most {self.limit - 1}")
        return EncodedExample(self._cut(prompt, self.limit - len(answer), keep_end=True), tuple(answer))

    def answers(self, items: Sequence[EncodedExample]) -> Answers:
        logits = self.network(**self._pad([item.tokens + item.answer for item in items]), use_cache=False).logits
        # The logits at a position predict the next token.
        rows = [n for n, item in enumerate(items) for _ in item.answer]
        columns = [len(item.tokens) - 1 + i for item in items for i in range(len(item.answer))]
        return self._answers(logits[rows, columns], items)


class EncoderDecoder(_Generator):
    """A sequence-to-sequence model: the prompt is encoded, the completion decoded."""

    task_type = "SEQ_2_SEQ_LM"

    def encode(self, example: Example) -> EncodedExample:
        answer = self._completion(example)
        if len(answer) > self.limit:
            raise FormatError(f"{example.where}: the completion has {len(answer)} tokens, of at most {self.limit}")
        return EncodedExample(self._cut(self._prompt(example.text), self.limit), tuple(answer))

    def answers(self, items: Sequence[EncodedExample]) -> Answers:
        longest = max(len(item.answer) for item in items)
        labels = torch.tensor([[*item.answer, *[-100] * (longest - len(item.answer))] for item in items])
        given = self._pad([item.tokens for item in items])
        logits = self.network(**given, labels=labels.to(self.device), use_cache=False).logits
        return self._answers(logits[labels.to(self.device) >= 0], items)


class Classifier(TaskModel):
    """A model with its own classification head. The labels are those in its config."""

    # PEFT wants a head in the file of an adapter with SEQ_CLS, and recycling keeps the base's head.
    task_type = None
    classifies = True

    def encode(self, example: Example) -> EncodedExample:
        ids: dict[str, int] = self.network.config.label2id or {}
        label = example.label
        position = label if isinstance(label, int) else ids.get(str(label), -1)
        if not 0 <= position < self.network.config.num_labels:
            raise FormatError(f"{example.where}: the model's head has no label {label!r}: it knows {', '.join(ids)}")
        return EncodedExample(self._cut(self.tokenizer(example.text)["input_ids"], self.limit), (position,))

    def answers(self, items: Sequence[EncodedExample]) -> Answers:
        return self._answers(self.network(**self._pad([item.tokens for item in items])).logits, items)


class Encoder(TaskModel):
    """A model without a head. Fixed directions in its feature space separate the classes.

    ``logits = 20 (z - mean) W^T`` as in CLIP, with ``z`` the normalized mean of the last hidden states. ``weight
    [labels, width]`` and ``mean [width]`` are computed once, from the base's features.
    """

    task_type = "FEATURE_EXTRACTION"
    classifies = True
    labels: Sequence[str | int] = ()
    weight: Tensor
    mean: Tensor

    def encode(self, example: Example) -> EncodedExample:
        assert example.label is not None
        answer = (list(self.labels).index(example.label),) if self.labels else ()
        return EncodedExample(self._cut(self.tokenizer(example.text)["input_ids"], self.limit), answer)

    def features(self, items: Sequence[EncodedExample]) -> Tensor:
        """Return normalized mean-pooled features, float32 ``[items, width]``."""
        given = self._pad([item.tokens for item in items])
        hidden = self.network(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def answers(self, items: Sequence[EncodedExample]) -> Answers:
        return self._answers(20 * (self.features(items) - self.mean) @ self.weight.mT, items)

    @torch.no_grad()
    def make_head(self, labels: Sequence[str | int], examples: Sequence[Example], kind: str) -> None:
        """Set the head to the embeddings of the labels' names, or to the mean features of each label's examples.

        Raises :class:`~merging.errors.FormatError` for numbers instead of names, and for a label without an example.
        """
        texts = [self.encode(example) for example in examples]
        features = torch.cat([self.features([item]) for item in texts])
        if kind == "labels":
            if any(isinstance(label, int) for label in labels):
                raise FormatError(
                    f"the labels are numbers, which say nothing: name them, or use {option('head', 'prototypes')}"
                )
            named = [EncodedExample(tuple(self.tokenizer(str(label))["input_ids"]), ()) for label in labels]
            weight = torch.cat([self.features([item]) for item in named])
        else:
            owned = [[i for i, example in enumerate(examples) if example.label == label] for label in labels]
            if not all(owned):
                raise FormatError(f"no training example has the label {labels[owned.index([])]!r}: it has no prototype")
            weight = torch.stack([features[rows].mean(0) for rows in owned])
        self.labels, self.mean = labels, features.mean(0)
        self.weight = nn.functional.normalize(weight - weight.mean(0), dim=-1)
