"""The hidden states of prompts in front of every layer of a base, with the weights of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from merging.display.progress import Progress
from merging.errors import InputError
from merging.maths.lazy_torch import Tensor, torch
from merging.moe.source import MoeSource

__all__ = ["EMBEDDING", "embed", "hidden_states", "tokenize"]

_BATCH = 1 << 14
"""The most tokens in one pass, padding included."""

EMBEDDING = "model.embed_tokens.weight"
"""The embedding of every type of model that mixtures are made of."""

_PREFIX = "model."
"""The part of names on disk that the model without its head does not have."""


class _LastLayerReached(Exception):
    """Ends a pass in front of the last layer, whose output no router needs."""


def tokenize(base: MoeSource, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each prompt, with the special tokens that the base's tokenizer adds.

    Raises :class:`~merging.errors.InputError` for a base without a tokenizer, and for a prompt without tokens.
    """
    from transformers import AutoTokenizer

    if base.checkpoint.folder is None:
        raise InputError(f"{base.name}: is a bare file without a tokenizer, which the prompts need: give its folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
        tokens = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{base.name}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    rows = base.find_stored(EMBEDDING).shape[0]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise InputError(f"{base.name}: the prompt {prompt[:80]!r} has no tokens")
        if max(ids) >= rows:
            raise InputError(
                f"{base.name}: the prompt {prompt[:80]!r} has the token {max(ids)}, and the embedding has {rows} rows: "
                f"the tokenizer belongs to another model"
            )
    return tokens


def hidden_states(
    base: MoeSource,
    tokens: Sequence[Sequence[int]],
    *,
    average: bool,
    device: torch.device,
    progress: Progress | None = None,
) -> Tensor:
    """Run prompts through the base in float32, and return a hidden state in front of each layer.

    Prompts are padded at their ends, where causal attention keeps the padding from every token.

    Args:
        base: the base.
        tokens: the tokens of each prompt.
        average: whether the state is the mean over a prompt's tokens, instead of its last token's.
        device: the device to compute on.
        progress: called with the layers done and their number.

    Returns:
        ``[layers, prompts, hidden]`` float32, on the CPU.

    Raises:
        InputError: for a base that transformers cannot build, and for states that are not finite.
    """
    model, layers = _build(base, device)
    batches = list(_batches(tokens))
    states: list[list[Tensor]] = []

    def enter(index: int, layer: Any, values: Tensor) -> None:
        states[-1].append(_pool(values.cpu(), [len(ids) for ids in batches[len(states) - 1]], average))
        if progress:
            progress((len(states) - 1) * len(layers) + index + 1, len(batches) * len(layers))
        if index == len(layers) - 1:
            raise _LastLayerReached
        _fill(layer, base, f"{_PREFIX}layers.{index}.", device)

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda layer, given, named, index=index: enter(index, layer, given[0] if given else named["hidden_states"]),
            with_kwargs=True,
        )
        layer.register_forward_hook(lambda layer, *_: _empty(layer))
    for batch in batches:
        states.append([])
        with torch.inference_mode(), suppress(_LastLayerReached):
            model(inputs_embeds=_pad([embed(base, ids) for ids in batch]).to(device), use_cache=False)
    found = torch.cat([torch.stack(each) for each in states], 1)
    if not bool(found.isfinite().all()):
        raise InputError(f"{base.name}: the hidden states of the prompts are not finite: no router can be made of them")
    return found


def _batches(tokens: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yield the prompts in their order, as many at a time as stay below a number of tokens with their padding."""
    batch: list[Sequence[int]] = []
    for ids in tokens:
        if batch and (len(batch) + 1) * max(len(ids), *map(len, batch)) > _BATCH:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """Return embeddings ``[prompts, longest, hidden]``, with zeros behind the shorter prompts."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def embed(base: MoeSource, ids: Sequence[int]) -> Tensor:
    """Return the embeddings ``[tokens, hidden]`` float32 of a prompt's tokens; only their rows are read."""
    if EMBEDDING in base.changes:
        return base.read(EMBEDDING, torch.float32)[torch.tensor(ids)]
    stored = base.find_stored(EMBEDDING)
    width = stored.shape[1]
    rows = torch.empty(len(ids), width, dtype=stored.dtype)
    for row, token in zip(rows, ids, strict=True):
        stored.read_into(row, token * width)
    return rows.float()


def _build(base: MoeSource, device: torch.device) -> tuple[Any, Any]:
    """Build the base without its head and without values; they come layer by layer."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**base.checkpoint.config)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32)
    model.eval()
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)  # a buffer that no file holds
    return model, model.layers


def _fill(module: Any, base: MoeSource, prefix: str, device: torch.device) -> None:
    """Give a module its values from the base."""
    for name, parameter in list(module.named_parameters()):
        value = base.read(prefix + name, torch.float32).to(device)
        if value.shape != parameter.shape:
            raise InputError(
                f"{base.name}: {prefix}{name} is {list(value.shape)}, and its config wants {list(parameter.shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))


def _empty(layer: Any) -> None:
    """Free a layer's values."""
    layer.to("meta")


def _pool(values: Tensor, lengths: Sequence[int], average: bool) -> Tensor:
    """Return one state a prompt, ``[prompts, hidden]``, of ``[prompts, tokens, hidden]``."""
    rows = zip(values, lengths, strict=True)
    return torch.stack([row[:length].mean(0) if average else row[length - 1] for row, length in rows])
