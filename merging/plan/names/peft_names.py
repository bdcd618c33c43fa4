"""The names and shapes of a merged adapter's tensors in PEFT's files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from merging.sources.changes import Change, LoraChange
from merging.sources.peft.wrapped import in_order
from merging.storage.output_tensor import OutputTensor

__all__ = ["PREFIX", "FactorPaths", "factor_tensors", "module_of"]

PREFIX = "base_model.model."
"""The prefix of every module's path in PEFT's files."""


def module_of(label: str) -> str:
    """Return the module that a tensor belongs to."""
    return label.rpartition(".")[0]


class FactorPaths:
    """The path under which PEFT keeps the factors of each tensor: mostly the path of its module.

    Parameters of one module are wrapped one in another, the first innermost, and so is the output projection of torch's
    multi-head attention. ``labels`` are the labels of all tensors with factors, ``experts`` of the parameters among
    them.
    """

    def __init__(self, labels: Iterable[str], experts: Iterable[str]) -> None:
        self._labels = set(labels)
        self._experts: defaultdict[str, list[str]] = defaultdict(list)
        for label in experts:
            self._experts[module_of(label)].append(label.rpartition(".")[2])

    def of(self, label: str) -> str:
        """Return the path of a tensor's factors, without PEFT's prefix."""
        module, _, parameter = label.rpartition(".")
        names = in_order(self._experts.get(module, ()))
        if parameter in names:
            return module + ".base_layer" * (len(names) - 1 - names.index(parameter))
        if self.applied_twice(label):
            return f"{module_of(module)}.base_layer.out_proj"
        return module

    def applied_twice(self, label: str) -> bool:
        """Return whether PEFT adds a tensor's factors twice, as on the output of torch's multi-head attention."""
        module = module_of(label)
        return module.endswith(".out_proj") and f"{module_of(module)}.in_proj_weight" in self._labels


def factor_tensors(
    path: str, change: Change, shape: tuple[int, ...], rank: int, dtype_name: str
) -> tuple[OutputTensor, ...]:
    """Return the two factors, down then up, of a change of a tensor of this shape, as PEFT stores them."""
    batch: tuple[int, ...] = ()
    kernel: Sequence[int] = ()
    if change.kind == "experts":
        batch, shape = shape[:1], shape[1:]
        outputs, inputs = shape[::-1] if change.is_transposed((*batch, *shape)) else shape
    elif isinstance(change, LoraChange):
        outputs, inputs, kernel = change.up.shape[0], change.down.shape[1], change.down.shape[2:]
    else:
        outputs, inputs, *kernel = shape[::-1] if change.is_transposed(shape) else shape
    leaves = (
        ("lora_embedding_A", "lora_embedding_B") if change.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    terms = rank * (batch[0] if batch else 1)
    return (
        OutputTensor(f"{PREFIX}{path}.{leaves[0]}", dtype_name, (terms, inputs, *kernel)),
        OutputTensor(f"{PREFIX}{path}.{leaves[1]}", dtype_name, (outputs, terms, *(1 for _ in kernel))),
    )
