"""The stacks of blocks in a model and each tensor's position in them, found from the tensors' names alone."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from merging.maths.layouts import Layout, find_layout

__all__ = ["BEFORE_BLOCKS", "LayerPosition", "Stacks"]

# The leftmost segment that is a number, with names on both sides: a number in front is a container, as in
# sentence-transformers. The bound keeps int() cheap whatever a file claims.
_INDEX = re.compile(r"\.([0-9]{1,6})\.")

# Flat names of LoRA files: a component, and a module whose dots are underscores. All of its numbers are looked at, as
# in dotted names: whether one counts blocks is decided there.
_FLAT_PREFIX = re.compile(r"(lora_(?:prior_unet|unet|te[0-9]?|[a-z]+)|lycoris|oft_[a-z]+[0-9]?|[A-Z]\w*?_lora)_+")
_BEFORE_NUMBER, _BEHIND_NUMBER = re.compile(r"_(?=[0-9]{1,6}[_.])"), re.compile(r"(?<=\.)([0-9]{1,6})_")

# The names of the blocks of one stage in hierarchical backbones; the number may also follow at once (SegFormer).
_BLOCK = re.compile(r"(?:(layers?|blocks?)\.)?([0-9]{1,6})\.")

# Pairs of stacks that run one after the other: Flux in diffusers, and as published.
_SEQUELS = {"single_transformer_blocks": "transformer_blocks", "single_blocks": "double_blocks"}

# Names behind the blocks although a part of them looks like an embedding or a stem.
_TAIL = re.compile(
    r"(?:^|\.)(?:\w+_)?(?:heads?|neck|pooler|classifier|projector|embed_out|class_embed|bbox_embed)(?:\.|$)"
)

# Names in front of the blocks: whole segments, or whole words between underscores.
_FRONT = re.compile(
    r"(?:^|\.)(?:wte|wpe|shared|conv\d?|bn1|prenet|feature_projection|pre_layr?norm|pre_layernorm|layernorm_pre"
    r"|(?:norm|ln)_pre|\w+_tokens?)(?:\.|$)"
    r"|(?:^|[._])(?:embed\w*|emb|embd|patch\w*|pos|position\w*|stem)(?=[._]|$)"
)


@dataclass(frozen=True, slots=True)
class LayerPosition:
    """The position of a tensor in the depth of a model: a layer of a stack of blocks, or outside the stacks.

    Attributes:
        stack: the prefix of the stack's names; None outside the stacks.
        layer: the index of the layer; None outside the stacks. It may reach ``layers`` and beyond where the length
            comes from elsewhere (a config, the user).
        layers: the number of layers in the stack; 0 outside the stacks.
        after: outside the stacks, whether the tensor comes after the blocks (final norm, head, pooler, projection)
            and not before them (embeddings, stems).
        index: the number of the layer in its name; None outside the stacks.
        layout: the layout of the model's blocks, if it is a known one.
    """

    stack: str | None = None
    layer: int | None = None
    layers: int = 0
    after: bool = False
    index: int | None = field(default=None, compare=False)
    layout: Layout = field(default="", compare=False)

    @property
    def depth(self) -> float:
        """0 in the first block; 1 in the last, beyond it, and in a stack of one; 0 outside the stacks."""
        if self.layer is None:
            return 0.0
        return min(1.0, self.layer / (self.layers - 1)) if self.layers > 1 else 1.0

    @property
    def depth_with_tail(self) -> float:
        """The same, but 1 for tensors after the blocks."""
        return 1.0 if self.layer is None and self.after else self.depth


BEFORE_BLOCKS = LayerPosition()
"""The position of embeddings, stems and all else before the blocks."""


@dataclass(frozen=True, slots=True)
class _Numbering:
    """The numbering of one stack: ``layers`` in all, its own from ``offset`` on.

    ``own`` is the number of its own layers, where a stack before or behind it also counts in ``layers``; else 0.

    A hierarchical stack is flattened: ``blocks`` are its (stage, block) in order, under ``family`` ("" is none). Parts
    of a stage outside its blocks go with its first block if they are named in ``leading``, else with its last.
    """

    layers: int
    offset: int = 0
    own: int = 0
    family: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    leading: frozenset[str] = frozenset()

    def layer(self, index: int, rest: str) -> int:
        """Return the layer of a name, from its first number and the rest behind it."""
        if not self.blocks:
            return self.offset + index
        block = _BLOCK.match(rest)
        if block and (block[1] or "") == self.family:
            return bisect_left(self.blocks, (index, int(block[2])))
        if _part(rest) in self.leading:
            return bisect_left(self.blocks, (index, 0))
        return max(0, bisect_left(self.blocks, (index + 1, 0)) - 1)


@dataclass(frozen=True, slots=True)
class Stacks:
    """The stacks of repeated blocks in a model, by the prefix of their names. Encoder and decoder count separately."""

    numberings: Mapping[str, _Numbering]
    layout: Layout = ""
    _positions: dict[tuple[str, str], LayerPosition] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """The positions of layers that were asked for, which many tensors share."""

    @classmethod
    def from_names(cls, names: Iterable[str], *, complete: bool = True, single: Collection[str] = ()) -> Stacks:
        """Find the stacks in the names of tensors.

        The leftmost number in a name is its index, and the part before it the prefix. In a whole model (``complete``) a
        prefix is a stack if its indices are exactly 0 to n-1, with n at least 2. An adapter may cover few layers: there
        any index counts, and the largest one gives n. Neither experts nor rows of bare layers (``mlp.0.weight``) are
        stacks. Stages of blocks (Swin, ConvNeXt, ResNet, SegFormer) are flattened into one row of blocks. Flat names of
        LoRA files carry their block as well (``lora_unet_blocks_4_ffn_0``). ``single`` are prefixes of stacks that are
        known to have one block only.
        """
        names = list(names)
        rests: defaultdict[str, defaultdict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in map(_split_flat, names):
            found = _INDEX.search(name)
            if found:
                rests[name[: found.start()]][int(found[1])].append(name[found.end() :])
        numberings = {
            prefix: _numbering(stages)
            for prefix, stages in rests.items()
            if _is_stack(prefix, stages, complete and prefix not in single)
        }
        return cls(_join_sequels(numberings), find_layout(names, complete))

    @property
    def lengths(self) -> dict[str, int]:
        """The number of its own layers of each stack, by prefix."""
        return {prefix: numbering.own or numbering.layers for prefix, numbering in self.numberings.items()}

    def limit(self, layers: int) -> Stacks:
        """Return the stacks with the number of layers in the config, where the names have a few more.

        DeepSeek-V3 and GLM store layers for multi-token prediction behind the last one: these get depth 1. Only one
        stack changes: the closest to the config's number that is at most twice as long. None does if one has exactly
        that number, since the vision tower of a small model may well be deeper than its language model.
        """
        _positive(layers)
        longer = [each.layers for each in self.numberings.values() if layers <= each.layers <= 2 * layers]
        main = min(longer, default=layers)
        return self._map(lambda each: replace(each, layers=layers) if each.layers == main and not each.blocks else each)

    def with_layers(self, layers: int) -> Stacks:
        """Return the stacks with this length for every one."""
        _positive(layers)
        return self._map(lambda each: replace(each, layers=layers))

    def position(self, name: str) -> LayerPosition:
        """Return the position of a tensor, whether or not it was among the names."""
        name = _split_flat(name)
        found = _INDEX.search(name)
        numbering = self.numberings.get(name[: found.start()]) if found else None
        if found is None or numbering is None:
            after = bool(_TAIL.search(name)) or not _FRONT.search(name)
            return LayerPosition(after=after, layout=self.layout)
        prefix, index = name[: found.start()], int(found[1])
        if numbering.blocks:
            layer = numbering.layer(index, name[found.end() :])
            return LayerPosition(prefix, layer, numbering.layers, index=index, layout=self.layout)
        known = self._positions.get((prefix, found[1]))
        if known is None:
            layer = numbering.layer(index, "")
            known = LayerPosition(prefix, layer, numbering.layers, index=index, layout=self.layout)
            self._positions[prefix, found[1]] = known
        return known

    def _map(self, change: Callable[[_Numbering], _Numbering]) -> Stacks:
        changed = {prefix: change(numbering) for prefix, numbering in self.numberings.items()}
        return replace(self, numberings=changed)


def _split_flat(name: str) -> str:
    """Return a flat name with its component and its numbers between dots; any other name as it is."""
    if name.count(".") > 1:
        return name
    apart = _BEFORE_NUMBER.sub(".", _FLAT_PREFIX.sub(r"\1.", name, count=1))
    return _BEHIND_NUMBER.sub(r"\1.", apart)


def _positive(layers: int) -> None:
    if layers < 1:
        raise ValueError(f"a stack has at least one layer, and {layers} was given")


def _is_stack(prefix: str, stages: Mapping[int, list[str]], complete: bool) -> bool:
    if prefix.rpartition(".")[2] in ("expert", "experts"):
        return False
    if complete and (len(stages) < 2 or max(stages) != len(stages) - 1):
        return False
    # a block holds modules, which hold tensors
    return all(any("." in rest for rest in rests) for rests in stages.values())


def _numbering(stages: Mapping[int, list[str]]) -> _Numbering:
    """Return the numbering of a stack, from the rests of the names behind each of its indices."""
    families: defaultdict[str, dict[int, dict[int, set[str]]]] = defaultdict(dict)
    for index, rests in stages.items():
        for rest in rests:
            block = _BLOCK.match(rest)
            if block:
                blocks = families[block[1] or ""].setdefault(index, {})
                blocks.setdefault(int(block[2]), set()).add(rest[block.end() :])
    for family, inner in families.items():
        if len(inner) == len(stages) and any(map(_alike, inner.values())):
            order = tuple(sorted((stage, block) for stage, blocks in inner.items() for block in blocks))
            return _Numbering(len(order), family=family, blocks=order, leading=_leading(stages))
    return _Numbering(max(stages) + 1)


def _alike(blocks: Mapping[int, set[str]]) -> bool:
    """Return whether the first block is built like another one; the two parts of a T5 block are not."""
    first, *others = (blocks[index] for index in sorted(blocks))
    modular = any("." in rest for rest in first)
    return modular and any(2 * len(first & other) > len(first | other) for other in others)


def _leading(stages: Mapping[int, list[str]]) -> frozenset[str]:
    """Return the parts before the blocks of their stage: parts that the first stage lacks, and embeddings.

    Where all stages but the last have a part (Swin's ``downsample``), it comes after the blocks.
    """
    parts = {index: {_part(rest) for rest in rests} for index, rests in stages.items()}
    first, last = parts[min(parts)], parts[max(parts)]
    every = set().union(*parts.values())
    return frozenset(part for part in every if (part in last and part not in first) or _FRONT.search(part))


def _part(rest: str) -> str:
    return rest.partition(".")[0]


def _join_sequels(numberings: dict[str, _Numbering]) -> dict[str, _Numbering]:
    """Let a stack that follows another continue its numbers."""
    for prefix in list(numberings):
        parent, dot, leaf = prefix.rpartition(".")
        before = parent + dot + _SEQUELS.get(leaf, "")
        if leaf in _SEQUELS and before in numberings:
            first, second = numberings[before].layers, numberings[prefix].layers
            both = first + second
            numberings[before] = replace(numberings[before], layers=both, own=first)
            numberings[prefix] = replace(numberings[prefix], layers=both, own=second, offset=first)
    return numberings
