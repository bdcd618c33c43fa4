"""The smoke test: run the base with an adapter, and check that it still works and that anything changed.

Norms are not enough: about eight per cent of the public adapters that pass every check of their values destroy the
model (recycling study of 2026, arXiv 2602.12323).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from merging.engine.devices import supply_operations
from merging.engine.resources import pick_device
from merging.errors import FormatError, InputError, OptionError
from merging.maths.lazy_torch import Tensor, torch
from merging.pool.audit import change_of
from merging.pool.entry import Finding
from merging.pool.network import explain_errors, loading_options, quiet
from merging.sources import Adapter, Checkpoint
from merging.sources.renaming import find_renaming
from merging.sources.small_files import DATA_LIMIT, read_text

__all__ = ["TEXTS", "Limits", "SmokeTest", "read_texts"]

_AT_ONCE = 8
_MOST_TOKENS = 128

TEXTS = (
    "The train to the coast leaves at seven in the morning and arrives shortly before noon.",
    "She opened the window, and the smell of rain came into the room.",
    "Water boils at a lower temperature on high mountains, because the pressure of the air is lower there.",
    "How do I get a stain of red wine out of a white shirt?",
    "The committee will meet again next week to decide about the budget for the coming year.",
    "Question: What is the capital of France? Answer: The capital of France is Paris.",
    "def add(a, b):\n    return a + b",
    "He had never been to the north before, and the long evenings surprised him.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Please find the invoice attached; payment is due within thirty days.",
    "The second half began slowly, but two late goals decided the match.",
    "To make the dough, mix flour, salt and yeast, add warm water, and knead for ten minutes.",
    "The museum is closed on Mondays, except on public holidays.",
    "Many birds fly south in autumn and come back in spring.",
    "If all roses are flowers and some flowers fade quickly, do some roses fade quickly?",
    "The company said on Tuesday that its profit had fallen by four per cent.",
    "My grandmother kept bees at the end of the garden, behind the apple trees.",
    "A prime number has exactly two divisors, one and itself.",
    "The film is too long, but the last twenty minutes are worth the wait.",
    "Turn left at the church, go down the hill, and the station is on your right.",
    "Iron rusts when it meets water and air.",
    "I would like to change my booking from Friday to Saturday, if that is possible.",
    "The old bridge was built of stone in the fifteenth century and has been repaired twice.",
    "Most of the islands have no fresh water, so rain is collected on the roofs.",
)
"""Plain English of several kinds, which is easy for a model of English."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the figures beyond which an adapter is quarantined.

    The defaults suit trained models of a usual size. A tiny base, which reads plain text badly, may need others.

    Attributes:
        destroyed: The largest perplexity of plain text relative to the base's, for models that predict words.
        collapsed: The smallest spread of the texts' features relative to the base's, for other models.
        unchanged: The smallest mean change of the outputs, relative to their standard deviation.

    Raises:
        merging.errors.OptionError: For limits that would hold back every adapter.
    """

    destroyed: float = 3.0
    collapsed: float = 0.1
    unchanged: float = 1e-3

    def __post_init__(self) -> None:
        if not self.destroyed > 1:
            raise OptionError(
                f"destroyed = {self.destroyed:g}: above 1, how many times the base's perplexity is too much"
            )
        for name in ("collapsed", "unchanged"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name):g}: a share, from 0 to below 1")

    def findings(self, figures: Mapping[str, float]) -> list[Finding]:
        """Return the findings that follow from the figures of a :class:`SmokeTest`."""
        ratio = figures.get("perplexity_ratio", 1.0)
        if ratio > self.destroyed:
            reason = (
                f"with it the base reads plain text with {ratio:.3g} times its perplexity (above {self.destroyed:g})"
            )
        elif figures["spread_ratio"] < self.collapsed and "perplexity_ratio" not in figures:
            left = f"{figures['spread_ratio']:.2g} of their spread (below {self.collapsed:g})"
            reason = f"with it the base hardly distinguishes texts any more: their features keep {left}"
        elif figures["output_change"] < self.unchanged:
            moved = f"{figures['output_change']:.2g} of how much these vary (below {self.unchanged:g})"
            reason = f"changes nothing in the base's answers to plain text: {moved}"
        else:
            return []
        return [Finding("smoke", "quarantined", reason)]


@dataclass(frozen=True, slots=True, eq=False)
class _Outputs:
    """The base's outputs for the texts, ``[tokens, width]``, its loss if it predicts words, and the texts' features."""

    outputs: Tensor
    loss: float | None
    features: Tensor

    @property
    def spread(self) -> float:
        """The distance of the texts' mean features ``[texts, width]`` from their center."""
        return float((self.features - self.features.mean(0)).norm())


