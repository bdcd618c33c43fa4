"""Output heads that are tied to input embeddings, or are not: copies are left out, own heads are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merging.errors import InputError
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.changes import Change
from merging.sources.stored import Stored
from merging.sources.tied_weights import (
    HEADS,
    has_own_head,
    heads_among,
    is_head,
    possible_copies,
    same_values,
    tied_to,
)
from merging.sources.token_rows import TokenRows

__all__ = ["add_tied_head", "find_own_heads", "is_untied", "resolve_tied_heads", "scales_outputs"]

_T5 = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano", "udop")
"""Model types that multiply the input of their head by a constant, unless their config unties it."""


def resolve_tied_heads(models: Sequence[Model], base: Checkpoint | None) -> tuple[tuple[Model, ...], Checkpoint | None]:
    """Return the models without the copies of tied weights that some files hold.

    A head of its own is then a head that differs from the embedding, or whose model's config unties it. Where all such
    heads equal their embeddings while another model ties its own, they are copies too. Values are compared only where a
    file holds a possible copy.

    Raises:
        InputError: for a first model or base whose head is missing, and for T5s of the two incompatible kinds.
    """
    given = [*models, base] if base else list(models)
    checkpoints = [model for model in given if isinstance(model, Checkpoint)]
    for model in (base or next(iter(checkpoints), None),):
        if model is not None and not has_own_head(model.config, model.tensors):
            raise InputError(
                f"{model.path}: its config says that the output head is not tied to the embedding, and it has no head: "
                f"set tie_word_embeddings to true in its config.json if it is, else complete the files"
            )
    _check_scaling(checkpoints)
    plain = {id(model): _without_copies(model, model.tied) for model in checkpoints}
    some_tied = any(model.tied and not _heads_of(model) for model in plain.values())
    reference_ties = bool(checkpoints) and not _heads_of(plain[id(base or checkpoints[0])])
    if some_tied and reference_ties:
        tied = {key: _without_copies(model, True) for key, model in plain.items()}
        if not any(_heads_of(model) for model in tied.values()):
            plain = tied
    base = plain[id(base)] if base else None
    return tuple(
        plain[id(model)] if isinstance(model, Checkpoint) else _without_tied_rows(model, base) for model in models
    ), base


def _without_tied_rows(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter without the rows of a tied head, which PEFT saves a second time.

    Rows of a table that has grown are kept: both tables then come from the adapter.
    """
    copies = {
        name
        for name, change in adapter.changes.items()
        if isinstance(change, TokenRows) and is_head(name) and base and name not in base.tensors
        if (tied := base.lookup(name)) and (change.layer is None or change.layer.shape == tied.shape)
    }
    kept = {name: change for name, change in adapter.changes.items() if name not in copies}
    return replace(adapter, changes=kept) if copies and kept else adapter


def _heads_of(model: Checkpoint) -> list[str]:
    return heads_among(model.tensors)


def _without_copies(model: Checkpoint, tied: bool) -> Checkpoint:
    copies = {
        name
        for name in possible_copies(model.tensors)
        if (source := tied_to(name, model.tensors, tied)) is not None
        and same_values(model.tensors[name], model.tensors[source])
    }
    if not copies:
        return model
    return replace(model, tensors={name: stored for name, stored in model.tensors.items() if name not in copies})


def scales_outputs(config: Mapping[str, Any]) -> bool:
    """Return whether a T5 of this config multiplies the input of its head, which no change of weights replaces."""
    if config.get("model_type") not in _T5:
        return False
    return bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False))


def _check_scaling(checkpoints: Sequence[Checkpoint]) -> None:
    t5 = [model for model in checkpoints if model.config.get("model_type") in _T5]
    for model in t5[1:]:
        if scales_outputs(model.config) != scales_outputs(t5[0].config):
            raise InputError(
                f"{model.path} and {t5[0].path}: one scales the outputs of its decoder and the other does not (its "
                f"config unties the head): they are T5s of two kinds, whose weights do not mix"
            )


def find_own_heads(models: Sequence[Model], reference: Checkpoint) -> dict[str, Stored]:
    """Return the output heads that some model has of its own where the reference ties them to its embedding."""
    names = {
        name
        for model in models
        for name in (model.changes if isinstance(model, Adapter) else model.tensors)
        if name.endswith(HEADS) and name not in reference.tensors and is_head(name)
    }
    return {name: stored for name in sorted(names) if (stored := reference.lookup(name)) is not None}


def add_tied_head(
    known: Mapping[str, Stored], inputs: Sequence[Mapping[str, Stored | Change]], reference: Checkpoint
) -> tuple[dict[str, Stored], list[dict[str, Stored | Change]], set[str]]:
    """Write out the head that is tied in the reference if only its embedding is trained.

    An adapter that trained the embedding of a language model with a tied head did not train the head. A merge into the
    shared matrix would change both, so the head is written out as it was. Rows of tokens alone are trained in both, and
    become inputs of such a head too.

    Returns:
        The tensors to write, the models' inputs for them, and the names of the tensors that are kept as they were.
    """
    tensors, own = dict(known), [dict(each) for each in inputs]
    architecture = str((reference.config.get("architectures") or [""])[0])
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")) or heads_among(known):
        return tensors, own, set()
    embedding = reference.lookup("lm_head.weight")
    trained = [(each, value) for each in own for name, value in each.items() if known[name] is embedding]
    both = [(each, value) for each, value in trained if isinstance(value, (TokenRows, Stored))]
    if embedding is None or len(both) == len(trained):
        return tensors, own, set()
    tensors["lm_head.weight"] = embedding
    if not any(isinstance(value, TokenRows) for _, value in both):
        return tensors, own, {"lm_head.weight"}
    for each, value in both:
        each["lm_head.weight"] = value
    return tensors, own, set()


def is_untied(names: Mapping[str, object], reference: Checkpoint) -> bool:
    """Return whether the output has a head of its own although the reference's config ties it."""
    return any(name not in reference.tensors or reference.tied for name in heads_among(names))
