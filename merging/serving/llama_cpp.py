"""What llama.cpp's converters take: convert_lora_to_gguf.py for adapters, convert_hf_to_gguf.py for models."""

from __future__ import annotations

from collections.abc import Iterator

from merging.serving.rules import Program, Rule, absent, lost_starts, no_config, no_tokenizer, states
from merging.serving.subject import Subject
from merging.serving.vllm import alphas

__all__ = ["LLAMA_CPP"]

_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_PASSED = (".base_layer.weight", "_layernorm", ".norm")

_BAKE = "merge it into its base with --as model, and convert that"
_PLAIN = "merge it with merge --method passthrough if it is LoRA, else into its base with --as model"
_AGAIN = "merge it with merge --method passthrough, which writes one rank and one scale"


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


LLAMA_CPP = Program(
    "llama.cpp",
    {
        "adapter": (
            Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with -o FOLDER"),
            Rule("refuses", "the config lacks what the converter asks for", absent("lora_alpha"), _AGAIN),
            Rule("refuses", "tensors whose names are not those of LoRA's factors", _other_names, _PLAIN),
            Rule("refuses", "factors of stacked experts cannot be mapped", _experts, _BAKE),
            Rule("refuses", "the head is tied to the embedding in the base", _tied_head, _BAKE),
            Rule("ignores", "rank-stabilised scales: lora_alpha / rank is used", _rslora, _AGAIN),
            Rule("ignores", "alphas by module: the scale is lora_alpha / rank for all", alphas, _AGAIN),
            Rule("ignores", "what the start took off the base is not taken off", lost_starts, _BAKE),
            Rule("ignores", "factors of this form are taken for plain ones",
                 states("use_qalora", "use_bdlora", "layer_replication"), _BAKE),
            Rule("warns", "the head is refused if the base ties it to the embedding", _unknown_head,
                 "say where the base is with --base"),
            Rule("warns", "the base has to be named to the converter with --base", absent("base_model_name_or_path")),
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config"),
            Rule("refuses", "the config does not name the architecture", absent("architectures"), "add architectures"),
            Rule("refuses", "there is no tokenizer", no_tokenizer, "copy the base's"),
        ),
    },
    {
        "diffusion adapter": "it is for diffusion models",
        "pipeline": "it is made of several models",
    },
)  # fmt: skip
"""Facts of llama.cpp in September 2026; which architectures it converts is not looked at."""
