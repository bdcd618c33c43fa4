"""The layers of a model whose inputs are gathered, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["HookedLayer", "find_layers", "group_by_input", "hook_inputs"]


@dataclass(frozen=True, slots=True, eq=False)
class HookedLayer:
    """A module with a matrix: the name of its weight in the model, the number of its inputs, and their axis."""

    name: str
    module: Any
    width: int
    axis: int


def find_layers(network: Any) -> list[HookedLayer]:
    """Return the modules that multiply their input by a matrix of their own: linear layers, and GPT-2's Conv1D.

    Embeddings, and heads that are tied to one, are left out.
    """
    modules = dict(network.named_modules())
    tables = {id(module.weight) for module in modules.values() if isinstance(module, torch.nn.Embedding)}
    found, seen = [], set(tables)
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or id(weight) in seen or not weight.is_floating_point():
            continue
        seen.add(id(weight))
        axis = 0 if type(module).__name__ == "Conv1D" else 1
        found.append(HookedLayer(f"{name}.weight", module, weight.shape[axis], axis))
    return found


@contextmanager
def hook_inputs(layers: list[HookedLayer], receive: Callable[[HookedLayer, Tensor], None]) -> Iterator[None]:
    """Call ``receive`` with the input of each layer whenever the model runs in the body."""

    def hook(layer: HookedLayer) -> Callable[..., None]:
        def enter(module: Any, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and given[0].shape[-1] == layer.width:
                receive(layer, given[0])

        return enter

    handles = [layer.module.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def group_by_input(layers: list[HookedLayer], run: Callable[[], Any]) -> Mapping[str, str]:
    """Return for each layer the name of the first layer that has the same inputs, found by running the model once.

    Layers come in the order in which they run, and those that do not run last.
    """
    taken: dict[str, list[int]] = {}
    held: list[Tensor] = []  # so that no identity is used twice

    def note(layer: HookedLayer, inputs: Tensor) -> None:
        held.append(inputs)
        taken.setdefault(layer.name, []).append(id(inputs))

    with hook_inputs(layers, note):
        run()
    taken |= {layer.name: [] for layer in layers if layer.name not in taken}
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tuple(ids), name) if ids else name for name, ids in taken.items()}
