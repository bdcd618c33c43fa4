"""A model made of blocks of other models: their tensors under new names, read from the same files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merging.errors import InputError, nearest
from merging.maths.layers import LayerPosition, Stacks
from merging.maths.site import Site
from merging.sources.checkpoint import Checkpoint
from merging.sources.multiplied import Multiplied
from merging.sources.stacked_config import Blocks, stack_config
from merging.sources.stored import Stored
from merging.sources.tied_weights import WITH_HEAD, is_head, same_values

__all__ = ["StackPart", "stack_layers"]

_HEAD = "lm_head.weight"
"""The output head of causal language models."""

_TOWERS = ("vision", "visual", "image", "audio", "speech")
"""Words in the names of the parts of a model that are not its language model."""


@dataclass(frozen=True, slots=True, eq=False)
class StackPart:
    """A part of a stack.

    Attributes:
        model: the model.
        name: its name, for errors.
        stack: a word of the prefix of the stack that is meant; None for the only one.
        layers: the first block and the block behind the last; None for all.
        scale: returns the number that multiplies the tensor at a site.
        widest: the type of the output by its name in files, to which products are rounded where it is wider.
    """

    model: Checkpoint
    name: str
    stack: str | None
    layers: tuple[int, int] | None
    scale: Callable[[Site], float]
    widest: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """A part whose stack is found: its prefix, the blocks' tensors by index and name, and all other tensors."""

    part: StackPart
    prefix: str
    total: int
    start: int
    stop: int
    blocks: Mapping[int, Mapping[str, Stored]]
    rest: Mapping[str, Stored]
    others: Mapping[str, int]

    @property
    def first_only(self) -> frozenset[str]:
        """The tensors that the first block has in addition to all that the others have."""
        first, *others = (frozenset(self.blocks[index]) for index in range(self.total))
        every = frozenset[str]().union(*others)
        return first - every if others and every <= first else frozenset()


def stack_layers(parts: Sequence[StackPart], label: str) -> Checkpoint:
    """Return a model made of parts of models: their blocks one after the other, counted from 0.

    Tensors before the blocks, and other stacks of blocks, come from the first part; tensors after them from the last.

    Args:
        parts: the parts, from below.
        label: the name of the model in messages.

    Raises:
        InputError: for blocks that a model does not have, and for parts that do not fit together.
    """
    opened = [_open(part) for part in parts]
    first, last = opened[0], opened[-1]
    for each in opened[1:]:
        _check_alike(first, each)
    _check_first(opened)
    tensors = dict(_around(first, first, after=False))
    place = 0
    for each in opened:
        tensors |= _rename_blocks(each, first, place)
        place += each.stop - each.start
    trailing = dict(_around(last, first, after=True))
    tensors |= trailing | _own_head(first, last, trailing)
    for index in range(last.total, len(last.blocks)):  # of multi-token prediction, behind the last block
        extra = last.blocks[index].items()
        tensors |= {f"{first.prefix}.{place + index - last.total}.{rest}": stored for rest, stored in extra}
    described = [
        Blocks(each.part.name, each.part.model.config, each.prefix, range(each.start, each.stop), each.total)
        for each in opened
    ]
    config = stack_config(described, first.others)
    files = tuple(dict.fromkeys(file for each in opened for file in each.part.model.files))
    single = (first.prefix,) if place == 1 else ()
    return replace(
        first.part.model, path=Path(label), tensors=tensors, files=files, config=config, shared={}, single=single
    )


def _open(part: StackPart) -> _Opened:
    """Find the stack and the blocks that a part means. Raises :class:`~merging.errors.InputError`."""
    model = part.model
    if model.components:
        raise InputError(
            f"{part.name}: is a pipeline of several models: layers are taken of one model: name its folder"
        )
    lengths = _count_blocks(model) or _single_block(model)
    prefix = _find_stack(part, lengths)
    total = _total(part, prefix, lengths)
    start, stop = part.layers or (0, total)
    if stop > total:
        raise InputError(
            f"{part.name}: has {total} blocks ({prefix}.0 to {prefix}.{total - 1}), and {start}:{stop} is asked for: "
            f"the last number is at most {total}"
        )
    blocks: defaultdict[int, dict[str, Stored]] = defaultdict(dict)
    rest: dict[str, Stored] = {}
    for name, stored in model.tensors.items():
        number, _, inner = name.removeprefix(f"{prefix}.").partition(".")
        if name.startswith(f"{prefix}.") and number.isdecimal() and inner:
            blocks[int(number)][inner] = stored
        else:
            rest[name] = stored
    others = {name: length for name, length in lengths.items() if name != prefix}
    return _Opened(part, prefix, total, start, stop, blocks, rest, others)


def _count_blocks(model: Checkpoint) -> dict[str, int]:
    """Return the stacks of blocks that are numbered in one row, with their lengths."""
    names = list(model.tensors)
    lengths = {}
    for prefix, numbering in Stacks.from_names(names, single=model.single).numberings.items():
        if not numbering.blocks:
            inner = (name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}."))
            lengths[prefix] = len({rest.partition(".")[0] for rest in inner})
    return lengths


def _single_block(model: Checkpoint) -> dict[str, int]:
    """Return the stack of a model whose config states one block: a slice, whose names alone do not show a row."""
    prefixes = {name.partition(".0.")[0] for name in model.tensors if ".0." in name}
    return dict.fromkeys(prefixes, 1) if model.layers == 1 and len(prefixes) == 1 else {}


