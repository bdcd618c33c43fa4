"""Models whose rows are matched by token: every table of tokens becomes a table of the output's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from merging.errors import InputError, OptionError, option
from merging.hub.address import Address
from merging.hub.open_model import open_base
from merging.hub.repository import open_repository
from merging.plan.tokens.rebuild import RebuiltTokenizer, rebuild_tokenizer
from merging.plan.tokens.settings import TokenizerSettings
from merging.plan.tokens.transplant import Transplant, make_transplant
from merging.plan.tokens.union import OutputTokens, TokenizedModel, is_same_model, unite_tokens
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.gathered_rows import GatheredRows, RowMap
from merging.sources.renaming import find_renaming
from merging.sources.stored import Stored
from merging.sources.tied_weights import HEADS, embeddings_among, is_table
from merging.sources.tokenizer_file import read_tokenizer
from merging.sources.tokenizers import TOKENIZER_FILES

__all__ = ["MatchedTokens", "NamedModel", "check_tokenizer", "download_tokenizer", "match_tokens"]

_MORE_TABLES = (
    "tok_embeddings.weight",
    "token_embedding.weight",
    "word_embedding.weight",
    "embed_tokens_per_layer.weight",
    "cls.predictions.bias",
    "final_logits_bias",
    *(head.removesuffix("weight") + "bias" for head in HEADS),
)
"""Further names of tables with a row for each token, and of vectors with an element for each."""

NamedModel = tuple[str, Model]
"""A model with its name in the recipe."""


@dataclass(frozen=True, slots=True, eq=False)
class MatchedTokens:
    """Models whose tables have the same tokens in the same rows.

    Attributes:
        models: The models, in the order in which they were given.
        rows: The number of rows.
        of: The model whose tokenizer the output has, at least as its beginning.
        tokens: The row of each token of the output.
        reference: The row of each token of the model that the output is like.
        rebuilt: The tokenizer, where no model has it.
        notices: Remarks for people.
        transplant: The tokens that no model has, where their rows are approximated.
    """

    models: tuple[Model, ...]
    rows: int
    of: Checkpoint
    tokens: Mapping[str, int]
    reference: Mapping[str, int]
    rebuilt: RebuiltTokenizer | None
    notices: tuple[str, ...]
    transplant: Transplant | None = None


def match_tokens(settings: TokenizerSettings, named: Sequence[NamedModel], base: int | None) -> MatchedTokens:
    """Match the rows of models by token.

    Args:
        settings: the tokenizer of the output.
        named: the models with their names. Adapters among them stay as they are.
        base: the number of the base, whose rows other models get for tokens that they lack.

    Raises:
        InputError: for a model without a tokenizer that can be read, and an adapter that trained a table of tokens.
        OptionError: for settings that name another model than there are.
    """
    full = [(name, model) for name, model in named if isinstance(model, Checkpoint)]
    first = full[0][1] if base is None else named[base][1]
    assert isinstance(first, Checkpoint)
    models = [_tokenize(name, model) for name, model in full]
    number = next(index for index, (_, checkpoint) in enumerate(full) if checkpoint is first)
    of, donor, padding = _find_source(settings, full, models, number)
    source = donor.tokenizer
    others = [model.tokenizer for model in models if model.tokenizer is not source]
    tokens = unite_tokens(source, others if settings.source == "union" else (), list(settings.tokens))
    extends = settings.source == "union" or len(tokens) > len(source.tokens)
    rebuilt = rebuild_tokenizer(source, others, tokens) if extends else None
    table = OutputTokens(
        settings,
        tokens,
        models,
        base=None if base is None else number,
        padding=padding,
        least_rows=donor.rows,
    )
    maps = [table.map_of(index) for index in range(len(full))]
    moved = [not rows.is_identity(index, models[index].rows) for index, rows in enumerate(maps)]
    for name, given in named:
        if isinstance(given, Adapter) and any(moved):
            _refuse_trained_tables(name, given)
    transplant = make_transplant(settings, table, donor, of) if table.unknown else None
    tables = _TokenTables([model for _, model in full], [model.rows for model in models], first, transplant)
    matched = iter([tables.gather(index, maps[index]) for index in range(len(full))])
    notices = list(rebuilt.notices if rebuilt else ())
    if table.unknown and transplant is None:
        notices.append(
            f"{len(table.unknown):,} tokens of {donor.name} are in no model and have rows of zeros: `merge tokens` "
            f"approximates such rows"
        )
    for index, model in enumerate(models):
        lacking = table.count_lacking(index) - len(table.unknown)
        if lacking:
            notices.append(
                f"{model.name} lacks {lacking:,} of {len(tokens):,} tokens: it has other models' rows for them"
            )
    return MatchedTokens(
        models=tuple(next(matched) if isinstance(given, Checkpoint) else given for _, given in named),
        rows=table.rows,
        of=of,
        tokens=tokens,
        reference=models[number].tokenizer.tokens,
        rebuilt=rebuilt,
        notices=tuple(notices),
        transplant=transplant,
    )


def download_tokenizer(model: Checkpoint) -> None:
    """Have the files of a tokenizer at hand whose model is on the Hub."""
    if model.origin is not None:
        repository = open_repository(Address(model.origin.repo, model.origin.commit))
        repository.download_files(TOKENIZER_FILES, model.origin.folder)


def _tokenize(name: str, model: Checkpoint) -> TokenizedModel:
    download_tokenizer(model)
    return TokenizedModel(name, read_tokenizer(model.folder, name), _count_rows(model))


def _find_source(
    settings: TokenizerSettings, full: Sequence[tuple[str, Checkpoint]], models: Sequence[TokenizedModel], first: int
) -> tuple[Checkpoint, TokenizedModel, int]:
    """Return the model of the output's tokenizer, itself and with its tokens, and the number of the model whose rows
    without tokens are kept."""
    if settings.source in ("union", "base"):
        return full[first][1], models[first], first
    for number, (name, model) in enumerate(full):
        if is_same_model(name, settings.source):
            return model, models[number], number
    other = open_base(settings.source, option("tokenizer"))
    return other, _tokenize(settings.source, other), first


def _refuse_trained_tables(name: str, model: Adapter) -> None:
    trained = next((target for target in model.changes if _is_token_table(target)), None)
    if trained is not None:
        raise InputError(
            f"{name}: it trained {trained}, a table of tokens, and adapters' tables are not matched by token: merge it "
            f"into its base first, or leave out {option('tokenizer')}"
        )


def _is_token_table(name: str) -> bool:
    return is_table(name) or name.endswith(_MORE_TABLES)


def _count_rows(model: Checkpoint) -> int:
    """Return the number of rows of a model's embedding. Raises :class:`~merging.errors.InputError` without one."""
    names = embeddings_among(model.tensors) or [name for name in model.tensors if _is_token_table(name)]
    sizes = {model.tensors[name].shape[0] for name in names if len(model.tensors[name].shape) > 1}
    if len(sizes) != 1:
        found = "several embeddings of different sizes" if sizes else "no embedding of tokens that its name shows"
        raise InputError(f"{model.path}: has {found}, so its rows cannot be matched by token")
    return sizes.pop()


