"""LoRAs in GGUF files, as llama.cpp takes them, under the names and in the layout of transformers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from merging.errors import FormatError
from merging.sources.adapter import Adapter
from merging.sources.changes import Change, ChangeKind, LoraChange, Replacement
from merging.sources.gguf.architectures import ARCHITECTURES, Architecture
from merging.sources.gguf.files import is_lora
from merging.sources.gguf.header import count_in
from merging.sources.gguf.layout import Converted, HeadRows
from merging.sources.gguf.model_config import heads_of
from merging.sources.gguf.tensor_types import BlockTensor, is_dequantizable
from merging.sources.opening import open_tensors
from merging.sources.stored import FileContents, Stored
from merging.sources.tensor_views import view

__all__ = ["ALPHA_KEY", "HeadOrderedChange", "open_gguf_lora", "order_heads", "recognizes"]

ALPHA_KEY = "adapter.lora.alpha"
"""The key of the alpha of all factors; each is scaled by alpha / its rank."""

_LEAF = re.compile(r"(?P<name>.+)\.lora_(?P<factor>[ab])")
_SAVED = "it is saved in full, and what it changes is the difference from the base"
_HEADS = (
    "llama.cpp orders the rows of queries and keys by heads, and the file does not state their number, as the base's "
    "config does"
)


@dataclass(frozen=True, slots=True, eq=False)
class HeadOrderedChange(LoraChange):
    """Factors of queries or keys with their rows in llama.cpp's order, as ``module`` calls them.

    Only the base's config states the number of heads that decides the order.
    """

    module: str = ""

    def with_heads(self, heads: int) -> LoraChange | None:
        """Return the change with its rows in transformers' order; None for a number of heads that does not fit."""
        if heads < 1 or self.up.shape[0] % (2 * heads):
            return None
        return LoraChange(self.target, self.kind, down=self.down, up=HeadRows(self.up, heads), scale=self.scale)


def recognizes(opened: FileContents) -> bool:
    """Whether a file is a GGUF file of an adapter."""
    return is_lora(opened[1])


def open_gguf_lora(path: Path, alpha: float | None = None, opened: FileContents | None = None) -> Adapter:
    """Open a LoRA in a GGUF file.

    ``alpha`` replaces the alpha that the file states. Raises :class:`~merging.errors.FormatError` for other adapters,
    for architectures that are not known, and for unknown names.
    """
    tensors, metadata = opened or open_tensors(path)
    kind = metadata.get("adapter.type", "")
    if kind != "lora" or "adapter.alora.invocation_tokens" in metadata:
        what = f"of the type {kind[:40]!r}" if kind != "lora" else "of a LoRA that acts on what follows certain tokens"
        raise FormatError(f"{path}: is a GGUF file {what}, and only plain LoRAs are read")
    name = metadata.get("general.architecture", "")
    experts = any("_exps." in each or ".ffn_gate_inp." in each for each in tensors)
    architecture = ARCHITECTURES.get("mixtral" if name == "llama" and experts else name)
    if architecture is None:
        raise FormatError(
            f"{path}: is a LoRA of the architecture {name[:40]!r}, and read are {', '.join(sorted(ARCHITECTURES))}"
        )
    stated = alpha if alpha is not None else _alpha(path, metadata)
    modules: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    changes: list[Change] = []
    for tensor, stored in tensors.items():
        leaf = _LEAF.fullmatch(tensor)
        if leaf:
            modules[leaf["name"]][leaf["factor"]] = _as_numbers(path, tensor, stored)
        else:
            changes.append(_norm(path, architecture, tensor, stored))
    heads = {each: metadata.get(f"{name}.attention.{each}") for each in ("head_count", "head_count_kv")}
    for module, parts in modules.items():
        if parts.keys() != {"a", "b"}:
            raise FormatError(f"{path}: {module[:80]} has one of its two factors only: get the file again")
        found = _changes(path, architecture, module, parts["a"], parts["b"], stated)
        changes += [_with_stated_heads(change, heads) for change in found]
    return Adapter(
        path=path,
        changes={change.target: change for change in changes},
        files=(path,),
        dialect="GGUF",
        base=_base_name(metadata),
        config={"model_type": architecture.model_type},
        about="low-rank factors",
    )


