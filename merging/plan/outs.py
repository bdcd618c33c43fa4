"""What the tensors of a merged adapter are called in PEFT's files, and how they lie there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from merging.sources.adapter import Change, LoraChange
from merging.sources.peft.wrapped import in_order
from merging.storage.output_tensor import OutputTensor

__all__ = ["PREFIX", "Paths", "factors", "module_of"]

PREFIX = "base_model.model."
"""What PEFT puts before the path of every module."""


def module_of(label: str) -> str:
    """The module that a tensor belongs to."""
    return label.rpartition(".")[0]


class Paths:
    """The path under which PEFT keeps the factors of each tensor: mostly that of its module.

    Parameters of one module are wrapped one in another, the first innermost, and so is what projects the output of
    torch's multi-head attention. ``experts`` are the labels of parameters, ``labels`` those of all that has factors.
    """

    def __init__(self, labels: Iterable[str], experts: Iterable[str]) -> None:
        self._labels = set(labels)
        self._experts: defaultdict[str, list[str]] = defaultdict(list)
        for label in experts:
            self._experts[module_of(label)].append(label.rpartition(".")[2])

    def of(self, label: str) -> str:
        """The path of a tensor's factors, without PEFT's prefix."""
        module, _, parameter = label.rpartition(".")
        names = in_order(self._experts.get(module, ()))
        if parameter in names:
            return module + ".base_layer" * (len(names) - 1 - names.index(parameter))
        if self.applied_twice(label):
            return f"{module_of(module)}.base_layer.out_proj"
        return module

    def applied_twice(self, label: str) -> bool:
        """Whether PEFT adds these factors twice: those on the output of torch's multi-head attention."""
        module = module_of(label)
        return module.endswith(".out_proj") and f"{module_of(module)}.in_proj_weight" in self._labels


def factors(path: str, change: Change, shape: tuple[int, ...], rank: int, kind: str) -> tuple[OutputTensor, ...]:
    """The two factors, down then up, of a change of a tensor of this shape, as PEFT stores them."""
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
        OutputTensor(f"{PREFIX}{path}.{leaves[0]}", kind, (terms, inputs, *kernel)),
        OutputTensor(f"{PREFIX}{path}.{leaves[1]}", kind, (outputs, terms, *(1 for _ in kernel))),
    )
