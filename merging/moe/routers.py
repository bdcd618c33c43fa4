"""The rows of routers: one direction an expert, with which the hidden state of a token is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merging.display.progress import Progress
from merging.errors import InputError
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.randomness import draw_normal, draw_uniform
from merging.moe.hidden_states import EMBEDDING, embed, hidden_states, tokenize
from merging.moe.recipe import ExpertEntry, MoeRecipe
from merging.moe.source import MoeSource

__all__ = ["Routers", "make_routers"]


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a mixture.

    Attributes:
        experts: the rows of the routers, ``[layers, experts, hidden]`` float32.
        shared: the rows of the gates of the shared expert, ``[layers, 1, hidden]``; None without such gates.
    """

    experts: Tensor
    shared: Tensor | None = None


def make_routers(
    recipe: MoeRecipe,
    base: MoeSource,
    *,
    layers: int,
    shared: bool,
    key: str,
    device: torch.device,
    progress: Progress | None = None,
) -> Routers:
    """Make the routers of all layers.

    - ``hidden``, ``hidden_last``: the hidden state of a prompt's last token in front of the layer, averaged over the
      prompts, minus the same of the negative prompts, to length 1.
    - ``hidden_avg``: the same with the mean over a prompt's tokens.
    - ``cheap_embed``: the sum of the tokens' embeddings, to length 1, minus the same of the negative prompts, to
      length 1; one for all layers.
    - ``random``: standard normal numbers. ``uniform_random``: numbers between plus and minus ``hidden ** -0.5``.

    Args:
        recipe: the recipe.
        base: the base.
        layers: the number of layers.
        shared: whether the shared expert has a gate.
        key: the key of the base's content, which random numbers depend on, with the recipe's seed.
        device: the device to run prompts on.
        progress: called with the layers done and their number.

    Raises:
        InputError: for prompts that the base cannot read, or that give no direction.
    """
    rows = [*recipe.experts, *(recipe.shared_experts if shared else ())]
    if recipe.prompted:
        found = _by_prompts(recipe, base, rows, layers, device, progress)
    else:
        hidden = base.find_stored(EMBEDDING).shape[1]
        found = _at_random(recipe, len(rows), layers, hidden, key)
    count = len(recipe.experts)
    return Routers(found[:, :count], found[:, count:] if shared else None)


def _at_random(recipe: MoeRecipe, rows: int, layers: int, hidden: int, key: str) -> Tensor:
    place, cpu = ("moe", recipe.gate_mode, recipe.seed, key), torch.device("cpu")
    count = layers * rows * hidden
    if recipe.gate_mode == "random":
        drawn = draw_normal(0, count, cpu, *place)
    else:
        drawn = (draw_uniform(0, count, cpu, *place) * 2 - 1) * hidden**-0.5
    return drawn.view(layers, rows, hidden)


def _by_prompts(
    recipe: MoeRecipe,
    base: MoeSource,
    experts: Sequence[ExpertEntry],
    layers: int,
    device: torch.device,
    progress: Progress | None,
) -> Tensor:
    """Return the rows ``[layers, experts, hidden]`` that prompts give."""
    prompts = [text for expert in experts for text in (*expert.positive_prompts, *expert.negative_prompts)]
    tokens = tokenize(base, prompts)
    by_embedding = recipe.gate_mode == "cheap_embed"
    if by_embedding:
        states = torch.stack([embed(base, ids).sum(0) for ids in tokens])[None]
    else:
        average = recipe.gate_mode == "hidden_avg"
        states = hidden_states(base, tokens, average=average, device=device, progress=progress)
    rows, start = [], 0
    for expert in experts:
        middle = start + len(expert.positive_prompts)
        end = middle + len(expert.negative_prompts)
        positive, negative = states[:, start:middle].double(), states[:, middle:end].double()
        row = _direction(positive, by_embedding)
        if negative.shape[1]:
            row = row - _direction(negative, by_embedding)
        length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
        if not bool((length > 0).all()):
            raise InputError(
                f"{expert.source_model}: its positive and negative prompts cancel out: no router can find it"
            )
        rows.append((row / length).float())
        start = end
    return torch.stack(rows, 1).expand(layers, -1, -1)


def _direction(states: Tensor, by_embedding: bool) -> Tensor:
    """Return the direction ``[layers, hidden]`` of prompts: their mean, or the sum of embeddings to length 1."""
    if not by_embedding:
        return states.mean(1)
    return torch.nn.functional.normalize(states.sum(1), dim=-1)
