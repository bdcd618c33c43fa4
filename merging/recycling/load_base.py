"""Loading a base model for a task. Only this file imports transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merging.errors import InputError, OptionError, option
from merging.maths.lazy_torch import torch
from merging.pool.network import explain_errors, loading_options, quiet
from merging.recycling.data import Split, TaskKind, kind_of, labels_of
from merging.recycling.model import Classifier, Decoder, Encoder, EncoderDecoder, TaskModel
from merging.recycling.problem import Problem
from merging.recycling.settings import Settings

__all__ = ["LoadedNetwork", "continues_prompts", "load_model", "load_network", "load_problem"]

_MOST_TOKENS = 512


def load_problem(base: str, parts: Split, settings: Settings, device: torch.device) -> Problem:
    """Load the base, and return the task of the examples for it. Raises as :func:`load_model` does."""
    model = load_model(base, parts, settings, device)
    return Problem(model, tuple(map(model.encode, parts.train)), tuple(map(model.encode, parts.valid)), settings)


def load_model(base: str, parts: Split, settings: Settings, device: torch.device) -> TaskModel:
    """Load the base, a folder or a name on the Hub, as a model for the examples' task.

    Raises :class:`~merging.errors.InputError` for a base that cannot be loaded whole, and
    :class:`~merging.errors.OptionError` for a base that cannot do the task.
    """
    return load_network(base, kind_of(parts), settings, device).model_for(parts, settings)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedNetwork:
    """A base that was loaded, from which models for several tasks of one kind are made.

    Attributes:
        kind: the class of the models.
        network: the network, which the models share.
        tokenizer: its tokenizer.
        limit: the most tokens of a text.
    """

    kind: type[TaskModel]
    network: Any
    tokenizer: Any
    limit: int

    def model_for(self, parts: Split, settings: Settings, network: Any = None) -> TaskModel:
        """Return the model for a task, by another network with the same body where one is given."""
        network = self.network if network is None else network
        if issubclass(self.kind, (Decoder, EncoderDecoder)):
            language_model: TaskModel = self.kind(network, self.tokenizer, self.limit, settings.chat)
            return language_model
        model = self.kind(network, self.tokenizer, self.limit)
        if isinstance(model, Encoder):
            model.make_head(labels_of(parts), parts.train, "prototypes" if settings.head == "auto" else settings.head)
        elif network.config.pad_token_id is None:
            network.config.pad_token_id = self.tokenizer.pad_token_id or 0  # separates a decoder's last token from it
        return model


def load_network(base: str, task: TaskKind, settings: Settings, device: torch.device) -> LoadedNetwork:
    """Load the base, a folder or a name on the Hub, for tasks of one kind. Raises as :func:`load_model` does."""
    import transformers

    where, options = loading_options(base)
    with quiet(), explain_errors(base):
        config = transformers.AutoConfig.from_pretrained(where, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    architecture = str((config.architectures or [""])[0])
    kind = _kind(base, architecture, bool(config.is_encoder_decoder), task, settings)
    loader = {
        Decoder: transformers.AutoModelForCausalLM,
        EncoderDecoder: transformers.AutoModelForSeq2SeqLM,
        Classifier: transformers.AutoModelForSequenceClassification,
        Encoder: transformers.AutoModel,
    }[kind]
    with quiet(), explain_errors(base):
        network, loading = loader.from_pretrained(
            where, dtype=_dtype(settings, device), output_loading_info=True, **options
        )
    missing = sorted(name for name in loading["missing_keys"] if kind is not Encoder or ".pooler." not in f".{name}")
    if missing:
        raise InputError(f"{base}: lacks {missing[0]} and {len(missing) - 1} more of a {type(network).__name__}")
    limit = min(settings.max_length or _MOST_TOKENS, tokenizer.model_max_length, _positions(config))
    return LoadedNetwork(kind, network.to(device), tokenizer, limit)


def continues_prompts(base: str) -> bool:
    """Return whether a base is a language model, from its config. Raises as :func:`load_model` does."""
    import transformers

    where, options = loading_options(base)
    with quiet(), explain_errors(base):
        config = transformers.AutoConfig.from_pretrained(where, **options)
    return _generates(str((config.architectures or [""])[0]))


def _generates(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _kind(base: str, architecture: str, two_parts: bool, asked: str, settings: Settings) -> Any:
    generates = _generates(architecture)
    if asked == "completion":
        if not generates:
            raise OptionError(
                f"{base} is a {architecture or 'model of no stated kind'}, which continues no prompts: give examples "
                f"with text and label"
            )
        return EncoderDecoder if two_parts else Decoder
    own = architecture.endswith("ForSequenceClassification")
    if generates and not own:
        raise OptionError(f"{base} is a {architecture}: give examples with prompt and completion instead of labels")
    if settings.head == "model" and not own:
        raise OptionError(f"{base} has no classification head: use {option('head', 'labels', 'prototypes')}")
    return Classifier if own and settings.head in ("auto", "model") else Encoder


def _dtype(settings: Settings, device: torch.device) -> Any:
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, settings.dtype)


def _positions(config: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else _MOST_TOKENS
