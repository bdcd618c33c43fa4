"""Tied weights: output heads that share the input embedding, and copies of shared weights in some files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from merging.maths.lazy_torch import torch
from merging.sources.stored import Stored

__all__ = [
    "HEADS",
    "WITH_HEAD",
    "embeddings_among",
    "has_own_head",
    "heads_among",
    "is_head",
    "is_table",
    "possible_copies",
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
"""The names of output heads in models that may tie them to their input embedding."""

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight")

_COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}
"""Tensors that are always copies of another tensor, whatever the config says, by the ends of both names."""

_COPY_ENDINGS = tuple(_COPIES)

_TIED_TYPES = (
    "bart", "bert", "bloom", "cohere", "electra", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2",
    "gpt_neo", "mbart", "mt5", "opt", "roberta", "t5", "whisper",
)  # fmt: skip
"""Model types whose head is tied if their config does not mention it."""

WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
"""Endings of the class names of models with such a head."""

_BLOCK = re.compile(r"(?:^|\.)[0-9]+\.")

_PIECE = 1 << 20


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model, which composite models nest within their own config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def stated_tie(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the output head of a model with tensors of these names is its input embedding.

    The config or the model type decides. If neither does, a model with a head that stores none must tie it.
    """
    stated = text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if stated is not None:
        return bool(stated)
    if config.get("model_type") in _TIED_TYPES:
        return True
    architecture = str((config.get("architectures") or [""])[0])
    return architecture.endswith(WITH_HEAD) and not heads_among(names)


def is_head(name: str) -> bool:
    """Whether a tensor is the output head of its model, by its name; projections in blocks may have similar names."""
    return name.endswith(HEADS) and not _BLOCK.search(name)


def heads_among(names: Iterable[str]) -> list[str]:
    """Return the names of output heads."""
    return [name for name in names if name.endswith(HEADS) and not _BLOCK.search(name)]


def is_table(name: str) -> bool:
    """Whether a tensor has a row for each token, by its name: an embedding or an output head."""
    return is_head(name) or (name.endswith(_EMBEDDINGS) and not _BLOCK.search(name))


def has_own_head(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bool:
    """Whether a causal language model stores a head: a matrix outside of the blocks, with as many rows as its
    embedding.

    True for every model whose config does not clearly state such a head.
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
    """Return the names of the tables that are indexed by token, without the copies of a shared table."""
    names = [name for name in tensors if name.endswith(_EMBEDDINGS) and not _BLOCK.search(name)]
    return [name for name in names if _copy_source(name, tensors) is None]


def possible_copies(names: Iterable[str]) -> list[str]:
    """Return the names that :func:`tied_to` may tie to another tensor."""
    return [name for name in names if name.endswith((*HEADS, *_COPY_ENDINGS))]


def tied_to(name: str, tensors: Mapping[str, Stored], tied: bool) -> str | None:
    """Return the name of the stored tensor that ``name`` is tied to, None without one.

    Heads are tied if the model ties them (``tied``); some other copies exist in any case.
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
    if not name.endswith(_COPY_ENDINGS):
        return None
    for ending, original in _COPIES.items():
        if name == ending or name.endswith("." + ending):
            source = name.removesuffix(ending) + original
            return source if source in tensors else None
    return None


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors agree in dtype, shape and every bit; reading stops at the first piece that differs.

    Values that cannot be read yet are taken for different ones.
    """
    if not (one.readable and other.readable):
        return one is other
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
