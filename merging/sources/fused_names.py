"""Flux and Stable Diffusion 3 as published, where projections that diffusers keeps apart are one tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Rows", "Style", "paired_names"]

Shapes = Mapping[str, tuple[int, ...]]
Style = Literal["diffusers", "published"]


@dataclass(frozen=True, slots=True)
class Rows:
    """``length`` rows of a stored tensor from ``start`` on."""

    name: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Rule:
    """A published module, and what diffusers has instead; ``{}`` is the number of the block.

    Several modules take its rows one after the other: equal shares, or all but the last one as many as it has inputs
    (``narrow``). ``swapped`` modules scale and shift, in this order in diffusers, and the other way round as published.
    """

    published: str
    diffusers: tuple[str, ...]
    narrow: bool = False
    swapped: bool = False


def _block(published: str, diffusers: str, modules: Mapping[str, str]) -> list[_Rule]:
    return [
        _Rule(f"{published}.{theirs}", tuple(f"{diffusers}.{each}" for each in ours.split()), swapped="adaLN" in theirs)
        for theirs, ours in modules.items()
    ]


_FLUX = [
    *_block(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
    ),
    _Rule(
        "single_blocks.{}.linear1",
        tuple(f"single_transformer_blocks.{{}}.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        narrow=True,
    ),
    *_block(
        "single_blocks.{}", "single_transformer_blocks.{}", {"linear2": "proj_out", "modulation.lin": "norm.linear"}
    ),
    _Rule("img_in", ("x_embedder",)),
    _Rule("txt_in", ("context_embedder",)),
    *(
        _Rule(f"{theirs}.{layer}_layer", (f"time_text_embed.{ours}.linear_{number}",))
        for theirs, ours in (
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        )
        for number, layer in ((1, "in"), (2, "out"))
    ),
]
_SD3 = [
    *(
        rule
        for theirs, attention, q, out, feed_forward, norm in (
            ("x_block", "attn", "to_{}", "to_out.0", "ff", "norm1"),
            ("context_block", "attn", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
        )
        for rule in _block(
            f"joint_blocks.{{}}.{theirs}",
            "transformer_blocks.{}",
            {
                "attn.qkv": " ".join(f"{attention}.{q.format(part)}" for part in "qkv"),
                "attn.proj": f"{attention}.{out}",
                "mlp.fc1": f"{feed_forward}.net.0.proj",
                "mlp.fc2": f"{feed_forward}.net.2",
                "adaLN_modulation.1": f"{norm}.linear",
            },
        )
    ),
    *_block(
        "joint_blocks.{}.x_block",
        "transformer_blocks.{}",
        {"attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v", "attn2.proj": "attn2.to_out.0"},
    ),
    _Rule("x_embedder.proj", ("pos_embed.proj",)),
    _Rule("context_embedder", ("context_embedder",)),
    *(
        _Rule(f"{theirs}.mlp.{place}", (f"time_text_embed.{ours}.linear_{number}",))
        for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
        for number, place in ((1, 0), (2, 2))
    ),
]
_LAST = [
    _Rule("final_layer.linear", ("proj_out",)),
    _Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
]

_NUMBER = re.compile(r"(?<=blocks\.)\d+(?=\.)")


def paired_names(shapes: Shapes) -> Iterator[tuple[Style, str, tuple[Rows, ...]]]:
    """Whose name it is, a tensor's name, and the rows of the given tensors that it consists of.

    ``shapes`` are those of a denoiser's tensors, or of some of them, under either names. Tensors that no rule knows
    are left out.
    """
    rules = _rules(shapes)
    by_name = {name: rule for rule in rules for name in (rule.published, *rule.diffusers)}
    done = set()
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        number = _NUMBER.search(module)
        rule = by_name.get(_NUMBER.sub("{}", module, count=1))
        if rule is None or leaf not in ("weight", "bias"):
            continue
        block = number[0] if number else ""
        if (rule.published, block, leaf) not in done:
            done.add((rule.published, block, leaf))
            yield from _pair(rule, block, leaf, shapes)


def _rules(shapes: Shapes) -> list[_Rule]:
    """The rules of the family that the names belong to; none for a denoiser that has one set of names."""
    first = {name.partition(".")[0] for name in shapes}
    if first & {"double_blocks", "single_blocks", "single_transformer_blocks"}:
        return _FLUX + _LAST
    patched = {"transformer_blocks", "pos_embed", "time_text_embed"} <= first and "txt_norm" not in first
    return _SD3 + _LAST if "joint_blocks" in first or patched else []


def _pair(rule: _Rule, block: str, leaf: str, shapes: Shapes) -> Iterator[tuple[Style, str, tuple[Rows, ...]]]:
    """One rule at one block: each name, and where its rows lie."""
    published = f"{rule.published.format(block)}.{leaf}"
    diffusers = [f"{each.format(block)}.{leaf}" for each in rule.diffusers]
    if published in shapes:
        total = shapes[published][0]
        weight = shapes.get(f"{rule.published.format(block)}.weight", ())
        sizes = _sizes(rule, total, weight)
        yield "published", published, (Rows(published, 0, total),)
        start = 0
        for name, size in zip(diffusers, sizes, strict=False):
            yield "diffusers", name, _turned(rule, (Rows(published, start, size),), weight)
            start += size
        return
    whole = {name: (Rows(name, 0, shapes[name][0]),) for name in diffusers if name in shapes}
    for name, rows in whole.items():
        yield "diffusers", name, rows
    if len(whole) == len(diffusers):
        weight = shapes.get(f"{rule.diffusers[0].format(block)}.weight", ())
        yield "published", published, _turned(rule, tuple(row for rows in whole.values() for row in rows), weight)


def _sizes(rule: _Rule, total: int, weight: tuple[int, ...]) -> list[int]:
    """How many rows each of diffusers' modules has; empty if that cannot be told."""
    parts = len(rule.diffusers)
    if not rule.narrow:
        return [total // parts] * parts if total % parts == 0 else []
    width = weight[1] if len(weight) == 2 else total
    rest = total - (parts - 1) * width
    return [*[width] * (parts - 1), rest] if rest > 0 else []


def _turned(rule: _Rule, rows: tuple[Rows, ...], weight: tuple[int, ...]) -> tuple[Rows, ...]:
    """The halves of a module that only scales and shifts, in the other order."""
    (first, *others) = rows
    if not rule.swapped or others or len(weight) != 2 or weight[0] != 2 * weight[1]:
        return rows
    half = first.length // 2
    return Rows(first.name, first.start + half, half), Rows(first.name, first.start, half)
