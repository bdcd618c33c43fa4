"""Rules of SGLang, which serves LoRA of one rank and one scale, in modules that it knows by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from merging.errors import MergingError
from merging.serving.rules import (
    APART,
    BAKE,
    GRADIENTS,
    ONE_SCALE,
    SMILE,
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
    smile_experts,
    starts,
    stated_type,
    states,
)
from merging.serving.subject import Subject
from merging.sources.small_files import LIST_LIMIT, read_json
from merging.sources.tied_weights import text_config

__all__ = ["SGLANG"]

_MODULES = {
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj", "in_proj", "in_proj_qkv", "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z", "embed_tokens",
    "vocab_emb", "embeddings", "word_embeddings", "lm_head", "output", "unembed_tokens", "q_a_proj",
    "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "wq_b", "wk", "weights_proj", "fc1_latent_proj",
    "fc2_latent_proj",
}  # fmt: skip
"""The modules whose sizes it knows for any model. Some classes of models know more."""

_UNGATED = ("nemotron",)
"""Prefixes of the types of models whose up_proj has no gate_proj."""

_ADDED = "added_tokens.json"
_BLOCK = re.compile(r"\.layers\.\d+\.")

_CONFIG = "srt/lora/lora_config.py"
_LORA = "srt/lora/lora.py"
_MANAGER = "srt/lora/lora_manager.py"
_POOL = "srt/lora/mem_pool.py"


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


def _large_rank(subject: Subject) -> Iterator[str]:
    rank = max([0, *subject.ranks.values()])
    if subject.max_rank is not None and rank > subject.max_rank:
        yield f"rank {rank}, --max-lora-rank {subject.max_rank}"


def _other_names(subject: Subject, blocks: bool) -> Iterator[str]:
    """Yield tensors that are not factors, inside or outside of blocks."""
    leaves = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")
    for name in subject.tensors:
        if not name.endswith((*leaves, *TABLES)) and bool(_BLOCK.search(name)) == blocks:
            yield name


def _others_in_blocks(subject: Subject) -> Iterator[str]:
    yield from _other_names(subject, blocks=True)


def _others_outside(subject: Subject) -> Iterator[str]:
    yield from _other_names(subject, blocks=False)


def _incomplete(subject: Subject) -> Iterator[str]:
    """Yield blocks where a projection is adapted without its partner, with which SGLang looks for it."""
    parents: defaultdict[str, set[str]] = defaultdict(set)
    for path in subject.modules:
        parent, _, name = path.rpartition(".")
        parents[parent].add(name)
    ungated = str(subject.base.get("model_type")).startswith(_UNGATED)
    for parent, names in parents.items():
        if "q_proj" in names and "v_proj" not in names:
            yield f"{parent}: q_proj without v_proj"
        if "q_proj" not in names and (alone := sorted(names & {"k_proj", "v_proj"})):
            yield f"{parent}: {' and '.join(alone)} without q_proj"
        if "up_proj" in names and "gate_proj" not in names and not ungated:
            yield f"{parent}: up_proj without gate_proj"


def _expert_factors(subject: Subject) -> Iterator[str]:
    yield from states("target_parameters")(subject)
    yield from (path for path in subject.modules if path.endswith(".gate"))


def _added_tokens(subject: Subject) -> Iterator[str]:
    size = text_config(subject.base).get("vocab_size")
    if subject.folder is None or _ADDED not in subject.files or not isinstance(size, int):
        return
    try:
        added = read_json(subject.folder / _ADDED, LIST_LIMIT)
    except MergingError as error:
        yield str(error)
        return
    for token, number in added.items():
        if isinstance(number, int) and number >= size:
            yield f"{_ADDED}: {token!r} is token {number:,}, the base has {size:,}"


SGLANG = Program(
    "sglang",
    {
        "adapter": (
            Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with {output=FOLDER}",
                 _CONFIG),
            Rule("refuses", "only LoRA is served", _other_type, BAKE, f"{_LORA}, run"),
            Rule("refuses", "the config lacks what SGLang asks for", absent("r", "lora_alpha", "target_modules"),
                 ONE_SCALE, f"{_CONFIG}, run"),
            Rule("refuses", "target_modules is a regular expression, and should be a list", _one_string, ONE_SCALE,
                 "srt/lora/utils.py, run"),
            Rule("refuses", "this variant of LoRA is not served",
                 states("use_dora", "use_qalora", "use_bdlora", "kasa_config"), BAKE, f"{_MANAGER}, run"),
            Rule("refuses", "factors of convolutions are not served", convolutions, BAKE, _POOL),
            Rule("refuses", "the rank is above the largest that the server is started for", _large_rank,
                 "start SGLang with a larger --max-lora-rank, or merge with a smaller {rank}", _POOL),
            Rule("refuses", "ranks by module: one rank is expected", other_ranks, ONE_SCALE, f"{_POOL}, run"),
            Rule("refuses", "projections are adapted without the partners that SGLang looks for", _incomplete,
                 f"{BAKE}, or add factors of zeros", f"{_LORA}, run"),
            Rule("refuses", "tensors in the blocks that are not LoRA factors", _others_in_blocks, BAKE,
                 f"{_POOL}, run"),
            Rule("refuses", "repeated blocks do not exist in the base that is served", states("layer_replication"),
                 "expand the base", f"{_LORA}, run"),
            Rule("refuses", "factors of stacked experts and of routers are not served", _expert_factors, APART,
                 f"{_POOL}, run"),
            Rule("refuses", "adapters that add tokens are not served", _added_tokens,
                 f"remove {_ADDED} if its tokens are not used, or {BAKE}", f"{_MANAGER}"),
            Rule("ignores", "rank-stabilized scales: lora_alpha / r is used", _rslora, ONE_SCALE, f"{_LORA}, run"),
            Rule("ignores", "alphas by module: one alpha is used, newer versions refuse", other_alphas, ONE_SCALE,
                 f"{_LORA}, run"),
            Rule("ignores", "tensors outside of the blocks that are not LoRA factors", _others_outside, BAKE,
                 f"{_LORA}, run"),
            Rule("ignores", "the start took something off the base, and SGLang does not take it off", lost_starts,
                 BAKE, f"{_LORA}, run"),
            Rule("ignores", "the adapter should act only behind certain tokens, and acts on all",
                 states("alora_invocation_tokens"), "serve it with a program that knows aLoRA", _CONFIG),
            Rule("warns", GRADIENTS, starts("lora_ga"), BAKE, f"{_LORA}, run"),
            Rule("warns", "modules that SGLang knows for some architectures only", _unknown_modules, BAKE,
                 "srt/lora/utils.py"),
            Rule("warns", "the embedding that was saved too is not read: rows for added tokens are lost",
                 saved_tables, "merge it into its base with {kind=model} if tokens were added", _LORA),
        ),
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config",
                 "srt/configs/model_config.py"),
            Rule("refuses", "the config does not name the architecture", absent("architectures"), "add architectures",
                 "srt/configs/model_config.py"),
            Rule("refuses", "there is no tokenizer", no_tokenizer,
                 "copy the base's, or start SGLang with --tokenizer-path", "srt/utils/hf_transformers_utils.py"),
            Rule("refuses", "experts of low rank run by the code in the folder alone", smile_experts, SMILE,
                 "srt/models/registry.py"),
            Rule("warns", "weights are served in the type that the config states", stated_type,
                 "set dtype in config.json, or start SGLang with --dtype", "srt/configs/model_config.py"),
        ),
    },
    {
        "diffusion adapter": "it is for diffusion models",
        "pipeline": "it is made of several models: serve it with diffusers",
    },
    "SGLang 0.5.23",
)  # fmt: skip
