"""Quantised outputs: the weights that are written as codes and scales, and the config's statement of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Any

from merging.display.tables import plural
from merging.errors import InputError, OptionError, option
from merging.maths.site import Site, inputs_by_outputs
from merging.plan.items import Item
from merging.plan.outputs.encodings import BLOCK, GROUP, NewFormat, encode_as, encode_like, new_statement
from merging.sources import Checkpoint
from merging.sources.quantized.dequantized_tensors import Dequantized, Mxfp4
from merging.sources.quantized.quantized_parts import QuantizedParts
from merging.sources.stored import Stored
from merging.sources.stored_bytes import StoredBytes
from merging.sources.tied_weights import text_config
from merging.storage.encodings import Encoding
from merging.storage.output_tensor import OutputTensor

__all__ = ["QuantizedOutput", "describe_errors", "quantize_output"]

_BLOCKED = re.compile(r"(?:^|\.)\d+\.")
"""A number in a tensor's name: it belongs to one of many blocks. Embeddings and heads do not, and keep 16 bits."""

_LEFT_OUT = re.compile(r"(?:^|[._])(?:gate|router|wg|visual|vision\w*|audio\w*|image\w*|embed\w*)(?=\.)")
"""Parts of names of routers, and of towers for images and sound, which published FP8 models keep in 16 bits."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Modules that vLLM fuses, which are quantised together or not at all."""

_EXPERTS = re.compile(r"experts\.(gate_up_proj|down_proj)$")
"""The names of experts that are stored as one tensor."""

_INPUTS_FIRST = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text")
"""Models whose experts are stored as inputs by outputs, which readers of FP8 do not expect."""

_GPT_OSS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
"""The modules that gpt-oss leaves in 16 bits, as its own config states them."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedOutput:
    """The weights of an output that are written as codes and scales.

    Attributes:
        encodings: how merged tensors are encoded, by name.
        copied: the number of quantised weights that are copied as they are.
        statement: the ``quantization_config`` of a new format; None where the base's own stays.
        notices: remarks for people.
    """

    encodings: Mapping[str, Encoding]
    copied: int = 0
    statement: Mapping[str, Any] | None = None
    notices: list[str] = field(default_factory=list)

    def state_in(self, config: dict[str, Any], of: Checkpoint) -> dict[str, Any]:
        """Return the output's config with its quantisation; ``of`` is the model that the config comes from."""
        if self.statement is not None:
            return {**config, "quantization_config": self.statement}
        return of.quantized.restore(config) if of.quantized else config


def describe_errors(errors: Mapping[str, float], output: QuantizedOutput) -> list[str]:
    """Return a remark on the relative errors of quantised tensors."""
    copied = f"{plural(output.copied, 'quantised weight')} copied as they are"
    if not errors:
        return [copied] if output.copied else []
    labels = sorted({output.encodings[name].label for name in errors})
    worst = max(errors, key=lambda name: (errors[name], name))
    mean = fsum(errors.values()) / len(errors)
    return [
        f"{plural(len(errors), 'weight')} quantised as {' and '.join(labels)}: relative error {mean:.2%} on average, "
        f"{errors[worst]:.2%} at most ({worst}){f'; {copied}' if output.copied else ''}"
    ]


def quantize_output(
    format: str, items: Sequence[Item], reference: Checkpoint
) -> tuple[tuple[Item, ...], QuantizedOutput]:
    """Return the items of a quantised model, and how their merged values are encoded.

    Args:
        format: ``keep`` for the format of the reference, tensor by tensor, or a new one.
        items: the items of the model, with their cuts.
        reference: the model that the output is like.

    Raises:
        MergingError: for a reference without quantised weights to keep, and models that the format is not for.
    """
    if format == "keep" or _has_format(reference, format):
        components = list(_quantized_components(reference, items))
        if not components:
            raise InputError(
                f"{reference.path}: has no quantised weights in a format that could be kept: use "
                f"{option('quantize', 'fp8')}, or leave it out"
            )
        return _keep_format(items, reference, components)
    if "_class_name" in reference.config or reference.library == "diffusers":
        raise OptionError(
            f"{option('quantize', format)} is for models of transformers, which {reference.path} is not: leave it out"
        )
    return _quantize_anew(format, items, reference)


