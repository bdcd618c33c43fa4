"""U-Nets of Stable Diffusion under two sets of names: as published (``input_blocks.4.1``) and as in diffusers.

Both number the same blocks. The published names count all blocks together: resnets, attentions and down- or upsamplers.
diffusers counts levels, and within each level every kind separately. Arithmetic converts between the two, given the
number of resnets in a level (two in every model of the family; one more on the way up)."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["diffusers_flat", "diffusers_name", "published_name", "resnets_per_level"]

_STEM = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}

_PUBLISHED = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")
_PUBLISHED_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
_FLAT = re.compile(r"(?:((?:input|output)_blocks_\d+_\d+)|(middle_block_[012]))_(.+)")
_FLAT_STEM = {name.replace(".", "_"): name for name in _STEM}
_FLAT_RESNET = {name.replace(".", "_"): name for name in _RESNET}
_DIFFUSERS = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_DIFFUSERS_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.([01])\.(.+)")


def resnets_per_level(names: Iterable[str]) -> int:
    """Return the number of resnets in a level on the way down, from a whole U-Net's names; 2 if they do not show it."""
    known = set(names)
    if "conv_in.weight" in known:
        return sum(f"down_blocks.0.resnets.{number}.conv1.weight" in known for number in range(len(known))) or 2
    if "input_blocks.0.0.weight" in known:
        operations = (n for n in range(1, len(known)) if f"input_blocks.{n}.0.op.weight" in known)
        return next(operations, 3) - 1
    return 2


def diffusers_name(name: str, resnets: int = 2) -> str | None:
    """Return diffusers' name for a tensor with a published name, None for any other name."""
    found = _PUBLISHED_MIDDLE.fullmatch(name)
    if found:
        return _inner(f"mid_block.{_MIDDLE[found[1]]}", found[2])
    found = _PUBLISHED.fullmatch(name)
    if not found or (found[1] == "input" and found[2] == "0"):
        return _rename(name, _STEM)
    down, part, rest = found[1] == "input", found[3], found[4]
    level, number = divmod(int(found[2]) - down, resnets + 1)
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if down and rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if not down and part != "0" and rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    return _inner(f"{block}.{'resnets' if part == '0' else 'attentions'}.{number}", rest)


def diffusers_flat(name: str) -> str:
    """Return diffusers' flat name for a flat published name, and any other name unchanged.

    A level is assumed to have two resnets, as in every published model.
    """
    module, _, leaf = name.rpartition(".")
    found = _FLAT.fullmatch(module)
    if found:
        place, rest = found[1] or found[2], found[3]
        dotted = f"{_add_dots(place)}.{_FLAT_RESNET.get(rest, rest)}.{leaf}"
    else:
        dotted = f"{_FLAT_STEM.get(module, module)}.{leaf}"
    known, _, leaf = (diffusers_name(dotted) or "").rpartition(".")
    return f"{known.replace('.', '_')}.{leaf}" if known else name


def _add_dots(place: str) -> str:
    """Return a block's flat name with dots before its numbers."""
    return re.sub(r"_(?=\d)", ".", place)


def published_name(name: str, resnets: int = 2, attentive: Iterable[int] = ()) -> str | None:
    """Return the published name of a tensor of diffusers' U-Net, None for any other name.

    ``attentive`` are the levels on the way up that have attentions, so that their upsampler is the third module.
    """
    found = _DIFFUSERS_MIDDLE.fullmatch(name)
    if found:
        place = next(place for place, part in _MIDDLE.items() if part == f"{found[1]}.{found[2]}")
        return _outer(f"middle_block.{place}", found[1], found[3])
    found = _DIFFUSERS.fullmatch(name)
    if not found:
        return _rename(name, {theirs: ours for ours, theirs in _STEM.items()})
    down, kind, rest = found[1] == "down", found[3], found[5]
    level, number = int(found[2]), int(found[4])
    block = f"{'input' if down else 'output'}_blocks"
    first = level * (resnets + 1) + down
    if kind == "downsamplers":
        return f"{block}.{first + resnets}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"{block}.{first + resnets}.{2 if level in attentive else 1}.{rest}"
    return _outer(f"{block}.{first + number}.{0 if kind == 'resnets' else 1}", kind, rest)


def _inner(block: str, rest: str) -> str | None:
    found = _rename(rest, _RESNET) if ".resnets." in block else rest
    return found and f"{block}.{found}"


def _outer(block: str, kind: str, rest: str) -> str | None:
    found = _rename(rest, {theirs: ours for ours, theirs in _RESNET.items()}) if kind == "resnets" else rest
    return found and f"{block}.{found}"


def _rename(name: str, table: dict[str, str]) -> str | None:
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else None
