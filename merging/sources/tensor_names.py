"""The names that an adapter's file gives to its changes, for a merged adapter that keeps them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from merging.sources.adapter import Adapter, TensorNames
from merging.sources.changes import Change, LoraChange
from merging.sources.lora_headers import METADATA_KEY
from merging.sources.lycoris import leaf_of
from merging.sources.stored import FileContents

__all__ = ["add_tensor_names"]


def add_tensor_names(adapter: Adapter, opened: FileContents) -> Adapter:
    """Return an adapter with the names that its file, ``opened``, gives to each target.

    Names that the adapter has already (from inside a pack) are kept. Targets that share a tensor of the file, or use
    parts of a tensor, have no names of their own and are left out.
    """
    tensors, metadata = opened
    names = {id(stored): name for name, stored in tensors.items()}
    parts = (part for change in adapter.changes.values() for part in change.tensors)
    uses = Counter(each for part in parts for each in {id(part), *map(id, part.made_of)})
    written = dict(adapter.tensor_names)
    for target, change in adapter.changes.items():
        if change.tensors and all(id(part) in names and uses[id(part)] == 1 for part in change.tensors):
            found = _tensor_names(change, [names[id(part)] for part in change.tensors])
            written[target] = replace(found, alpha=f"{found.stem}.alpha" in tensors)
    return replace(adapter, tensor_names=written, configured=adapter.configured or METADATA_KEY in metadata)


def _tensor_names(change: Change, names: Sequence[str]) -> TensorNames:
    if isinstance(change, LoraChange):
        down, up = (name.split(".") for name in names[:2])
        same = next(place for place, parts in enumerate(zip(down, up, strict=True)) if len(set(parts)) > 1)
        return TensorNames(".".join(down[:same]), (names[0], names[1]))
    leaf = leaf_of(names[0])
    stem = leaf[0] if leaf else names[0].rpartition(".")[0]
    return TensorNames(stem, (names[0],) if len(names) == 1 else ())
