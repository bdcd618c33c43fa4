"""Rules of vLLM, which reads LoRA by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator

from merging.serving.rules import (
    APART,
    BAKE,
    GRADIENTS,
    ONE_SCALE,
    PLAIN,
    SMILE,
    TABLES,
    Program,
    Rule,
    absent,
    convolutions,
    lost_starts,
    no_config,
    no_tokenizer,
    saved_tables,
    smile_experts,
    starts,
    stated_type,
    states,
)
from merging.serving.subject import Subject

__all__ = ["MAX_RANKS", "VLLM"]

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank takes."""

_DEFAULT_RANK = 16

_NAMES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")

_VISION = ("vision", "visual", "multi_modal_projector", "mm_projector")
"""Names of the parts of models that read images."""

_HEADS = ("classifier", "score")
"""The modules saved in full that it serves: heads of classifiers."""

_STACKED = ("gpt_oss", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe", "interns1_pro")
"""Prefixes of the types of models whose experts it keeps in one tensor (``is_3d_moe_weight``)."""

_HELPER = "lora/peft_helper.py"
_MODEL = "lora/lora_model.py"


def _other_names(subject: Subject) -> Iterator[str]:
    saved = tuple(f".{head}.{leaf}" for head in _saved_heads(subject) for leaf in ("weight", "bias"))
    yield from (name for name in subject.tensors if not name.endswith((*_NAMES, *TABLES, *saved)))


def _saved_heads(subject: Subject) -> list[str]:
    saved = subject.stated.get("modules_to_save")
    return [name for name in _HEADS if name in saved] if isinstance(saved, list) else []


def _unserved_saved_modules(subject: Subject) -> Iterator[str]:
    saved = subject.stated.get("modules_to_save")
    if not isinstance(saved, list) or len(_saved_heads(subject)) < len(saved):
        yield from states("modules_to_save")(subject)
    elif all(any(f".{head}." in name for name in subject.tensors) for head in _HEADS):
        yield f"modules_to_save = {saved!r}: only one head is served"


def _large_rank(subject: Subject) -> Iterator[str]:
    stated, pattern = subject.stated.get("r"), subject.stated.get("rank_pattern")
    ranks = [stated, *(pattern.values() if isinstance(pattern, dict) else ()), *subject.ranks.values()]
    rank = max([0, *(each for each in ranks if isinstance(each, int))])
    most = subject.max_rank or _DEFAULT_RANK
    if rank > most:
        enough = next(
            (f"--max-lora-rank {each} is enough" for each in MAX_RANKS if each >= rank), "no setting allows it"
        )
        yield f"rank {rank}, --max-lora-rank {most}: {enough}"


def _vocabulary(subject: Subject) -> Iterator[str]:
    size = subject.base.get("vocab_size")
    for path, parts in subject.modules.items():
        table = parts.get("lora_embedding_A")
        if table is not None and isinstance(size, int) and table.shape[-1] != size:
            yield f"{path} is for {table.shape[-1]:,} tokens, the base has {size:,}"


def _vision_modules(subject: Subject) -> Iterator[str]:
    yield from (path for path in subject.modules if any(part in path for part in _VISION))


def _experts(subject: Subject) -> Iterator[str]:
    if subject.stated.get("use_rslora"):
        yield from (path for path in subject.modules if ".experts." in path)


def _stacked_experts(subject: Subject) -> Iterator[str]:
    """Yield factors of stacked experts if the base is known to keep its experts apart."""
    kind = subject.base.get("model_type")
    if isinstance(kind, str) and not kind.startswith(_STACKED):
        yield from states("target_parameters")(subject)


def _stacked_experts_of_unknown_base(subject: Subject) -> Iterator[str]:
    if not isinstance(subject.base.get("model_type"), str):
        yield from states("target_parameters")(subject)


VLLM = Program(
    "vllm",
    {
        "adapter": (
            Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with {output=FOLDER}",
                 f"{_HELPER}, run"),
            Rule("refuses", "the config lacks what vLLM asks for", absent("r", "lora_alpha", "target_modules"),
                 ONE_SCALE, f"{_HELPER}, run"),
            Rule("refuses", "modules saved in full are not served, except heads of classifiers",
                 _unserved_saved_modules, BAKE,
                 f"{_HELPER}, run"),
            Rule("refuses", "this variant of LoRA is not served",
                 states("use_dora", "use_qalora", "use_bdlora", "kasa_config"), BAKE, f"{_HELPER}, run"),
            Rule("refuses", "trained biases are not served", states("bias", "lora_bias"), BAKE, f"{_HELPER}, run"),
            Rule("refuses", "trained tokens are not served", states("trainable_token_indices"), BAKE, f"{_MODEL}, run"),
            Rule("refuses", "tensors that are not named as LoRA's factors", _other_names, PLAIN,
                 "lora/utils.py, run"),
            Rule("refuses", "factors of convolutions are not served", convolutions, BAKE, _MODEL),
            Rule("refuses", "the rank is above the largest that the server is started for", _large_rank,
                 "start vLLM with a larger --max-lora-rank, or merge with a smaller {rank}", f"{_HELPER}, run"),
            Rule("refuses", "the vocabulary is not the base's", _vocabulary, BAKE, _MODEL),
            Rule("refuses", "the start took something off the base, and vLLM does not take it off",
                 lost_starts, BAKE, f"{_HELPER}, run"),
            Rule("refuses", "repeated blocks do not exist in the base that is served", states("layer_replication"),
                 "expand the base", f"{_HELPER}, run"),
            Rule("refuses", "the adapter should act only behind certain tokens", states("alora_invocation_tokens"),
                 "serve it with a program that knows aLoRA", f"{_HELPER}, run"),
            Rule("refuses", "factors of stacked experts are not served for this architecture", _stacked_experts,
                 f"start vLLM with --enable-mixed-moe-lora-format and say is_3d_lora_weight in the request, or {APART}",
                 "lora/model_manager.py"),
            Rule("warns", "factors of stacked experts are served for some architectures only",
                 _stacked_experts_of_unknown_base,
                 "say where the base is with {base}", "lora/model_manager.py"),
            Rule("warns", GRADIENTS, starts("lora_ga"), BAKE, f"{_HELPER}, run"),
            Rule("warns", "modules that read images are served only with --enable-tower-connector-lora",
                 _vision_modules,
                 "start vLLM with --enable-tower-connector-lora", "lora/model_manager.py"),
            Rule("warns", "before September 2026 experts had the scale lora_alpha / r in spite of use_rslora", _experts,
                 ONE_SCALE, "lora/lora_weights.py"),
            Rule("warns", "the embedding that was saved too is not read: rows for added tokens are lost",
                 saved_tables, "merge it into its base with {kind=model} if tokens were added", "lora/utils.py, run"),
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config",
                 "transformers_utils/config.py"),
            Rule("refuses", "the config does not name the architecture", absent("architectures"), "add architectures",
                 "model_executor/models/registry.py"),
            Rule("refuses", "there is no tokenizer", no_tokenizer, "copy the base's, or start vLLM with --tokenizer",
                 "tokenizers/registry.py"),
            Rule("refuses", "experts of low rank run by the code in the folder alone", smile_experts, SMILE,
                 "model_executor/models/registry.py"),
            Rule("warns", "weights are served in the type that the config states", stated_type,
                 "set dtype in config.json, or start vLLM with --dtype", "config/model.py"),
        ),
    },
    {
        "diffusion adapter": "it is for diffusion models",
        "pipeline": "it is made of several models: serve it with diffusers",
    },
    "vLLM 0.32.0",
)  # fmt: skip
