"""Weights that stand for two: output heads tied to the input embedding, and copies that some files keep of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from merging.sources.stored import Stored

__all__ = [
    "HEADS",
    "WITH_HEAD",
    "embeddings_among",
    "has_own_head",
    "is_head",
    "is_table",
    "same_values",
    "stated_tie",
    "text_config",
    "tied_to",
]

HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "proj_out.weight",
    "output.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "generator_lm_head.weight",
)
"""What output heads are called, on models that may tie them to their input embedding."""

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight")

_COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}
"""Tensors that are one with another, whatever the config says, by the ends of their names."""

_TIED_TYPES = (
    "bart", "bert", "bloom", "cohere", "electra", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2",
    "gpt_neo", "mbart", "mt5", "opt", "roberta", "t5", "whisper",
)  # fmt: skip
"""Model types whose head is tied where their config does not mention it."""

WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
"""How the classes of models with such a head end."""

_BLOCK = re.compile(r"(?:^|\.)[0-9]+\.")

_PIECE = 1 << 20


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model, which composite models keep in a config of its own."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def stated_tie(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the output head of a model with tensors of these names is its input embedding.

    The config says so, or the model type; where neither does, a model with a head that stores none must tie it.
    """
    stated = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if stated is not None:
        return bool(stated)
    if config.get("model_type") in _TIED_TYPES:
        return True
    architecture = str((config.get("architectures") or [""])[0])
    return architecture.endswith(WITH_HEAD) and not any(map(is_head, names))


def is_head(name: str) -> bool:
    """Whether a tensor is the output head of its model, by its name; projections inside of blocks may end alike."""
    return name.endswith(HEADS) and not _BLOCK.search(name)


def is_table(name: str) -> bool:
    """Whether a tensor has a row for each token, by its name: an embedding or an output head."""
    return is_head(name) or (name.endswith(_EMBEDDINGS) and not _BLOCK.search(name))


def has_own_head(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bool:
    """Whether a causal language model stores a head: a matrix outside of the blocks, as tall as its embedding.

    True for every model whose config does not plainly say that it must.
    """
    architecture = str((config.get("architectures") or [""])[0])
    stated = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    embeddings = embeddings_among(tensors)
    if stated is not False or not architecture.endswith(WITH_HEAD[:3]) or not embeddings:
        return True
    rows = {tensors[name].shape[0] for name in embeddings}
    outside = (name for name in tensors if name not in embeddings and not _BLOCK.search(name))
    return any(len(tensors[name].shape) == 2 and tensors[name].shape[0] in rows for name in outside)


def embeddings_among(tensors: Mapping[str, Stored]) -> list[str]:
    """The names of the tables that are looked up by token, without the copies of a shared one."""
    names = [name for name in tensors if name.endswith(_EMBEDDINGS) and not _BLOCK.search(name)]
    return [name for name in names if _copy_source(name, tensors) is None]


def tied_to(name: str, tensors: Mapping[str, Stored], tied: bool) -> str | None:
    """The name of the tensor that is also the one called ``name``, if there is one.

    Heads are tied where the model ties them (``tied``); some copies exist in any case.
    """
    copied = _copy_source(name, tensors)
    if copied is not None or not tied or not is_head(name):
        return copied
    found = embeddings_among(tensors)
    if len(found) > 1:
        beginning = name.partition(".")[0] + "."
        found = [each for each in found if each.startswith(beginning)]
    return found[0] if len(found) == 1 else None


def _copy_source(name: str, tensors: Mapping[str, Stored]) -> str | None:
    for ending, original in _COPIES.items():
        if name == ending or name.endswith("." + ending):
            source = name.removesuffix(ending) + original
            return source if source in tensors else None
    return None


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are equal in type, shape and every bit; read piece by piece up to the first that is
    not."""
    if one.dtype_name != other.dtype_name or one.shape != other.shape:
        return False
    for start in range(0, one.numel, _PIECE):
        size = min(_PIECE, one.numel - start)
        pieces = [torch.empty(size, dtype=each.dtype) for each in (one, other)]
        for each, piece in zip((one, other), pieces, strict=True):
            each.read_into(piece, start)
        if not torch.equal(*(piece.view(torch.uint8) for piece in pieces)):
            return False
    return True
