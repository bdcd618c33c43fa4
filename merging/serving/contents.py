"""Whether files say the same as their configs, and hold numbers: what is wrong with them in any program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from merging.errors import MergingError
from merging.hub.open_model import open_model
from merging.maths.layers import Stacks
from merging.plan.inputs.task_heads import NO_HEADS, find_task_heads
from merging.plan.names.targets import adapter_targets
from merging.serving.peft import TASK_HEADS
from merging.serving.rules import Program, Rule
from merging.serving.subject import Subject
from merging.sources import Adapter
from merging.sources.changes import AddedBias
from merging.sources.checkpoint import Checkpoint, config_layers
from merging.sources.quantized_weights import refuse_quantized
from merging.sources.tied_weights import embeddings_among, has_own_head, is_head, same_values, stated_tie

__all__ = ["FILES"]

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|block|blocks)\.([0-9]+)\.")
_STACKS = ("layers", "layer", "h", "block", "blocks")
_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_MATES = (
    ("lora_A.weight", "lora_B.weight"), ("lora_B.weight", "lora_A.weight"),
    (".lora_down.", ".lora_up."), (".lora_up.", ".lora_down."),
    ("lora.down.", "lora.up."), ("lora.up.", "lora.down."),
)  # fmt: skip
_AGAIN = "save it again, or get its files again together"


def _nonfinite(subject: Subject) -> Iterator[str]:
    """The tensors that hold NaN or infinities, if values are to be read."""
    if subject.values:
        yield from (name for name, stored in subject.tensors.items() if stored.floating and not stored.finite())


# ---- models


def _blocks(subject: Subject) -> tuple[int, dict[str, set[int]]]:
    """The number of blocks in the config (0 where there is none to compare), and the blocks there are, by stack."""
    count = config_layers(subject.stated)
    if not count or not embeddings_among(subject.tensors):
        return 0, {}
    found: dict[str, set[int]] = {}
    for prefix in Stacks.from_names(subject.tensors, complete=False).lengths:
        if prefix.rpartition(".")[2] not in _STACKS:
            continue
        start = f"{prefix}."
        rests = (name[len(start) :].partition(".")[0] for name in subject.tensors if name.startswith(start))
        found[prefix] = {int(rest) for rest in rests if rest.isdecimal()}
    return count, found


def _missing_blocks(subject: Subject) -> Iterator[str]:
    count, stacks = _blocks(subject)
    wanted = set(range(min(count, len(subject.tensors) + 1)))  # a config may state any number
    if stacks and not any(wanted <= found for found in stacks.values()):
        prefix, most = max(stacks.items(), key=lambda item: len(item[1]))
        yield from (f"{prefix}.{number} of {count}" for number in sorted(wanted - most))


def _surplus_blocks(subject: Subject) -> Iterator[str]:
    count, stacks = _blocks(subject)
    more = subject.text_config.get("num_nextn_predict_layers")
    allowed = count + (more if isinstance(more, int) else 0)
    if len(stacks) == 1:
        (prefix, found), *_ = stacks.items()
        yield from (f"{prefix}.{number}" for number in sorted(found) if number >= allowed)


def _vocabulary(subject: Subject) -> Iterator[str]:
    stated = subject.text_config.get("vocab_size")
    for name in embeddings_among(subject.tensors):
        rows = subject.tensors[name].shape[0]
        if isinstance(stated, int) and rows != stated:
            yield f"{name} has {rows:,} rows, vocab_size = {stated:,}"


def _width(subject: Subject) -> Iterator[str]:
    stated = {key: subject.text_config[key] for key in _WIDTHS if isinstance(subject.text_config.get(key), int)}
    for name in embeddings_among(subject.tensors):
        shape = subject.tensors[name].shape
        if stated and shape[1:] and shape[1] not in stated.values():
            yield f"{name} has {shape[1]:,} columns, {', '.join(f'{key} = {value:,}' for key, value in stated.items())}"


def _headless(subject: Subject) -> Iterator[str]:
    if not has_own_head(subject.stated, subject.tensors):
        yield "tie_word_embeddings = False, and no lm_head.weight"


def _second_heads(subject: Subject) -> Iterator[tuple[str, str]]:
    """The head that a model stores although it is tied, and the embedding it is tied to."""
    embeddings = embeddings_among(subject.tensors)
    if stated_tie(subject.stated, subject.tensors) and len(embeddings) == 1:
        yield from ((name, embeddings[0]) for name in subject.tensors if is_head(name))


def _different_head(subject: Subject) -> Iterator[str]:
    for head, embedding in _second_heads(subject):
        one, other = subject.tensors[head], subject.tensors[embedding]
        if one.shape != other.shape or (subject.values and not same_values(one, other)):
            yield f"{head} is not {embedding}, and tie_word_embeddings is true"


def _unknown_head(subject: Subject) -> Iterator[str]:
    if not subject.values and not any(_different_head(subject)):
        yield from (f"{head} beside {embedding}" for head, embedding in _second_heads(subject))


def _unquantised(subject: Subject) -> Iterator[str]:
    if _quantised(subject, config=True) and not _quantised(subject, config=False):
        yield "quantization_config, and no tensor that belongs to it"


def _unstated(subject: Subject) -> Iterator[str]:
    if subject.config is not None and not _quantised(subject, config=True):
        yield from _quantised(subject, config=False)


def _quantised(subject: Subject, config: bool) -> list[str]:
    """What says that a model is quantised: its config, or else its tensors."""
    try:
        refuse_quantized(Path(subject.name), {} if config else subject.tensors, subject.stated if config else {})
    except MergingError as error:
        return [str(error).removeprefix(f"{subject.name}: ").partition(": ")[0]]
    return []


def _both(subject: Subject) -> Iterator[str]:
    for name, index in (("model.safetensors", "model.safetensors.index.json"),
                        ("pytorch_model.bin", "pytorch_model.bin.index.json")):  # fmt: skip
        if name in subject.files and index in subject.files:
            yield f"{name} and {index}"


# ---- adapters


def _factors(subject: Subject) -> Iterator[str]:
    if subject.method not in ("LORA", "ADALORA"):
        return
    for path, parts in subject.modules.items():
        for down, up in _PAIRS.items():
            if (down in parts) != (up in parts):
                yield f"{path} has no {up if down in parts else down}"
        if subject.stated.get("use_dora") and "lora_magnitude_vector" not in parts and "lora_A" in parts:
            yield f"{path} has no lora_magnitude_vector"
        # experts' factors hold the ranks of all experts, block-diagonal ones those of a block
        if subject.stated.get("use_bdlora") or subject.stated.get("target_parameters"):
            continue
        for one, other in ((parts.get(down), parts.get(up)) for down, up in _PAIRS.items()):
            if one and other and (len(one.shape) < 2 or len(other.shape) < 2 or one.shape[0] != other.shape[1]):
                yield f"{path}: {list(one.shape)} and {list(other.shape)} do not multiply"


def _halves(subject: Subject) -> Iterator[str]:
    for name in subject.tensors:
        mates = {name.replace(one, other) for one, other in _MATES if one in name} - {name}
        yield from (f"{name} has no {mate}" for mate in mates if mate not in subject.tensors)


def _ranks(subject: Subject) -> Iterator[str]:
    if subject.config is None or subject.method != "LORA" or subject.stated.get("target_parameters"):
        return
    config = subject.settings
    for path, rank in subject.ranks.items():
        try:
            stated = config.pattern("rank_pattern", path, config.get("r", 8))
        except MergingError as error:
            yield str(error).removeprefix(f"{subject.name}: ")
            return
        if stated != rank:
            yield f"{path} has rank {rank}, the config says {stated}"


def _nothing(subject: Subject) -> Iterator[str]:
    if not subject.tensors:
        yield "there are no tensors"


def _beyond(subject: Subject) -> Iterator[str]:
    count = 0 if subject.stated.get("layer_replication") else config_layers(subject.base) or 0
    for path in subject.modules if count else ():
        block = _BLOCK.search(path)
        if block and int(block[1]) >= count:
            yield f"{path}: the base has {count} blocks"


def _misfit(subject: Subject) -> Iterator[str]:
    base = _open(subject.base_path)
    if isinstance(base, Adapter):
        yield f"{base.path} is an adapter itself"
    elif base is not None:
        yield from _without_place(subject, base, biases=not subject.stated.get("lora_bias"))


def _biases_alone(subject: Subject) -> Iterator[str]:
    """Biases of factors on layers that have none, where everything else has its place."""
    base = _open(subject.base_path) if subject.stated.get("lora_bias") else None
    if isinstance(base, Checkpoint) and not any(_misfit(subject)):
        yield from _without_place(subject, base, biases=True)


def _without_place(subject: Subject, base: Checkpoint, biases: bool) -> Iterator[str]:
    """What of an adapter, with or without the biases of its factors, has no place in its base."""
    adapter = _open(subject.again)
    if not isinstance(adapter, Adapter):
        return
    changes = {name: each for name, each in adapter.changes.items() if biases or not isinstance(each, AddedBias)}
    placed = replace(adapter, changes=changes)
    # a head that the base lacks is new where the task says that there is one
    heads = find_task_heads([placed], base, ()) if subject.stated.get("task_type") in TASK_HEADS else NO_HEADS
    try:
        adapter_targets([placed], heads.on_base(base), heads)
    except MergingError as error:
        yield str(error).removeprefix(f"{subject.again}: ")


def _open(path: str | Path | None) -> Adapter | Checkpoint | None:
    """The adapter or model at a path, None where there is none that can be read."""
    try:
        return open_model(path, dequantize=True) if path is not None else None
    except MergingError:
        return None


def _unread(subject: Subject) -> Iterator[str]:
    try:
        open_model(subject.again)
    except MergingError as error:
        yield str(error).removeprefix(f"{subject.again}: ")


def _components(subject: Subject) -> Iterator[str]:
    assert subject.folder is not None
    for name, made_of in subject.stated.items():
        if not isinstance(made_of, list) or len(made_of) != 2 or None in made_of:
            continue
        inside = {each.removeprefix(f"{name}/") for each in subject.files if each.startswith(f"{name}/")}
        if not inside:
            yield f"{name} ({made_of[1]}) is missing"
        elif "config.json" in inside and not any(each.endswith((".safetensors", ".bin")) for each in inside):
            yield f"{name} ({made_of[1]}) has a config and no weights"


_EMPTY = Rule("refuses", "it is empty", _nothing, _AGAIN)
_NUMBERS = Rule(
    "refuses", "it holds NaN or infinities, and so will its answers", _nonfinite, "merge it again, look at the inputs"
)
_MISFIT = Rule(
    "refuses", "it does not fit its base", _misfit, "take the base it was made for; for a new head, set task_type"
)
_BIASES = Rule(
    "warns", "factors have biases on layers without: PEFT runs them, and they cannot be merged", _biases_alone,
    "serve it with PEFT, unmerged",
)  # fmt: skip
_UNREAD = Rule("warns", "merge itself does not read this", _unread, "it may be served all the same, and not merged")

FILES = Program(
    "files",
    {
        "model": (
            _EMPTY,
            Rule("refuses", "blocks are missing, which would be random or an error", _missing_blocks, _AGAIN),
            Rule("ignores", "there are more blocks than the config says", _surplus_blocks, "set num_hidden_layers"),
            Rule("refuses", "embedding and config differ in the size of the vocabulary", _vocabulary, "set vocab_size"),
            Rule("refuses", "embedding and config differ in width", _width, "take the config of the model itself"),
            Rule("refuses", "there is no output head, and it is tied to nothing", _headless,
                 "set tie_word_embeddings to true if the head is the embedding, else " + _AGAIN),
            Rule("ignores", "a head of its own in a tied model: transformers before 5 and vLLM before August 2026 put "
                 "the embedding in its place", _different_head, "set tie_word_embeddings to false"),
            Rule("warns", "a tied model stores its head: whether it is a copy, its values tell", _unknown_head,
                 "look again with --values"),
            Rule("refuses", "the config says quantised, and the weights are not", _unquantised,
                 "remove quantization_config"),
            Rule("refuses", "the weights are quantised, and the config does not say so", _unstated,
                 "take the config of the quantised model"),
            Rule("ignores", "there are two sets of weights, and the single file wins", _both, "remove one of them"),
            _NUMBERS,
        ),
        "adapter": (
            _EMPTY,
            Rule("ignores", "blocks are adapted that the base does not have", _beyond, "take the base it was made for"),
            _MISFIT,
            Rule("refuses", "factors are missing or do not fit together", _factors, _AGAIN),
            Rule("refuses", "tensors and config differ in rank", _ranks, "take the config it was saved with"),
            _BIASES,
            _UNREAD,
            _NUMBERS,
        ),
        "diffusion adapter": (
            Rule("refuses", "factors are missing", _halves, _AGAIN),
            _MISFIT, _UNREAD, _NUMBERS),
        "pipeline": (Rule("refuses", "components are not whole", _components, "complete the download"), _NUMBERS),
    },
    {},
)  # fmt: skip
"""Rules that hold for all programs."""