def _quantized_components(reference: Checkpoint, items: Sequence[Item]) -> Iterator[tuple[str, QuantizedParts]]:
    """Yield the quantised parts of a model, or of its components that are merged, with the prefix of their names."""
    for name, component in (reference.components or {"": reference}).items():
        prefix = f"{name}." if name else ""
        if component.quantized is not None and any(item.site.name.startswith(prefix) for item in items):
            yield prefix, component.quantized


def _has_format(reference: Checkpoint, format: str) -> bool:
    """Return whether a model is quantised in a format already."""
    stated = reference.quantized.stated if reference.quantized else {}
    if format == "mxfp4":
        return stated.get("quant_method") == "mxfp4"
    if format == "fp8":
        return stated.get("quant_method") == "fp8" and stated.get("weight_block_size") == [BLOCK, BLOCK]
    groups = stated.get("config_groups")
    if stated.get("format") != "float-quantized" or not isinstance(groups, dict):
        return False
    schemes = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    strategy = format.removeprefix("fp8-")
    return all(isinstance(each, dict) and each.get("strategy") == strategy for each in schemes)


def _keep_format(
    items: Sequence[Item], reference: Checkpoint, components: Sequence[tuple[str, QuantizedParts]]
) -> tuple[tuple[Item, ...], QuantizedOutput]:
    """Write merged weights in the format that the reference has them in, and copy the others as they are."""
    weights = {prefix + name: (prefix, of, of.weights[name]) for prefix, of in components for name in of.weights}
    kept: list[Item] = []
    encodings: dict[str, Encoding] = {}
    copied = 0
    for item in items:
        name = item.site.name
        if name not in weights:
            kept.append(item)
            continue
        prefix, quantized, weight = weights[name]
        parts = {prefix + part: stored for part, stored in weight.parts.items()}
        if item.form == "copy" and item.base is weight.reading:
            powers = weight.reading.scales if isinstance(weight.reading, Mxfp4) else None
            kept += [_copy_part(part, stored, item, stored is powers) for part, stored in parts.items()]
            copied += 1
            continue
        encoding = encode_like(item.outs[0], weight.reading, parts, quantized.stated)
        if encoding is None:
            raise InputError(
                f"{reference.path}: {name} changes, and {option('quantize', 'keep')} does not write its format "
                f"({' and '.join(sorted({part.dtype_name for part in parts.values()}))}): use "
                f"{option('quantize', 'none')} or {option('quantize', 'fp8')}"
            )
        encodings[name] = encoding
        kept.append(_encode_item(item))
    others = {prefix + name: stored for prefix, each in components for name, stored in each.others.items()}
    kept += [_copy_part(name, stored, items[0]) for name, stored in others.items()]
    notices = []
    scales = [name for name in others if name.endswith(("input_scale", "activation_scale"))]
    if scales and encodings:
        notices.append(
            f"the scales of activations ({scales[0]}{f' and {len(scales) - 1} more' if scales[1:] else ''}) are "
            f"{reference.path.name}'s: they were measured before the merge"
        )
    return tuple(sorted(kept, key=Item.order)), QuantizedOutput(encodings=encodings, copied=copied, notices=notices)


def _copy_part(name: str, stored: Stored, like: Item, exponents: bool = False) -> Item:
    """Return the item of a tensor that is copied as its bytes, which may be exponents of two."""
    data = StoredBytes(stored, exponents)
    out = OutputTensor(name, stored.dtype_name, stored.shape)
    return Item(Site(name, data.shape), (None,) * len(like.inputs), data, (out,), "copy")


def _encode_item(item: Item) -> Item:
    """Return an item whose values are encoded after the merge: in float32, and quantised inputs without rounding."""
    out = replace(item.outs[0], dtype_name="F32")
    inputs = tuple(each.as_float32() if isinstance(each, Dequantized) else each for each in item.inputs)
    base = item.base.as_float32() if isinstance(item.base, Dequantized) else item.base
    return replace(item, inputs=inputs, base=base, outs=(out,))


