"""The models of a mixture: a checkpoint, with the changes of an adapter where one is named with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merging.errors import InputError
from merging.hub.open_model import open_model, require_full
from merging.maths.lazy_torch import Tensor, torch
from merging.moe.model_name import ModelName
from merging.plan.names.resolve import Resolver
from merging.sources import Adapter, Checkpoint
from merging.sources.changes import Change
from merging.sources.stored import Stored

__all__ = ["MoeSource", "open_moe_source"]


@dataclass(frozen=True, slots=True, eq=False)
class MoeSource:
    """A model that gives tensors to a mixture.

    Attributes:
        name: its name in the recipe.
        checkpoint: the full model.
        changes: an adapter's changes, by the names of the checkpoint's tensors.
        adapter: the adapter, None for a full model alone.
    """

    name: str
    checkpoint: Checkpoint
    changes: Mapping[str, Change] = field(default_factory=dict)
    adapter: Adapter | None = None

    def find_stored(self, name: str) -> Stored:
        """Return the checkpoint's tensor of a name. Raises :class:`~merging.errors.InputError` if it has none."""
        if name not in self.checkpoint.tensors:
            raise InputError(f"{self.name}: has no {name}, which its config wants")
        return self.checkpoint.tensors[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a whole tensor with the adapter's change, computed in at least float32.

        Args:
            name: the name of the tensor in the checkpoint.
            dtype: the type to return; by default the type that it was computed in.
        """
        stored = self.find_stored(name)
        computed = torch.float64 if stored.dtype_name == "F64" else torch.float32
        value = stored.read()
        change = self.changes.get(name)
        if change is not None:
            value = value.to(computed)
            value = value + change.read(stored.shape, lambda: value, computed).dense()
        return value.to(dtype or computed)

    @property
    def files(self) -> list[Path]:
        """The folders and files that are read."""
        models = [each for each in (self.checkpoint, self.adapter) if each is not None]
        return [path for model in models for path in (model.path, *model.files)]


def open_moe_source(name: ModelName, base: MoeSource | None = None) -> MoeSource:
    """Open a model of a recipe; only headers are read.

    Args:
        name: the name, perhaps with a LoRA.
        base: the mixture's base, to which an adapter without a model of its own belongs.

    Raises:
        InputError: for a model that is not there, an adapter of another model, or two adapters on each other.
        FormatError: for a model that is damaged.
    """
    model = open_model(name.model)
    if isinstance(model, Adapter):
        if name.lora is not None:
            raise InputError(f"{name}: {name.model} is an adapter itself: write its model in front of the +")
        if base is None:
            raise InputError(f"{name}: is an adapter: write MODEL+{name}, so that it has a base")
        if base.adapter is not None:
            raise InputError(f"{name}: is an adapter, and the base is a model with a LoRA: write MODEL+{name}")
        return _adapt(str(name), base.checkpoint, model)
    if name.lora is None:
        return MoeSource(str(name), model)
    adapter = open_model(name.lora)
    if not isinstance(adapter, Adapter):
        raise InputError(f"{name}: {name.lora} is a full model, and a LoRA is wanted behind the +")
    return _adapt(str(name), require_full(model, name.model, "the model in front of the +"), adapter)


def _adapt(name: str, checkpoint: Checkpoint, adapter: Adapter) -> MoeSource:
    changes = Resolver(checkpoint.tensors, checkpoint.config).resolve(adapter).changes
    return MoeSource(name, checkpoint, changes, adapter)
