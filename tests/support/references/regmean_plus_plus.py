"""RegMean++ on a network of transformers, block by block, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from support.references.regmean import regmean

__all__ = ["regmean_plus_plus"]


def regmean_plus_plus(
    base: Any, models: Sequence[Any], blocks: Sequence[str], texts: Sequence[Sequence[Any]], run: Callable[..., Any]
) -> dict[str, Tensor]:
    """The merged weights of networks.

    `blocks` are the modules whose linear layers are merged by their inputs, in the order in which they run. `run` runs
    a network on one of a model's `texts`. Inputs are seen in each model's own block behind merged ones.
    """
    start, states = base.double().state_dict(), [model.double().state_dict() for model in models]
    merged = copy.deepcopy(base)
    merged.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in start})
    for block in blocks:
        inputs = []
        for model, own in zip(models, texts, strict=True):
            mixed = copy.deepcopy(merged)
            mixed.get_submodule(block).load_state_dict(model.get_submodule(block).state_dict())
            inputs.append(_inputs(mixed, block, own, run))
        for name in inputs[0]:
            tau = torch.stack([state[name] - start[name] for state in states])
            with torch.no_grad():
                weight = merged.get_parameter(name)
                weight.copy_(start[name] + regmean(tau, [each[name] for each in inputs]))
    return {name: value.clone() for name, value in merged.state_dict().items()}


def _inputs(network: Any, block: str, texts: Sequence[Any], run: Callable[..., Any]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    for name, module in network.get_submodule(block).named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = f"{block}.{name}.weight" if name else f"{block}.weight"
            module.register_forward_hook(
                lambda module, given, out, weight=weight: seen.setdefault(weight, []).append(given[0].flatten(0, -2))
            )
    with torch.no_grad():
        for text in texts:
            run(network, text)
    return {name: torch.cat(each) for name, each in seen.items()}
