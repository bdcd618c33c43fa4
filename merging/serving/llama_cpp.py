"""What llama.cpp's converters take: convert_lora_to_gguf.py for adapters, convert_hf_to_gguf.py for models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merging.serving.rules import (
    BAKE,
    ONE_SCALE,
    PLAIN,
    Program,
    Rule,
    absent,
    convolutions,
    lost_starts,
    no_config,
    no_tokenizer,
    other_alphas,
    saved_tables,
    states,
)
from merging.serving.subject import Subject
from merging.sources.ties import text_config

__all__ = ["LLAMA_CPP"]

_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_PASSED = (".base_layer.weight", "_layernorm", ".norm")

_UNDONE = ("bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4")
"""The kinds of quantisation that its converters make numbers of."""


def _other_names(subject: Subject) -> Iterator[str]:
    yield from (name for name in subject.tensors if not any(part in name for part in (*_FACTORS, *_PASSED)))


def _experts(subject: Subject) -> Iterator[str]:
    yield from (path for path in subject.modules if path.endswith((".experts", ".experts.base_layer")))


def _tied_head(subject: Subject) -> Iterator[str]:
    heads = [path for path in subject.modules if path.rpartition(".")[2] == "lm_head"]
    if heads and subject.base.get("tie_word_embeddings"):
        yield from heads


def _unknown_head(subject: Subject) -> Iterator[str]:
    if not subject.base:
        yield from (path for path in subject.modules if path.rpartition(".")[2] == "lm_head")


def _rslora(subject: Subject) -> Iterator[str]:
    if subject.stated.get("use_rslora") and set(subject.ranks.values()) != {1}:
        yield "use_rslora = True"


def _quantised(subject: Subject) -> Iterator[str]:
    yield from _not_undone(subject.stated)


def _quantised_base(subject: Subject) -> Iterator[str]:
    yield from _not_undone(subject.base)


def _not_undone(config: Mapping[str, Any]) -> Iterator[str]:
    for part in (config, text_config(config)):
        stated = part.get("quantization_config")
        if isinstance(stated, dict) and stated.get("quant_method") not in _UNDONE:
            yield f"quant_method = {stated.get('quant_method')!r}"
            return


LLAMA_CPP = Program(
    "llama.cpp",
    {
        "adapter": (
            Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with -o FOLDER"),
            Rule("refuses", "the config lacks what the converter asks for", absent("lora_alpha"), ONE_SCALE),
            Rule("refuses", "tensors whose names are not those of LoRA's factors", _other_names, PLAIN),
            Rule("refuses", "factors of convolutions cannot be mapped", convolutions, BAKE),
            Rule("refuses", "factors of stacked experts cannot be mapped", _experts, BAKE),
            Rule("refuses", "the head is tied to the embedding in the base", _tied_head, BAKE),
            Rule("refuses", "the converter cannot undo the base's quantisation", _quantised_base,
                 "name the model that was quantised with --base"),
            Rule("ignores", "rank-stabilised scales: lora_alpha / rank is used", _rslora, ONE_SCALE),
            Rule("ignores", "alphas by module: the scale is lora_alpha / rank for all", other_alphas, ONE_SCALE),
            Rule("ignores", "what the start took off the base is not taken off", lost_starts, BAKE),
            Rule("ignores", "factors of this form are taken for plain ones",
                 states("use_qalora", "use_bdlora", "layer_replication"), BAKE),
            Rule("warns", "the embedding that was saved along is not read: rows for added tokens are lost",
                 saved_tables, "merge it into its base with --as model if tokens were added"),
            Rule("warns", "the head is refused if the base ties it to the embedding", _unknown_head,
                 "say where the base is with --base"),
            Rule("warns", "the base is not named", absent("base_model_name_or_path"),
                 "name it to the converter, with --base"),
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config"),
            Rule("refuses", "the config does not name the architecture", absent("architectures"), "add architectures"),
            Rule("refuses", "there is no tokenizer", no_tokenizer, "copy the base's"),
            Rule("refuses", "the converter cannot undo this quantisation", _quantised, "take it before quantisation"),
        ),
    },
    {
        "diffusion adapter": "it is for diffusion models",
        "pipeline": "it is made of several models",
    },
)  # fmt: skip
"""Facts of llama.cpp in September 2026; which architectures it converts is not looked at."""
