"""What SGLang takes: LoRA of one rank and one scale, in modules that it knows by their names."""

from __future__ import annotations

from collections.abc import Iterator

from merging.serving.rules import (
    BAKE,
    ONE_SCALE,
    TABLES,
    Program,
    Rule,
    absent,
    convolutions,
    lost_starts,
    no_config,
    no_tokenizer,
    other_alphas,
    other_ranks,
    saved_tables,
    stated_type,
    states,
)
from merging.serving.subject import Subject

__all__ = ["SGLANG"]

_MODULES = {
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj", "in_proj", "in_proj_qkv", "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z", "embed_tokens",
    "vocab_emb", "embeddings", "word_embeddings", "lm_head", "output", "unembed_tokens", "q_a_proj",
    "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "wq_b", "wk", "weights_proj", "fc1_latent_proj",
    "fc2_latent_proj",
}  # fmt: skip
"""The modules whose sizes it can tell for any model; some classes of models know more."""


def _rslora(subject: Subject) -> Iterator[str]:
    if subject.stated.get("use_rslora") and subject.stated.get("r") != 1:
        yield "use_rslora = True"


def _other_type(subject: Subject) -> Iterator[str]:
    if subject.method != "LORA" or (subject.config is not None and "peft_type" not in subject.config):
        yield f"peft_type = {subject.stated.get('peft_type')!r}"


def _one_string(subject: Subject) -> Iterator[str]:
    targets = subject.stated.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield f"target_modules = {targets!r}"


def _unknown_modules(subject: Subject) -> Iterator[str]:
    yield from sorted({path.rpartition(".")[2] for path in subject.modules} - _MODULES - {"experts", "base_layer"})


def _rank(subject: Subject) -> Iterator[str]:
    rank = max([0, *subject.ranks.values()])
    if subject.max_rank is not None and rank > subject.max_rank:
        yield f"rank {rank}, --max-lora-rank {subject.max_rank}"


def _other_names(subject: Subject) -> Iterator[str]:
    leaves = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")
    yield from (name for name in subject.tensors if not name.endswith((*leaves, *TABLES)))


def _tables(subject: Subject) -> Iterator[str]:
    yield from (path for path in subject.modules if path.endswith(("embed_tokens", "lm_head")))


SGLANG = Program(
    "sglang",
    {
        "adapter": (
            Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with -o FOLDER"),
            Rule("refuses", "only LoRA is served", _other_type, BAKE),
            Rule("refuses", "the config lacks what SGLang asks for", absent("r", "lora_alpha", "target_modules"),
                 ONE_SCALE),
            Rule("refuses", "target_modules is a regular expression, and should be a list", _one_string, ONE_SCALE),
            Rule("refuses", "this variant of LoRA is not served",
                 states("use_dora", "use_qalora", "use_bdlora", "kasa_config"), BAKE),
            Rule("refuses", "factors of convolutions are not served", convolutions, BAKE),
            Rule("refuses", "the rank is above the largest that the server is started for", _rank,
                 "start SGLang with a larger --max-lora-rank, or merge with a smaller --rank"),
            Rule("ignores", "rank-stabilised scales: lora_alpha / r is used", _rslora, ONE_SCALE),
            Rule("ignores", "ranks by module: one rank is used, newer versions refuse", other_ranks, ONE_SCALE),
            Rule("ignores", "alphas by module: one alpha is used, newer versions refuse", other_alphas, ONE_SCALE),
            Rule("ignores", "tensors that are no LoRA factors", _other_names, BAKE),
            Rule("ignores", "what the start took off the base is not taken off", lost_starts, BAKE),
            Rule("ignores", "repeated blocks do not exist in the base that is served", states("layer_replication"),
                 "expand the base"),
            Rule("ignores", "the adapter should act behind certain tokens only, and acts on all",
                 states("alora_invocation_tokens"), "serve it with a program that knows aLoRA"),
            Rule("ignores", "factors of stacked experts may be dropped without --lora-strict-loading",
                 states("target_parameters"), BAKE),
            Rule("warns", "modules that SGLang knows for some architectures only", _unknown_modules, BAKE),
            Rule("warns", "the embedding that was saved along is not read: rows for added tokens are lost",
                 saved_tables, "merge it into its base with --as model if tokens were added"),
            Rule("warns", "adapters of embeddings and heads are served by recent versions only", _tables, BAKE),
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config"),
            Rule("refuses", "the config does not name the architecture", absent("architectures"), "add architectures"),
            Rule("refuses", "there is no tokenizer", no_tokenizer,
                 "copy the base's, or start SGLang with --tokenizer-path"),
            Rule("warns", "weights are served in the type that the config states", stated_type,
                 "set dtype in config.json, or start SGLang with --dtype"),
        ),
    },
    {
        "diffusion adapter": "it is for diffusion models",
        "pipeline": "it is made of several models: serve it with diffusers",
    },
)  # fmt: skip
"""Facts of SGLang in September 2026; what older and newer versions do may differ."""
