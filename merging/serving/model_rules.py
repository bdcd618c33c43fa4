"""Rules about the files of models, for all programs: blocks, embeddings and heads must agree with the config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from merging.errors import MergingError
from merging.maths.layers import Stacks
from merging.serving.rules import SAVE_AGAIN, Rule
from merging.serving.subject import Subject
from merging.sources.checkpoint import config_layers
from merging.sources.quantized.quantized_weights import refuse_quantized
from merging.sources.tied_weights import embeddings_among, has_own_head, is_head, same_values, stated_tie

__all__ = ["MODEL_RULES", "PIPELINE_RULES"]

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size")
_STACKS = ("layers", "layer", "h", "block", "blocks")


def _blocks(subject: Subject) -> tuple[int, dict[str, set[int]]]:
    """Return the number of blocks in the config (0 without one), and the numbers of the blocks by stack."""
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


def _missing_head(subject: Subject) -> Iterator[str]:
    if not has_own_head(subject.stated, subject.tensors):
        yield "tie_word_embeddings = False, and no lm_head.weight"


def _second_heads(subject: Subject) -> Iterator[tuple[str, str]]:
    """Yield a stored head of a tied model, with the embedding that it is tied to."""
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
        yield from (f"{head} with {embedding}" for head, embedding in _second_heads(subject))


def _unquantized_weights(subject: Subject) -> Iterator[str]:
    if _signs_of_quantization(subject, config=True) and not _signs_of_quantization(subject, config=False):
        yield "quantization_config, and no tensor that belongs to it"


def _unstated_quantization(subject: Subject) -> Iterator[str]:
    if subject.config is not None and not _signs_of_quantization(subject, config=True):
        yield from _signs_of_quantization(subject, config=False)


def _signs_of_quantization(subject: Subject, config: bool) -> list[str]:
    """Return the signs of quantization in a model's config, or else in its tensors."""
    try:
        refuse_quantized(Path(subject.name), {} if config else subject.tensors, subject.stated if config else {})
    except MergingError as error:
        return [str(error).removeprefix(f"{subject.name}: ").partition(": ")[0]]
    return []


def _two_sets_of_weights(subject: Subject) -> Iterator[str]:
    for name, index in (("model.safetensors", "model.safetensors.index.json"),
                        ("pytorch_model.bin", "pytorch_model.bin.index.json")):  # fmt: skip
        if name in subject.files and index in subject.files:
            yield f"{name} and {index}"


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


MODEL_RULES = (
    Rule("refuses", "blocks are missing, which would be random or an error", _missing_blocks, SAVE_AGAIN),
    Rule("ignores", "there are more blocks than the config says", _surplus_blocks, "set num_hidden_layers"),
    Rule("refuses", "embedding and config differ in the size of the vocabulary", _vocabulary, "set vocab_size"),
    Rule("refuses", "embedding and config differ in width", _width, "take the config of the model itself"),
    Rule("refuses", "there is no output head, and it is tied to nothing", _missing_head,
         "set tie_word_embeddings to true if the head is the embedding, else " + SAVE_AGAIN),
    Rule("ignores", "a head of its own in a tied model: transformers before 5 and vLLM before August 2026 put "
         "the embedding in its place", _different_head, "set tie_word_embeddings to false"),
    Rule("warns", "a tied model stores its head: whether it is a copy, its values decide", _unknown_head,
         "look again with {values=True}"),
    Rule("refuses", "the config says quantised, and the weights are not", _unquantized_weights,
         "remove quantization_config"),
    Rule("refuses", "the weights are quantised, and the config does not say so", _unstated_quantization,
         "take the config of the quantised model"),
    Rule("ignores", "there are two sets of weights, and the single file wins", _two_sets_of_weights,
         "remove one of them"),
)  # fmt: skip
"""Rules for models of all programs."""

PIPELINE_RULES = (Rule("refuses", "components are not whole", _components, "complete the download"),)
"""Rules for pipelines of all programs."""