class SmokeTest:
    """The base, loaded whole by transformers, and its outputs for a few texts.

    Raises :class:`~merging.errors.InputError` for a base that cannot be loaded or has no tokenizer, and
    :class:`~merging.errors.OptionError` for a device that does not exist.
    """

    def __init__(
        self,
        base: str,
        source: Checkpoint,
        texts: Sequence[str] = TEXTS,
        device: str = "cpu",
        limits: Limits = Limits(),
    ) -> None:
        self.limits = limits
        self.device = pick_device(device)
        import transformers

        where, options = loading_options(base)
        with quiet(), explain_errors(base):
            config = transformers.AutoConfig.from_pretrained(where, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            loader = getattr(transformers, str((config.architectures or [""])[0]), transformers.AutoModel)
            self.network = loader.from_pretrained(where, dtype="auto", **options).eval().requires_grad_(False)
        self.network.to(self.device)
        self.source = source
        self.parameters = dict(self.network.named_parameters())
        given = [tokenizer(text)["input_ids"][:_MOST_TOKENS] for text in texts]
        self.tokens = [row for row in given if len(row) > 1]
        self.pad = tokenizer.pad_token_id or 0
        with supply_operations(self.device):
            self.base = self._run_texts()

    def run(self, adapter: Adapter) -> tuple[list[Finding], dict[str, float]]:
        """Run the base with an adapter, which has the base's own names, and return findings and figures.

        The figures are:

        - ``perplexity_ratio``: the perplexity of plain text relative to the base's, for models that predict words.
        - ``output_change``: the mean change of the outputs relative to their standard deviation.
        - ``spread_ratio``: the spread of the texts' features relative to the base's.
        """
        with supply_operations(self.device), self._with_adapter(adapter):
            changed = self._run_texts()
            moved = (changed.outputs - self.base.outputs).abs().mean() / self.base.outputs.std()
        figures = {"output_change": float(moved), "spread_ratio": changed.spread / max(self.base.spread, 1e-30)}
        if not all(map(math.isfinite, figures.values())):
            return [Finding("smoke", "quarantined", "with it the base answers NaN: destroyed")], {}
        if changed.loss is not None and self.base.loss is not None:
            figures["perplexity_ratio"] = math.exp(min(changed.loss - self.base.loss, 700.0))
        return self.limits.findings(figures), figures

    @contextmanager
    def _with_adapter(self, adapter: Adapter) -> Iterator[None]:
        """Add an adapter's change to the network's weights. Afterwards they are read again from the base."""
        shapes = {name: tuple(value.shape) for name, value in self.parameters.items()}
        targets = adapter.changes
        renaming, left = find_renaming(
            targets, shapes, lambda target, name: shapes[name] == tuple(self.source.tensors[target].shape)
        )
        if left:
            raise InputError(f"{left[0]} has another name, or is joined with others, when transformers runs it")
        named = {target: self.parameters[renaming(target) or target] for target in targets}
        try:
            for target, change in targets.items():
                delta = change_of(change, self.source.tensors[target])
                named[target].add_(delta.dense().to(named[target].device))
            yield
        finally:
            for target, parameter in named.items():
                parameter.copy_(self.source.tensors[target].read())

    @torch.no_grad()
    def _run_texts(self) -> _Outputs:
        outputs, features, losses = [], [], []
        for start in range(0, len(self.tokens), _AT_ONCE):
            rows = self.tokens[start : start + _AT_ONCE]
            longest = max(map(len, rows))
            padded = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            given = {"input_ids": padded.to(self.network.device), "attention_mask": mask.to(self.network.device)}
            if self.network.config.is_encoder_decoder:
                given["decoder_input_ids"] = given["input_ids"]
            result = self.network(**given)
            logits = getattr(result, "logits", None)
            states = (logits if logits is not None else result.last_hidden_state).float().cpu()
            if states.dim() < 3:  # a classifier has one output for a whole text
                outputs += list(states.unsqueeze(1))
                features += list(states)
                continue
            for row, length, state in zip(rows, mask.sum(1).tolist(), states, strict=True):
                outputs.append(state[:length])
                features.append(state[:length].mean(0))
                if self._reads:
                    target = torch.tensor(row[1:])
                    losses.append(torch.nn.functional.cross_entropy(state[: length - 1], target, reduction="none"))
        loss = float(torch.cat(losses).mean()) if losses else None
        return _Outputs(torch.cat(outputs), loss, torch.stack(features))

    @property
    def _reads(self) -> bool:
        """Whether the network predicts each next word of a text."""
        return type(self.network).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def read_texts(path: str | Path) -> list[str]:
    """Read the texts of a file, one a line. Raises :class:`~merging.errors.FormatError` for fewer than two."""
    lines = read_text(Path(path), DATA_LIMIT, given=True).splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) < 2:
        raise FormatError(f"{path}: holds {len(texts)} texts, one a line: a smoke test needs about twenty")
    return texts