class _TokenTables:
    """The tables of tokens of all models, by the reference's names."""

    def __init__(
        self,
        models: Sequence[Checkpoint],
        rows: Sequence[int],
        reference: Checkpoint,
        transplant: Transplant | None = None,
    ) -> None:
        self._models, self._rows, self._transplant = models, rows, transplant
        self._names = [_align(model, reference) for model in models]
        wanted = [
            theirs
            for index, model in enumerate(models)
            for ours, theirs in self._names[index].items()
            if _is_token_table(ours) and _token_axis(model.tensors[ours], rows[index])
        ]
        self._wanted = {name: [self._find(index, name) for index in range(len(models))] for name in wanted}

    def _find(self, index: int, name: str) -> Stored | None:
        own = next((ours for ours, theirs in self._names[index].items() if theirs == name), name)
        return self._models[index].lookup(own)

    def gather(self, index: int, rows: RowMap) -> Checkpoint:
        """Return a model whose tables have the rows of the output.

        A head that is tied in this model, and not in all, is written out, since its further rows are other models'.
        """
        model = self._models[index]
        if rows.is_identity(index, self._rows[index]):
            return model
        tensors, names = dict(model.tensors), {theirs: ours for ours, theirs in self._names[index].items()}
        for name, tables in self._wanted.items():
            stored = tables[index]
            if stored is not None:
                self._check_widths(tables, index, name)
                own = names.get(name, name)
                lent = [self._transplant.approximate(index, name, stored)] if self._transplant else []
                tensors[own] = GatheredRows(stored, rows, [*tables, *lent])
        return replace(model, tensors=tensors)

    def _check_widths(self, tables: Sequence[Stored | None], index: int, name: str) -> None:
        """Refuse rows of different lengths. Raises :class:`~merging.errors.InputError`."""
        widths = [stored and stored.numel // rows for stored, rows in zip(tables, self._rows, strict=True)]
        for model, width in zip(self._models, widths, strict=True):
            if width not in (None, widths[index]):
                raise InputError(
                    f"{name} has rows of {widths[index]} numbers in {self._models[index].path}, and of {width} in "
                    f"{model.path}: models of different widths do not merge"
                )


def _align(model: Checkpoint, reference: Checkpoint) -> dict[str, str]:
    """Return the reference's name of each table of a model."""

    def fits(name: str, match: str) -> bool:
        return len(model.tensors[name].shape) == len(reference.tensors[match].shape)

    renaming, _ = find_renaming(model.tensors, reference.tensors, fits)
    found = ((name, renaming(name)) for name in model.tensors if _is_token_table(name))
    return {name: match for name, match in found if match is not None}


def _token_axis(stored: Stored, rows: int) -> bool:
    """Return whether a tensor has a part for each token, one after the other."""
    return rows in stored.shape and prod(stored.shape[: stored.shape.index(rows)]) == 1


def check_tokenizer(settings: TokenizerSettings | None, vocabulary: str) -> None:
    """Refuse two ways to match rows at once. Raises :class:`~merging.errors.OptionError`."""
    if settings is not None and vocabulary != "error":
        raise OptionError(
            f"{option('tokenizer')} matches rows by token, and {option('vocabulary')} by their index: leave "
            f"{option('vocabulary')} out"
        )