def _find_stack(part: StackPart, lengths: Mapping[str, int]) -> str:
    """Return the prefix of the stack that a part means. Raises :class:`~merging.errors.InputError`."""
    listed = ", ".join(f"{prefix} ({length} blocks)" for prefix, length in lengths.items())
    if not lengths or "depths" in part.model.config:
        raise InputError(f"{part.name}: has no blocks that are numbered in one row, so that no layers can be taken")
    if part.stack is not None:
        named = [prefix for prefix in lengths if part.stack == prefix or part.stack in prefix.split(".")]
        if len(named) > 1:
            raise InputError(f"{part.name}: {part.stack} may be any of {', '.join(named)}: write the whole name")
        if not named:
            words = [word for prefix in lengths for word in prefix.split(".")]
            raise InputError(
                f"{part.name}: has no stack of blocks {part.stack!r}{nearest(part.stack, words)}: {listed}"
            )
        return named[0]
    found = [prefix for prefix in lengths if not any(word in prefix for word in _TOWERS)] or list(lengths)
    stated = [prefix for prefix in found if lengths[prefix] == part.model.layers]
    if len(found) > 1 and len(stated) == 1 and not any("decoder" in prefix.split(".") for prefix in found):
        return stated[0]
    if len(found) > 1:
        word = next(word for word in found[0].split(".") if word not in found[1].split("."))
        raise InputError(
            f"{part.name}: has several stacks of blocks, {listed}: name the stack in front of the range, as in "
            f"{word}=0:{lengths[found[0]]}"
        )
    return found[0]


def _total(part: StackPart, prefix: str, lengths: Mapping[str, int]) -> int:
    """Return the number of blocks that a model runs: it may have a few more, for multi-token prediction."""
    stated = part.model.layers
    more = stated is not None and stated < lengths[prefix] <= 2 * stated and stated not in lengths.values()
    return stated if more and stated is not None else lengths[prefix]


def _check_alike(first: _Opened, other: _Opened) -> None:
    """Refuse blocks that do not belong into one model. Raises :class:`~merging.errors.InputError`."""
    shapes: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for block in first.blocks.values():
        for name, stored in block.items():
            shapes[name].add(stored.shape)
    for index in range(other.start, other.stop):
        for name, stored in other.blocks[index].items():
            if name not in shapes:
                raise InputError(
                    f"{other.part.name} has {other.prefix}.{index}.{name}, and no block of {first.part.name} has such "
                    f"a tensor: blocks of one model are stacked, or of models that are built alike"
                )
            if stored.shape not in shapes[name]:
                wanted = " or ".join(str(shape) for shape in sorted(shapes[name]))
                raise InputError(
                    f"{other.prefix}.{index}.{name} of {other.part.name} has the shape {stored.shape}, and "
                    f"{first.part.name} has {wanted}: blocks of models of one width are stacked"
                )


def _check_first(opened: Sequence[_Opened]) -> None:
    """Refuse to move a first block that lacks tensors which all others have, or to put another in its place.

    Raises :class:`~merging.errors.InputError`.
    """
    place = 0
    for each in opened:
        names = [frozenset(each.blocks[index]) for index in range(each.total)]
        every = frozenset[str]().union(*names[1:2]).intersection(*names[1:])
        lacking = sorted(every - names[0]) if names[0] < every else []
        for index in range(each.start, each.stop):
            if lacking and (index == 0) != (place == 0):
                raise InputError(
                    f"{each.part.name}: its first block has no {lacking[0]}, unlike all others: it is the first of a "
                    f"stack, once, and no other block is"
                )
            place += 1


def _rename_blocks(opened: _Opened, first: _Opened, place: int) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a part's blocks by their names in the stack, where its first block is number ``place``."""
    for number, index in enumerate(range(opened.start, opened.stop)):
        tensors = dict(opened.blocks[index])
        if opened.first_only and (index == 0) != (place + number == 0):
            for name in opened.first_only:
                tensors.pop(name, None)
            if place + number == 0:
                tensors |= {name: opened.blocks[0][name] for name in opened.first_only}
        position = LayerPosition(opened.prefix, number, opened.stop - opened.start)
        for name, stored in tensors.items():
            multiplied = _multiply(opened.part, f"{opened.prefix}.{index}.{name}", stored, position)
            yield f"{first.prefix}.{place + number}.{name}", multiplied


def _around(opened: _Opened, first: _Opened, after: bool) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors before or after the blocks by their names in the stack; other stacks are before them."""
    roots = tuple(_root(prefix, opened.prefix) for prefix in opened.others)
    own, wanted = (each.prefix.rpartition(".")[0] for each in (opened, first))
    for name, stored in opened.rest.items():
        position = Stacks({}).position(name)
        if after != (position.after and not name.startswith(roots)):
            continue
        moved = f"{wanted}{name.removeprefix(own)}" if own != wanted and name.startswith(f"{own}.") else name
        yield moved, _multiply(opened.part, name, stored, position)


def _root(other: str, prefix: str) -> str:
    """Return the beginning of the names of another stack, and of all that belongs to it."""
    words, own = other.split("."), prefix.split(".")
    common = next((i for i, (one, two) in enumerate(zip(words, own, strict=False)) if one != two), len(words) - 1)
    return ".".join(words[: common + 1]) + "."


def _multiply(part: StackPart, name: str, stored: Stored, position: LayerPosition) -> Stored:
    factor = part.scale(Site(name, stored.shape, position))
    return Multiplied(stored, factor, part.widest) if factor != 1 and stored.floating else stored


def _own_head(first: _Opened, last: _Opened, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the head of the last part's model, where the first part's embedding would stand for it."""
    one, other = first.part.model, last.part.model
    architecture = str((other.config.get("architectures") or [""])[0])
    if one is other or any(map(is_head, tensors)) or not architecture.endswith(WITH_HEAD[:2]):
        return {}
    head, instead = other.lookup(_HEAD), one.lookup(_HEAD)
    if head is None or (one.tied and instead is not None and same_values(head, instead)):
        return {}
    return {_HEAD: head}
