"""Rules of llama.cpp's converters: convert_lora_to_gguf.py for adapters, convert_hf_to_gguf.py for models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from merging.serving.rules import (
    APART,
    BAKE,
    GRADIENTS,
    ONE_SCALE,
    PLAIN,
    SMILE,
    Program,
    Rule,
    absent,
    convolutions,
    lost_starts,
    no_config,
    no_tokenizer,
    other_alphas,
    saved_tables,
    smile_experts,
    starts,
    states,
)
from merging.serving.subject import Subject
from merging.sources.tied_weights import text_config

__all__ = ["LLAMA_CPP"]

_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_NORMS = ("_layernorm", ".norm")
_CONV1D = ("c_attn", "c_fc", "c_proj")

_ON_THE_HUB = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?")
_ADAPTERS = "convert_lora_to_gguf.py"
_SERVER = "src/llama-adapter.cpp"

_DEQUANTIZED = ("bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4")
"""The kinds of quantization that its converters undo."""


def _other_names(subject: Subject) -> Iterator[str]:
    known = (*_FACTORS, *_NORMS, ".base_layer.weight")
    yield from (name for name in subject.tensors if not any(part in name for part in known))


def _norms(subject: Subject) -> Iterator[str]:
    for name in subject.tensors:
        if any(part in name for part in _NORMS) and not any(part in name for part in _FACTORS):
            yield name


def _conv1d_modules(subject: Subject) -> Iterator[tuple[str, bool]]:
    """Yield the modules of GPT-2's own kind of layer, and whether they are square.

    The converter transposes their factors once too often.
    """
    kind = subject.base.get("model_type")
    if kind not in (None, "gpt2") or (kind is None and not subject.stated.get("fan_in_fan_out")):
        return
    for path, parts in subject.modules.items():
        down, up = parts.get("lora_A"), parts.get("lora_B")
        if down and up and path.rpartition(".")[2] in _CONV1D:
            yield path, down.shape[-1] == up.shape[0]


def _square(subject: Subject) -> Iterator[str]:
    yield from (path for path, square in _conv1d_modules(subject) if square)


def _oblong(subject: Subject) -> Iterator[str]:
    yield from (path for path, square in _conv1d_modules(subject) if not square)


def _local_base(subject: Subject) -> Iterator[str]:
    said = subject.stated.get("base_model_name_or_path")
    if isinstance(said, str) and not _ON_THE_HUB.fullmatch(said):
        yield f"base_model_name_or_path = {said!r}"


def _stacked_experts(subject: Subject) -> Iterator[str]:
    yield from (path for path in subject.modules if path.endswith((".experts", ".experts.base_layer")))


def _tied_tables(subject: Subject) -> Iterator[str]:
    if subject.base.get("tie_word_embeddings"):
        yield from _tables(subject)


def _perhaps_tied_tables(subject: Subject) -> Iterator[str]:
    if not subject.base:
        yield from _tables(subject)


def _tables(subject: Subject) -> Iterator[str]:
    yield from (path for path in subject.modules if path.rpartition(".")[2] in ("embed_tokens", "lm_head"))


def _rslora(subject: Subject) -> Iterator[str]:
    if subject.stated.get("use_rslora") and set(subject.ranks.values()) != {1}:
        yield "use_rslora = True"


def _unknown_quantization(subject: Subject) -> Iterator[str]:
    yield from _unknown_methods(subject.stated)


def _unknown_quantization_of_base(subject: Subject) -> Iterator[str]:
    yield from _unknown_methods(subject.base)


def _unknown_methods(config: Mapping[str, Any]) -> Iterator[str]:
    for part in (config, text_config(config)):
        stated = part.get("quantization_config")
        if isinstance(stated, dict) and stated.get("quant_method") not in _DEQUANTIZED:
            yield f"quant_method = {stated.get('quant_method')!r}"
            return


LLAMA_CPP = Program(
    "llama.cpp",
    {
        "adapter": (
            Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with {output=FOLDER}",
                 f"{_ADAPTERS}, run"),
            Rule("refuses", "the config lacks what the converter asks for", absent("lora_alpha"), ONE_SCALE,
                 f"{_ADAPTERS}, run"),
            Rule("refuses", "tensors that are not named as LoRA's factors", _other_names, PLAIN,
                 f"{_ADAPTERS}, run"),
            Rule("refuses", "factors of convolutions cannot be mapped", convolutions, BAKE, _ADAPTERS),
            Rule("refuses", "factors of stacked experts cannot be mapped", _stacked_experts, APART,
                 f"{_ADAPTERS}, run"),
            Rule("refuses", "embedding and head are one in the base: the server does not load factors on either",
                 _tied_tables, BAKE, f"{_SERVER}, run"),
            Rule("refuses", "factors of GPT-2's layers are transposed once too often", _oblong, BAKE,
                 "conversion/gpt2.py, run"),
            Rule("refuses", "repeated blocks do not exist in the base that is served", states("layer_replication"),
                 "expand the base", f"{_ADAPTERS}, run"),
            Rule("refuses", "the converter cannot undo the base's quantization", _unknown_quantization_of_base,
                 "name the model that was quantised to the converter, with --base", "conversion/base.py"),
            Rule("ignores", "factors of GPT-2's square layers are transposed once too often, and loaded", _square,
                 BAKE, "conversion/gpt2.py, run"),
            Rule("ignores", "norms saved in full are converted, and left out by the server", _norms, BAKE,
                 f"{_SERVER}, run"),
            Rule("ignores", "rank-stabilized scales: lora_alpha / rank is used", _rslora, ONE_SCALE,
                 f"{_SERVER}, run"),
            Rule("ignores", "alphas by module: the scale is lora_alpha / rank for all", other_alphas, ONE_SCALE,
                 f"{_SERVER}, run"),
            Rule("ignores", "the start took something off the base, and llama.cpp does not take it off", lost_starts,
                 BAKE,
                 f"{_ADAPTERS}, run"),
            Rule("ignores", "factors of this form are read as plain factors", states("use_qalora", "use_bdlora"), BAKE,
                 _ADAPTERS),
            Rule("warns", GRADIENTS, starts("lora_ga"), BAKE, f"{_ADAPTERS}, run"),
            Rule("warns", "the embedding that was saved too is not read: rows for added tokens are lost",
                 saved_tables, "merge it into its base with {kind=model} if tokens were added", f"{_ADAPTERS}, run"),
            Rule("warns", "embedding and head are refused if they are one in the base", _perhaps_tied_tables,
                 "say where the base is with {base}", f"{_SERVER}, run"),
            Rule("warns", "the base is not named", absent("base_model_name_or_path"),
                 "name it to the converter, with --base", f"{_ADAPTERS}, run"),
            Rule("warns", "the base is named by a path, at which the converter stops", _local_base,
                 "name it to the converter, with --base", f"{_ADAPTERS}, run"),
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config",
                 "convert_hf_to_gguf.py"),
            Rule("refuses", "the config does not name the architecture", absent("architectures"), "add architectures",
                 "conversion/base.py"),
            Rule("refuses", "there is no tokenizer", no_tokenizer, "copy the base's", "conversion/base.py"),
            Rule("refuses", "experts of low rank run by the code in the folder alone", smile_experts, SMILE,
                 "conversion/base.py"),
            Rule("refuses", "the converter cannot undo this quantization", _unknown_quantization,
                 "take the model before quantization",
                 "conversion/base.py"),
        ),
    },
    {
        "diffusion adapter": "it is for diffusion models",
        "pipeline": "it is made of several models",
    },
    "llama.cpp b10605",
    takes_gguf=True,
)  # fmt: skip
"""The rules do not check whether the converters know an architecture."""
