"""The diagonal of the Fisher information: mean squared gradients of the log-likelihood of single examples."""

from __future__ import annotations

from typing import Any, Literal

from merging.errors import FormatError, OptionError, option
from merging.maths.lazy_torch import Tensor, torch
from merging.statistics.examples import StatisticsExample
from merging.statistics.network import RunnableModel

__all__ = ["FisherAccumulator", "FisherOutputs"]

FisherOutputs = Literal["sampled", "labels"]
"""Outputs whose likelihood is differentiated: drawn from the model's own predictions, or the labels of the data."""


class FisherAccumulator:
    """Sums squared gradients over examples, each run by itself.

    The log-likelihood of an example is the sum over its predictions: one class, or a token at each position.
    ``sampled`` draws each from the model's prediction, by a seed. ``labels`` takes the label of a text, or the next
    tokens.

    Attributes:
        sums: the sums by parameter, float32.
        count: the number of examples.
    """

    def __init__(self, model: RunnableModel, outputs: FisherOutputs, seed: int) -> None:
        self.model, self.outputs = model, outputs
        model.network.requires_grad_(True)
        self.parameters = {name: each for name, each in model.network.named_parameters() if each.is_floating_point()}
        self.sums = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in self.parameters.items()}
        self.count = 0
        self._random = torch.Generator().manual_seed(seed)

    def add(self, example: StatisticsExample, inputs: dict[str, Tensor], output: Any) -> None:
        """Add the squared gradients of an example whose output was just computed with gradients."""
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
            raise OptionError(
                f"{self.model.name}: a {type(self.model.network).__name__} has no predictions to draw from, and so no "
                f"Fisher information: leave {option('fisher', self.outputs)} out"
            )
        flat = logits.float().flatten(0, -2).log_softmax(-1)
        if self.outputs == "sampled":
            targets = torch.multinomial(flat.detach().exp().cpu(), 1, generator=self._random)[:, 0].to(flat.device)
        else:
            flat, targets = self._labels(example, inputs, flat, logits.dim())
        loss = -flat.gather(1, targets[:, None]).sum()
        names, values = list(self.parameters), list(self.parameters.values())
        for name, gradient in zip(names, torch.autograd.grad(loss, values, allow_unused=True), strict=True):
            if gradient is not None:
                self.sums[name] += gradient.float().square()
        self.count += 1

    def _labels(
        self, example: StatisticsExample, inputs: dict[str, Tensor], flat: Tensor, dimensions: int
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``[n, choices]`` and the target of each."""
        if dimensions == 2:
            return flat, torch.tensor([self._class(example, flat.shape[1])], device=flat.device)
        if self.model.two_parts:
            return flat[:-1], inputs["decoder_input_ids"][0, 1:]
        if not type(self.model.network).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            raise OptionError(
                f"{self.model.name}: labels are classes or the next tokens of a text, and the model is a "
                f"{type(self.model.network).__name__}: use {option('fisher', 'sampled')}"
            )
        ids = inputs["input_ids"][0]
        if len(ids) < 2:
            raise FormatError(f"{example.where}: has one token, and nothing to predict after it")
        return flat[:-1], ids[1:]

    def _class(self, example: StatisticsExample, classes: int) -> int:
        known = getattr(self.model.config, "label2id", None) or {}
        label = known.get(example.label, example.label) if isinstance(example.label, str) else example.label
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            names = f" ({', '.join(map(str, list(known)[:8]))})" if known else ""
            raise FormatError(
                f"{example.where}: its label is {example.label!r}, and the model has the classes 0 to {classes - 1}"
                f"{names}: name the field with {option('label_column')}"
            )
        return label

    def result(self) -> tuple[dict[str, Tensor], float]:
        """Return the means divided by their root mean square over the model, and that size."""
        total = sum(float(each.double().square().sum()) for each in self.sums.values())
        numbers = sum(each.numel() for each in self.sums.values())
        size = (total / max(1, numbers)) ** 0.5
        if not 0 < size < float("inf"):
            raise FormatError(f"{self.model.name}: its gradients are all zero, or not finite: no Fisher information")
        means = {name: (each / size).cpu() for name, each in self.sums.items()}
        return means, size / max(1, self.count)
