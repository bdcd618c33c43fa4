"""A loaded network whose weights are replaced by merged ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from merging.errors import InputError
from merging.maths.lazy_torch import Tensor, torch
from merging.plan.names.conversion import CheckpointLoading
from merging.sources.regions import whole
from merging.sources.renaming import find_renaming

__all__ = ["NetworkWeights"]


class NetworkWeights:
    """The tensors of a network by the names of a checkpoint, whose values can be replaced.

    Args:
        network: the loaded base.
        base: the base's tensors that a merge replaces, by their names on disk.
        where: the base's name, for messages.
        stored: the shapes of all tensors of the base, by their names on disk.
        remedy: the way around, for messages.

    Attributes:
        names: the names in the network of the base's tensors that a merge replaces, by their names on disk.

    Raises :class:`~merging.errors.InputError` where the network has tensors of the merge in another form.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        base: Iterable[tuple[str, Tensor]],
        where: str,
        stored: Mapping[str, tuple[int, ...]],
        remedy: str,
    ) -> None:
        known: dict[str, Tensor] = dict(network.named_buffers(remove_duplicate=False))
        known |= dict(network.named_parameters(remove_duplicate=False))
        values = dict(base)
        shapes = {**stored, **{name: tuple(value.shape) for name, value in values.items()}}
        renaming, left = find_renaming(shapes, known, lambda name, other: shapes[name] == tuple(known[other].shape))
        other = set(left)
        names = {name: renaming(name) or name for name in shapes if name not in other}
        if left:  # names that transformers changes in another way
            pieces = CheckpointLoading(network).pieces({name: shapes[name] for name in left})
            first = {name: parts[0].of for name, parts in pieces.items()}
            names |= {name: own for name, own in first.items() if pieces[name] == [whole(own, shapes[name])]}
        unmatched = shapes.keys() - names.keys()
        reached = {id(known[own]) for own in names.values()}
        names = {name: own for name, own in names.items() if name in values}
        odd = next((name for name, own in names.items() if not _equal(known[own], values[name])), None)
        lacking = next(
            (
                own
                for own, each in network.named_parameters()
                if id(each) not in reached and ".pooler." not in f".{own}"
            ),
            None,
        )
        if not names or odd is not None or (unmatched and lacking is not None):
            raise InputError(
                f"{where}: {odd or lacking or next(iter(values))} has another form in memory than on the disk, so that "
                f"merges are not put into the loaded model: {remedy}"
            )
        self._network = network
        self.names: Mapping[str, str] = names
        self._tensors = {name: known[own] for name, own in names.items()}
        self._owners = {name: _owners(network, known[own]) for name, own in names.items()}

    def load(self, merged: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the values of all tensors of a merge."""
        with torch.no_grad():
            for name, value in merged:
                if name in self._tensors:
                    self._tensors[name].copy_(value)

    @contextmanager
    def at(self, merged: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the network with these tensors within the block, so that gradients reach them."""
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, value in merged.items():
                for holder, own in self._owners.get(name, ()):
                    replaced.append((holder, own, holder[own]))
                    holder[own] = value.to(holder[own].dtype)
            yield
        finally:
            for holder, own, tensor in reversed(replaced):
                holder[own] = tensor


def _equal(own: Tensor, stored: Tensor) -> bool:
    """Return whether both hold the same values, but for the rounding to the narrower type of the two."""
    own, stored = own.detach().cpu(), stored.cpu()
    return torch.equal(own, stored.to(own.dtype)) or torch.equal(own.to(stored.dtype), stored)


def _owners(network: torch.nn.Module, tensor: Tensor) -> list[tuple[dict[str, Any], str]]:
    """Return the places of a tensor in the modules of a network, several where it is tied."""
    places: list[tuple[dict[str, Any], str]] = []
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            places += [(held, own) for own, each in held.items() if each is tensor]
    return places