def _alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """Return the alpha that the file states; None if it states none, or 0: then the scale is 1."""
    text = metadata.get(ALPHA_KEY)
    try:
        value = 0.0 if text is None else float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise FormatError(f"{path}: its {ALPHA_KEY} is {str(text)[:40]}, which is no number")
    return value or None


def _base_name(metadata: Mapping[str, str]) -> str | None:
    """Return the base's name on the Hub, if the file states it."""
    url = metadata.get("general.base_model.0.repo_url", "")
    return url.removeprefix("https://huggingface.co/") if url.startswith("https://huggingface.co/") else None


def _as_numbers(path: Path, name: str, stored: Stored) -> Stored:
    if isinstance(stored, BlockTensor) and not is_dequantizable(stored.kind):
        raise FormatError(f"{path}: {name} has the type {stored.kind.name}, which is not read: get another file")
    return stored


def _norm(path: Path, architecture: Architecture, name: str, stored: Stored) -> Change:
    """Return the change of a norm that is saved in full, the only other tensors of llama.cpp's files."""
    renamed = architecture.name_in_transformers(name)
    if renamed is None or "norm" not in renamed[0] or not stored.floating:
        raise FormatError(f"{path}: {name[:80]} is not a tensor that a LoRA of llama.cpp is known to hold")
    value = Converted(stored, stored.dtype_name, -1.0) if architecture.is_shifted(renamed[0]) else view(stored)
    return Replacement(renamed[0], "full", value=value, needs_base=_SAVED)


def _changes(
    path: Path, architecture: Architecture, name: str, down: Stored, up: Stored, alpha: float | None
) -> Iterator[LoraChange]:
    """Yield the changes of a module: one, or one for each expert."""
    renamed = architecture.name_in_transformers(name)
    if renamed is None or not name.endswith(".weight"):
        raise FormatError(f"{path}: {name[:80]} has no name in transformers' {architecture.model_class}")
    target, module = renamed
    if module == "token_embd" and len(down.shape) == 2:
        down = view(down).permute(1, 0)
    axes = 3 if module in architecture.experts else 2
    if (
        not len(down.shape) == len(up.shape) == axes
        or down.shape[-2] != up.shape[-1]
        or down.shape[:-2] != up.shape[:-2]
    ):
        raise FormatError(
            f"{path}: the factors of {name[:80]} have the shapes {tuple(down.shape)} and {tuple(up.shape)}, which do "
            f"not fit together"
        )
    rank = up.shape[-1]
    scale = 1.0 if alpha is None else alpha / rank
    if axes == 3:
        for number in range(up.shape[0]):
            lower, upper = view(down).select(number), view(up).select(number)
            yield LoraChange(target.format(number), "linear", down=lower, up=upper, scale=scale)
        return
    lower, upper = view(down), view(up)  # views, since no other file has the names that these have here
    if architecture.permuted and module in ("attn_q", "attn_k"):
        yield HeadOrderedChange(target, "linear", down=lower, up=upper, scale=scale, module=module, needs_base=_HEADS)
        return
    embedding = module == "token_embd"
    transposed = embedding or module in architecture.transposed
    kind: ChangeKind = "embedding" if embedding else "linear"
    yield LoraChange(target, kind, down=lower, up=upper, scale=scale, transposed=transposed)


def _with_stated_heads(change: LoraChange, heads: Mapping[str, str | None]) -> LoraChange:
    """Return a change in transformers' order of rows where the file states the number of heads."""
    if not isinstance(change, HeadOrderedChange):
        return change
    numbers = [count_in(each or "") for each in heads.values()]
    config = dict(zip(("num_attention_heads", "num_key_value_heads"), numbers, strict=True))
    return change.with_heads(heads_of(config, change.module)) or change


def order_heads(adapter: Adapter, config: Mapping[str, object]) -> Adapter:
    """Return an adapter with the rows of its queries and keys in transformers' order, by the config of its base.

    Raises :class:`~merging.errors.FormatError` for a base whose heads do not fit.
    """
    changes: dict[str, Change] = {}
    for target, change in adapter.changes.items():
        if isinstance(change, HeadOrderedChange):
            heads = heads_of(config, change.module)
            ordered = change.with_heads(heads)
            if ordered is None:
                raise FormatError(
                    f"{adapter.path}: {target} has {change.up.shape[0]} rows, which do not make the {heads} heads that "
                    f"the config of the base states"
                )
            change = ordered
        changes[target] = change
    return replace(adapter, changes=changes)
