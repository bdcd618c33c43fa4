"""Extracting the change of a full fine-tune as a LoRA, and resizing LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from typing_extensions import Unpack

from merging.api.arguments import check_path
from merging.api.merge_files import Merged, merge
from merging.display.progress import Progress
from merging.errors import InputError, OptionError, option
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import torch
from merging.plan.find_base import find_base
from merging.plan.rank_settings import make_conditions
from merging.sources import Adapter
from merging.type_checks import check_types

__all__ = ["AdapterOptions", "RankConditions", "extract", "find_stated_base", "resize"]

DEFAULT_RANK = 64
"""The largest rank of an extraction without conditions."""


class RankConditions(TypedDict, total=False):
    """Conditions on the ranks of an adapter; all hold. See :class:`~merging.plan.rank_settings.RankSettings`.

    ``rank`` is the largest rank.
    """

    rank: int | None
    energy: float | None
    error: float | None
    sv_ratio: float | None
    size: int | str | None
    uniform: bool
    exact: bool


class AdapterOptions(RankConditions, total=False):
    """The conditions on ranks, the form of the adapter, and where it is made, as for :func:`~merging.merge`."""

    format: Literal["peft", "diffusers", "kohya", "gguf"] | None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | torch.dtype | None
    experts: Literal["together", "apart"] | None
    exclude: str | Sequence[str] | None
    allow_nonfinite: bool | None
    device: str | torch.device
    threads: int | None
    max_memory: int | str | None
    overwrite: bool
    stream: bool
    progress: Progress | bool | None
    resume: bool | None
    report: str | Path | None


@check_types("model", "base")
def extract(
    model: str | Path,
    *,
    base: str | Path,
    output: str | Path | None = None,
    include: str | Sequence[str] = (),
    embeddings: Literal["factors", "full", "base"] = "factors",
    heads: Literal["factors", "full", "base"] = "factors",
    norms: Literal["full", "base"] | None = None,
    biases: Literal["full", "base"] | None = None,
    on_mismatch: Literal["error", "base"] = "error",
    vocabulary: Literal["error", "base", "largest"] = "error",
    dequantize: bool = False,
    **options: Unpack[AdapterOptions],
) -> Merged:
    """Write the change of a full fine-tune from its base as a LoRA.

    The singular values of each tensor's change decide its rank. Tensors that did not change are left out.

    Args:
        model: the fine-tune: a path, or a name on the Hub.
        base: the model that it was trained from.
        output: the output, as for :func:`~merging.merge`.
        include: the tensors whose change is written; all by default. Names, parts of names, or wildcards.
        embeddings: the form of token embeddings: as factors, in full, or left as in the base.
        heads: the form of output heads.
        norms: the form of norms; in full by default where the format holds them.
        biases: the form of biases, with the same default.
        on_mismatch: ``"base"`` leaves tensors out that differ in shape or are missing.
        vocabulary: the rows of vocabularies of different sizes: the base's, or all.
        dequantize: whether weights that are quantised in a simple way are read as ordinary numbers.
        **options: conditions on the ranks (``rank``, the largest one; ``energy``; ``error``; ``sv_ratio``; ``size`` of
            the whole file in bytes; ``uniform``; ``exact``), and the options of :func:`~merging.merge` that an adapter
            has. Without a condition the largest rank is 64.

    Returns:
        The record of the output. Its ``ranks`` are the ranks by tensor, and its ``discarded`` the share of the energy
        that each tensor lost: the square of its relative error.

    Raises:
        MergingError: for models that do not belong together, and for an output that cannot be written.

    Example:
        >>> import merging
        >>> merged = merging.extract("one", base="base", energy=0.9, output="lora")
        >>> merged.kind, max(merged.discarded.values()) <= 0.1
        ('adapter', True)
    """
    rank, rest = _split(options, {"most": DEFAULT_RANK})
    stated = {"include": include, "embeddings": embeddings, "heads": heads, "norms": norms, "biases": biases}
    parts: dict[str, Any] = {name: value for name, value in stated.items() if value not in (None, (), "factors")}
    return merge(
        [check_path(model, "model")],
        method="passthrough",
        base=check_path(base, "base"),
        output=output,
        kind="adapter",
        rank=rank,
        parts=parts or None,
        on_mismatch=on_mismatch,
        vocabulary=vocabulary,
        dequantize=dequantize,
        **rest,
    )


@check_types("lora")
def resize(
    lora: str | Path,
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    scale: float | Mapping[str, float] = 1.0,
    lora_alpha: float | None = None,
    reduce_intruders: bool | Mapping[str, float] = False,
    **options: Unpack[AdapterOptions],
) -> Merged:
    """Write a LoRA with other ranks, in another format, or with some of its tensors scaled or left out.

    The product of the factors is decomposed exactly. Without a condition on ranks each tensor gets the rank of its
    product, and nothing is lost.

    Args:
        lora: the LoRA: a path, or a name on the Hub.
        base: its base, where the format or the type of the adapter needs it. Where intruders are reduced it is the base
            that the LoRA states by default.
        output: the output, as for :func:`~merging.merge`.
        scale: a number that multiplies the change; or numbers by names of tensors, parts of names, or wildcards, and
            1 for all others.
        lora_alpha: the alpha, instead of the alpha that the LoRA states.
        reduce_intruders: whether leading singular directions of the changed weights that resemble none of the base's
            are reduced; or a mapping with ``factor`` (0.75), ``threshold`` (0.5) and ``leading`` (10). No rank grows.
        **options: the same as for :func:`extract`.

    Returns:
        The record of the output, with ``ranks`` and ``discarded`` by tensor.

    Raises:
        MergingError: for an adapter that cannot be read, or whose form the format does not hold, and for an output that
            cannot be written.

    Example:
        >>> import merging
        >>> merged = merging.resize("a", rank=4, output="smaller")
        >>> merged.rank
        4
    """
    rank, rest = _split(options, {"energy": 1.0})
    notices: Sequence[str] = ()
    if reduce_intruders:
        rest["reduce_intruders"] = reduce_intruders
        if base is None:
            found, notices = find_stated_base(str(check_path(lora, "lora")))
            base, rest = found["base"], rest | found
    value: Any = (
        {**{name: each for name, each in scale.items() if name != "*"}, "*": scale.get("*", 1.0)}
        if isinstance(scale, Mapping)
        else scale
    )
    merged = merge(
        [check_path(lora, "lora")],
        method="passthrough",
        output=output,
        kind="adapter",
        rank=rank,
        scale=value,
        lora_alpha=lora_alpha,
        **{"base": base, **rest},
    )
    return replace(merged, notices=(*notices, *merged.notices)) if notices else merged


def find_stated_base(lora: str) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a recipe that name the base that a LoRA states, and a remark on it.

    Raises:
        InputError: for a full model, and for an adapter without a base that is found.
    """
    opened = open_model(lora)
    if not isinstance(opened, Adapter):
        raise InputError(f"{lora}: is a full model, and only LoRAs are resized: make one with merge extract")
    found = find_base([opened])
    return {"base": found.name, **({"dequantize": True} if found.dequantize else {})}, [found.notice]


def _split(options: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the conditions on ranks among options, with a default where there is none, and the other options."""
    unknown = next((name for name in options if name not in AdapterOptions.__annotations__), None)
    if unknown is not None:
        raise OptionError(f"{unknown!r} is not an option of an adapter's ranks, form or place: see {option('rank')}")
    names = RankConditions.__annotations__
    conditions = make_conditions({name: value for name, value in options.items() if name in names}, default)
    return conditions, {name: value for name, value in options.items() if name not in names}
