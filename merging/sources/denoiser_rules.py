"""Families of denoisers with two sets of names: as published, and as in diffusers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["NUMBER", "NameRule", "partners", "rules_of"]

NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")
"""The number of a block, the first in a name, dotted or flat."""


@dataclass(frozen=True, slots=True)
class NameRule:
    """A published module, and the modules of diffusers that replace it; ``{}`` is the number of the block.

    Several modules take its rows one after the other, in equal shares. With ``narrow``, all but the last have as many
    rows as the module has inputs. With ``grouped``, the first has as many, and the others share the rest equally.
    ``swapped`` modules scale and shift, in this order in diffusers, and in the other order as published. A parameter
    without a module of its own has a rule under its own name.
    """

    published: str
    diffusers: tuple[str, ...]
    narrow: bool = False
    grouped: bool = False
    swapped: bool = False


def _block(published: str, diffusers: str, modules: Mapping[str, str]) -> list[NameRule]:
    return [
        NameRule(
            f"{published}.{theirs}", tuple(f"{diffusers}.{each}" for each in ours.split()), swapped="adaLN" in theirs
        )
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
    NameRule(
        "single_blocks.{}.linear1",
        tuple(f"single_transformer_blocks.{{}}.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        narrow=True,
    ),
    *_block(
        "single_blocks.{}", "single_transformer_blocks.{}", {"linear2": "proj_out", "modulation.lin": "norm.linear"}
    ),
    NameRule("img_in", ("x_embedder",)),
    NameRule("txt_in", ("context_embedder",)),
    *(
        NameRule(f"{theirs}.{layer}_layer", (f"time_text_embed.{ours}.linear_{number}",))
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
    NameRule("x_embedder.proj", ("pos_embed.proj",)),
    NameRule("context_embedder", ("context_embedder",)),
    *(
        NameRule(f"{theirs}.mlp.{place}", (f"time_text_embed.{ours}.linear_{number}",))
        for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
        for number, place in ((1, 0), (2, 2))
    ),
]
_LAST = [
    NameRule("final_layer.linear", ("proj_out",)),
    NameRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
]

_QKV = {"img_attn": "attn.to_q attn.to_k attn.to_v", "txt_attn": "attn.add_q_proj attn.add_k_proj attn.add_v_proj"}

_FLUX2 = [
    *_block(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            "img_attn.qkv": _QKV["img_attn"],
            "txt_attn.qkv": _QKV["txt_attn"],
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    *_block(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    *(
        NameRule(f"{name}.lin", (f"{name}.linear",))
        for name in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
    ),
    NameRule("img_in", ("x_embedder",)),
    NameRule("txt_in", ("context_embedder",)),
    *(
        NameRule(f"{name}_in.{layer}_layer", (f"time_guidance_embed.{ours}_embedder.linear_{number}",))
        for name, ours in (("time", "timestep"), ("guidance", "guidance"))
        for number, layer in ((1, "in"), (2, "out"))
    ),
]
_HUNYUAN = [
    *_block(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            "img_attn_qkv": _QKV["img_attn"],
            "txt_attn_qkv": _QKV["txt_attn"],
            "img_attn_proj": "attn.to_out.0",
            "txt_attn_proj": "attn.to_add_out",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
        },
    ),
    *(rule for rule in _FLUX if rule.published == "single_blocks.{}.linear1"),
    *_block(
        "single_blocks.{}", "single_transformer_blocks.{}", {"linear2": "proj_out", "modulation.linear": "norm.linear"}
    ),
]
_WAN = [
    *_block(
        "blocks.{}",
        "blocks.{}",
        {
            **{
                f"{theirs}_attn.{part}": f"{ours}.{name}"
                for theirs, ours in (("self", "attn1"), ("cross", "attn2"))
                for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
            },
            "cross_attn.k_img": "attn2.add_k_proj",
            "cross_attn.v_img": "attn2.add_v_proj",
            "cross_attn.norm_k_img": "attn2.norm_added_k",
            **{
                f"{theirs}_attn.norm_{part}": f"{ours}.norm_{part}"
                for theirs, ours in (("self", "attn1"), ("cross", "attn2"))
                for part in "qk"
            },
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
        },
    ),
    NameRule("patch_embedding", ("patch_embedding",)),
    NameRule("blocks.{}.modulation", ("blocks.{}.scale_shift_table",)),
    NameRule("head.modulation", ("scale_shift_table",)),
    NameRule("head.head", ("proj_out",)),
    *(
        NameRule(f"{part}_embedding.{number}", (f"condition_embedder.{part}_embedder.linear_{name}",))
        for part in ("text", "time")
        for number, name in ((0, 1), (2, 2))
    ),
    NameRule("time_projection.1", ("condition_embedder.time_proj",)),
]
_Z_IMAGE = [
    rule
    for stack in ("layers", "noise_refiner", "context_refiner")
    for rule in _block(
        f"{stack}.{{}}.attention",
        f"{stack}.{{}}.attention",
        {"qkv": "to_q to_k to_v", "out": "to_out.0"},
    )
] + [
    NameRule(name, (name,))
    for stack in ("layers", "noise_refiner", "context_refiner")
    for part in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
    for name in (f"{stack}.{{}}.{part}",)
]
_LUMINA = [
    rule
    for stack in ("layers", "noise_refiner", "context_refiner")
    for rule in (
        NameRule(f"{stack}.{{}}.attention.qkv", tuple(f"{stack}.{{}}.attn.to_{part}" for part in "qkv"), grouped=True),
        NameRule(f"{stack}.{{}}.attention.out", (f"{stack}.{{}}.attn.to_out.0",)),
        NameRule(f"{stack}.{{}}.adaLN_modulation.1", (f"{stack}.{{}}.norm1.linear",)),
        *(
            NameRule(f"{stack}.{{}}.feed_forward.w{number}", (f"{stack}.{{}}.feed_forward.linear_{number}",))
            for number in (1, 2, 3)
        ),
    )
]

_STACKS = r"^(?:layers|(?:noise|context)_refiner)\.\d+\."
_MARKS = (
    (_FLUX2 + _LAST, r"(?:single|double)_stream_modulation|\.to_qkv_mlp_proj\.|\.ff(?:_context)?\.linear_(?:in|out)\."),
    (_HUNYUAN + _LAST, r"_blocks\.\d+\.(?:(?:img|txt)_(?:attn_|mlp\.fc|mod\.linear)|modulation\.linear)"),
    (_FLUX + _LAST, r"^(?:double_blocks|single_blocks|single_transformer_blocks)\."),
    (_WAN, r"^blocks\.\d+\.(?:(?:self|cross)_attn\.[qkvo]\.|cross_attn\.[kv]_img\.|attn[12]\.to_|ffn\.)"),
    (_LUMINA, _STACKS + r"(?:attn\.to_|adaLN_modulation\.1\.|feed_forward\.linear_)"),
    (_Z_IMAGE, _STACKS + r"(?:attention\.to_|adaLN_modulation\.0\.)"),
)
"""Families and the names that identify them, in order of precedence."""


def rules_of(names: Iterable[str]) -> list[NameRule]:
    """Return the rules of the family that a denoiser's names belong to; none for a denoiser with one set of names."""
    listed = list(names)
    first = {name.partition(".")[0] for name in listed}
    patched = {"transformer_blocks", "pos_embed", "time_text_embed"} <= first and "txt_norm" not in first
    if "joint_blocks" in first or patched:
        return _SD3 + _LAST
    return next((rules for rules, mark in _MARKS if any(re.search(mark, name) for name in listed)), [])


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _partners() -> Iterator[tuple[str, str, bool]]:
    """Yield pairs of flat modules of a rule, and whether both are the same tensor."""
    for rules in (_FLUX, _FLUX2, _HUNYUAN, _SD3, _LAST, _WAN, _Z_IMAGE, _LUMINA):
        for rule in rules:
            same = len(rule.diffusers) == 1 and not rule.swapped
            for ours in rule.diffusers:
                yield _flat(rule.published), _flat(ours), same
                yield _flat(ours), _flat(rule.published), same


_PARTNERS: defaultdict[str, dict[str, bool]] = defaultdict(dict)
for _one, _other, _same in _partners():
    if _one != _other:
        _PARTNERS[_one][_other] = _same


def partners(name: str) -> Mapping[str, bool]:
    """Return the names of a flat tensor in the other set of names, and whether each is all of the tensor."""
    module, dot, leaf = name.partition(".")
    found = NUMBER.search(module)
    others = _PARTNERS.get(NUMBER.sub("{}", module, count=1), {})
    return {other.format(found[0] if found else "") + dot + leaf: same for other, same in others.items()}