def _quantize_anew(
    format: Any, items: Sequence[Item], reference: Checkpoint
) -> tuple[tuple[Item, ...], QuantizedOutput]:
    """Quantise the weights that published models of a format have quantised."""
    fitting, sizes = _choose_weights(format, items, reference)
    if not fitting:
        wanted = {
            "mxfp4": f"experts of gpt-oss, with inputs that {GROUP} divides",
            "fp8": f"linear layers in blocks, with sizes that {BLOCK} divides",
        }.get(format, "linear layers in blocks")
        raise InputError(
            f"{reference.path}: {option('quantize', format)} is for {wanted}, and there are none: use another format, "
            f"or leave it out"
        )
    encodings = {item.site.name: encode_as(format, item.outs[0]) for item in items if item.site.name in fitting}
    left = _GPT_OSS if format == "mxfp4" else _modules_left(items, encodings)
    notices = []
    if sizes:
        notices.append(
            f"{len(sizes)} weights stay in 16 bits, as {BLOCK if format == 'fp8' else GROUP} does not divide their "
            f"sizes, or the sizes of weights that servers fuse with them: {', '.join(sizes[:3])}"
        )
    made = tuple(_encode_item(item) if item.site.name in encodings else item for item in items)
    return made, QuantizedOutput(encodings=encodings, statement=new_statement(format, left), notices=notices)


def _choose_weights(format: NewFormat, items: Sequence[Item], reference: Checkpoint) -> tuple[set[str], list[str]]:
    """Return the names of weights to quantise, and of weights that only their sizes keep from it."""
    turned = inputs_by_outputs({item.site.name: item.site.shape for item in items})
    config = text_config(reference.config)
    kind = str(config.get("model_type", reference.config.get("model_type")))
    chosen, sizes = set(), []
    for item in items:
        name, shape = item.site.name, item.site.shape
        if item.outs[0].dtype_name not in ("F16", "BF16", "F32", "F64") or not _BLOCKED.search(name):
            continue
        if format == "mxfp4":
            wanted = kind == "gpt_oss" and _EXPERTS.search(name) is not None and len(shape) == 3
            fits = wanted and shape[1] % GROUP == 0
        elif len(shape) == 3:
            wanted = format == "fp8" and _stores_outputs_first(name, shape, kind, config)
            fits = wanted and shape[1] % BLOCK == shape[2] % BLOCK == 0
        else:
            linear = item.site.kind == "matrix" and len(shape) == 2 and name.endswith(".weight")
            wanted = linear and name not in turned and not _LEFT_OUT.search(name)
            fits = wanted and (format != "fp8" or shape[0] % BLOCK == shape[1] % BLOCK == 0)
        if fits:
            chosen.add(name)
        elif wanted:
            sizes.append(name)
    return _in_fused_groups(chosen, sizes)


def _stores_outputs_first(name: str, shape: tuple[int, ...], kind: str, config: Mapping[str, Any]) -> bool:
    """Return whether a tensor holds experts as outputs by inputs."""
    found = _EXPERTS.search(name)
    if found is None or kind in _INPUTS_FIRST:
        return False
    return config.get("hidden_size") == (shape[2] if found[1] == "gate_up_proj" else shape[1])


def _in_fused_groups(chosen: set[str], sizes: list[str]) -> tuple[set[str], list[str]]:
    """Leave out weights that are fused with others which are left out for their sizes."""
    groups: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in [*chosen, *sizes]:
        parent, _, module = name.removesuffix(".weight").rpartition(".")
        for number, fused in enumerate(_FUSED):
            if module in fused:
                groups[parent, number].append(name)
    lost = set(sizes)
    left = {name for group in groups.values() if lost & set(group) for name in group}
    return chosen - left, sorted(lost | left)


def _modules_left(items: Sequence[Item], encodings: Mapping[str, Encoding]) -> list[str]:
    """Return the modules with matrices that are not quantised, and the head."""
    left = ["lm_head"]
    for item in items:
        name = item.site.name
        if name in encodings or len(item.site.shape) < 2:
            continue
        if _EXPERTS.search(name):
            left.append(name.rpartition(".")[0])
        elif name.endswith(".weight"):
            left.append(name.removesuffix(".weight"))
    return list(dict.fromkeys(left))
