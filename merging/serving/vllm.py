"""What vLLM takes: LoRA of one rank and one scale, read by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator

from merging.serving.rules import (
    BAKE,
    ONE_SCALE,
    PLAIN,
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

__all__ = ["VLLM"]

_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""

_DEFAULT_RANK = 16

_NAMES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")

_SEEING = ("vision", "visual", "multi_modal_projector", "mm_projector")
"""What the parts of models are called that read images."""


def _other_names(subject: Subject) -> Iterator[str]:
    yield from (name for name in subject.tensors if not name.endswith((*_NAMES, *TABLES)))


def _rank(subject: Subject) -> Iterator[str]:
    stated, most = subject.stated.get("r"), subject.max_rank or _DEFAULT_RANK
    rank = max([stated if isinstance(stated, int) else 0, *subject.ranks.values()])
    if rank > most:
        enough = next(
            (f"--max-lora-rank {each} is enough" for each in _MAX_RANKS if each >= rank), "no setting allows it"
        )
        yield f"rank {rank}, --max-lora-rank {most}: {enough}"


def _vocabulary(subject: Subject) -> Iterator[str]:
    size = subject.base.get("vocab_size")
    for path, parts in subject.modules.items():
        table = parts.get("lora_embedding_A")
        if table is not None and isinstance(size, int) and table.shape[-1] != size:
            yield f"{path} is for {table.shape[-1]:,} tokens, the base has {size:,}"


def _text_only(subject: Subject) -> Iterator[str]:
    if isinstance(subject.base.get("text_config"), dict):
        yield from (path for path in subject.modules if not any(part in path for part in ("language_model", *_SEEING)))


def _seeing(subject: Subject) -> Iterator[str]:
    yield from (path for path in subject.modules if any(part in path for part in _SEEING))


def _experts(subject: Subject) -> Iterator[str]:
    if subject.stated.get("use_rslora"):
        yield from (path for path in subject.modules if ".experts." in path)


VLLM = Program(
    "vllm",
    {
        "adapter": (
            Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with -o FOLDER"),
            Rule("refuses", "the config lacks what vLLM asks for", absent("r", "lora_alpha", "target_modules"),
                 ONE_SCALE),
            Rule("refuses", "modules saved in full are not served", states("modules_to_save"), BAKE),
            Rule("refuses", "this variant of LoRA is not served",
                 states("use_dora", "use_qalora", "use_bdlora", "kasa_config"), BAKE),
            Rule("refuses", "trained biases are not served", states("bias", "lora_bias"), BAKE),
            Rule("refuses", "trained tokens are not served", states("trainable_token_indices"), BAKE),
            Rule("refuses", "tensors whose names are not those of LoRA's factors", _other_names, PLAIN),
            Rule("refuses", "factors of convolutions are not served", convolutions, BAKE),
            Rule("refuses", "the rank is above the largest that the server is started for", _rank,
                 "start vLLM with a larger --max-lora-rank, or merge with a smaller --rank"),
            Rule("refuses", "the vocabulary is not the base's", _vocabulary, BAKE),
            Rule("ignores", "ranks by module: the scale is lora_alpha / r for all", other_ranks, ONE_SCALE),
            Rule("ignores", "alphas by module: the scale is lora_alpha / r for all", other_alphas, ONE_SCALE),
            Rule("ignores", "what the start took off the base is not taken off", lost_starts, BAKE),
            Rule("ignores", "repeated blocks do not exist in the base that is served", states("layer_replication"),
                 "expand the base"),
            Rule("ignores", "the adapter should act behind certain tokens only, and acts on all",
                 states("alora_invocation_tokens"), "serve it with a program that knows aLoRA"),
            Rule("warns", "factors of stacked experts are served for some architectures only",
                 states("target_parameters"), BAKE),
            Rule("warns", "the base takes more than text, and names without language_model may be left out", _text_only,
                 "name the modules as the base of today does, or " + BAKE),
            Rule("warns", "modules that see are served with --enable-tower-connector-lora alone", _seeing,
                 "start vLLM with --enable-tower-connector-lora"),
            Rule("warns", "before September 2026 experts were given lora_alpha / r in spite of use_rslora", _experts,
                 ONE_SCALE),
            Rule("warns", "the embedding that was saved along is not read: rows for added tokens are lost",
                 saved_tables, "merge it into its base with --as model if tokens were added"),
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config"),
            Rule("refuses", "the config does not name the architecture", absent("architectures"), "add architectures"),
            Rule("refuses", "there is no tokenizer", no_tokenizer, "copy the base's, or start vLLM with --tokenizer"),
            Rule("warns", "weights are served in the type that the config states", stated_type,
                 "set dtype in config.json, or start vLLM with --dtype"),
        ),
    },
    {
        "diffusion adapter": "it is for diffusion models",
        "pipeline": "it is made of several models: serve it with diffusers",
    },
)  # fmt: skip
"""Facts of vLLM in September 2026; what older and newer versions do may differ."""
