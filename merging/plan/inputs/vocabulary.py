"""Models with different vocabularies: rows are matched by token or by their index, where the recipe asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from merging.display.tables import plural
from merging.errors import InputError, option
from merging.plan.inputs.adapter_tokenizer import SavedTokenizer, grow_tables, lent_tokenizer
from merging.plan.inputs.trained_tables import replace_tables, tables_as_checkpoint
from merging.plan.recipe import Recipe
from merging.plan.tokens.matching import MatchedTokens, download_tokenizer, match_tokens
from merging.plan.tokens.settings import TokenizerSettings
from merging.plan.tokens.transplant import Transplant
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.extended_tables import ExtendedTable
from merging.sources.renaming import find_renaming
from merging.sources.stored import Stored
from merging.sources.tied_weights import embeddings_among, is_table
from merging.sources.tokenizers import token_conflict, tokens_of

__all__ = ["Vocabulary", "match_vocabularies"]


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The vocabulary of an output whose models have different ones.

    Attributes:
        rows: the number of rows.
        of: the model with its tokenizer.
        matched: the tokens, where rows were matched by token.
        lent: whether ``of`` is an adapter, which lends its tokenizer.
    """

    rows: int
    of: Checkpoint
    matched: MatchedTokens | None = None
    lent: bool = False

    @property
    def transplant(self) -> Transplant | None:
        """The tokens that no model has, where their rows are approximated."""
        return self.matched.transplant if self.matched else None


def match_vocabularies(
    recipe: Recipe, models: Sequence[Model], base: Checkpoint | None, matched: MatchedTokens | None = None
) -> tuple[tuple[Model, ...], Checkpoint | None, Vocabulary | None, list[str]]:
    """Return the models with vocabularies of one size.

    ``matched`` are the tokens, where rows were matched by token before the models were made.

    Returns:
        The models, the base, the vocabulary if the sizes differed, and remarks.

    Raises:
        InputError: where the sizes differ and the recipe does not say what to do, or where tokenizers have different
            tokens for one row.
    """
    if matched is not None:
        return tuple(models), base, Vocabulary(matched.rows, matched.of, matched), list(matched.notices)
    if recipe.tokenizer is not None:
        lent = _find_lent(recipe, recipe.tokenizer, models)
        if lent is not None and base is not None:
            return _match_lent(recipe, lent, models, base)
        return _match_by_token(recipe, recipe.tokenizer, models, base)
    return _match_by_index(recipe, models, base)


def _match_by_index(
    recipe: Recipe, models: Sequence[Model], base: Checkpoint | None, *, check: bool = True
) -> tuple[tuple[Model, ...], Checkpoint | None, Vocabulary | None, list[str]]:
    checkpoints = [model for model in ([*models, base] if base else models) if isinstance(model, Checkpoint)]
    if not checkpoints:
        return tuple(models), base, None, []
    reference = base or checkpoints[0]
    trained = {id(model): tables_as_checkpoint(model, reference) for model in models if isinstance(model, Adapter)}
    checkpoints = [*(tables for tables in trained.values() if tables), *checkpoints]
    rows = {id(model): _rows_of(model) for model in checkpoints}
    found = sorted({each for each in rows.values() if each})
    if len(found) < 2 or (recipe.vocabulary == "error" and recipe.on_mismatch == "base"):
        return tuple(models), base, None, []
    sizes = ", ".join(f"{model.path} {rows[id(model)]}" for model in checkpoints)
    if recipe.vocabulary == "error":
        raise InputError(
            f"the models have vocabularies of different sizes ({sizes} rows). If the same row is the same token in "
            f"all, {option('vocabulary', 'base')} keeps the rows of {reference.path}, and "
            f"{option('vocabulary', 'largest')} all there are"
        )
    largest = max(checkpoints, key=lambda model: (rows[id(model)], model is reference))
    of = reference if recipe.vocabulary == "base" else largest
    remarks = _check_tokenizers(checkpoints, rows, of) if check else []
    tables = _Tables(checkpoints, rows, reference, base if recipe.vocabulary == "largest" else reference)
    resized = {id(model): tables.resize(model, rows[id(of)]) for model in checkpoints}
    kept: list[Model] = []
    for model in models:
        if isinstance(model, Checkpoint):
            kept.append(resized[id(model)])
        else:
            tables_of = trained[id(model)]
            kept.append(replace_tables(model, resized[id(tables_of)].tensors, reference) if tables_of else model)
    remarks.append(
        f"vocabularies of different sizes ({sizes} rows) were matched by index: {rows[id(of)]} rows come out"
    )
    based = resized[id(base)] if base else None
    if base is not None and based is not None and rows[id(of)] > rows[id(base)]:
        before = based.tensors
        based = grow_tables(based, rows[id(base)], rows[id(of)])  # a head, where only an embedding was resized
        remarks += [
            f"{name}: no model has rows of it for the new tokens: they are the mean of its rows"
            for name, table in based.tensors.items()
            if table is not before[name]
        ]
    return tuple(kept), based, Vocabulary(rows[id(of)], of), remarks


def _find_lent(recipe: Recipe, settings: TokenizerSettings, models: Sequence[Model]) -> SavedTokenizer | None:
    """Return the tokenizer of an adapter, where the recipe names this adapter and nothing else."""
    if settings != TokenizerSettings(source=settings.source):
        return None
    return lent_tokenizer(settings.source, zip(map(str, recipe.models), models, strict=False))


def _match_lent(
    recipe: Recipe, lent: SavedTokenizer, models: Sequence[Model], base: Checkpoint
) -> tuple[tuple[Model, ...], Checkpoint | None, Vocabulary | None, list[str]]:
    """Match rows by their index, with the tokenizer of an adapter, for whose tokens the base gets rows."""
    old = _rows_of(base)
    download_tokenizer(base)
    remarks = [f"the tokenizer comes from {lent.adapter.path}", *filter(None, [lent.compare(base)])]
    if old and lent.rows > old:
        base = grow_tables(base, old, lent.rows)
    by_index = recipe.model_copy(update={"vocabulary": "largest", "tokenizer": None})
    alike, based, found, _ = _match_by_index(by_index, models, base, check=False)
    rows = found.rows if found else _rows_of(base)
    if rows > old:
        remarks.append(f"the vocabulary has {plural(rows - old, 'row')} more than the base's, {rows} in all")
    return alike, based, Vocabulary(rows, lent.as_checkpoint, lent=True), remarks


def _match_by_token(
    recipe: Recipe, settings: TokenizerSettings, models: Sequence[Model], base: Checkpoint | None
) -> tuple[tuple[Model, ...], Checkpoint | None, Vocabulary, list[str]]:
    entries = [*recipe.models, *(str(model.path) for model in models[len(recipe.models) :])]
    given = [*zip(entries, models, strict=True), *([(recipe.base, base)] if base else [])]
    named = [(entry if isinstance(entry, str) else str(model.path), model) for entry, model in given]
    matched = match_tokens(settings, named, len(models) if base else None)
    based = matched.models[-1] if base else None
    assert based is None or isinstance(based, Checkpoint)
    vocabulary = Vocabulary(matched.rows, matched.of, matched)
    return matched.models[: len(models)], based, vocabulary, list(matched.notices)


def _rows_of(model: Checkpoint) -> int:
    """Return the rows of a model's embedding, 0 where it has none, or several of different sizes."""
    names = embeddings_among(model.tensors) or list(filter(is_table, model.tensors))
    sizes = {model.tensors[name].shape[0] for name in names}
    return sizes.pop() if len(sizes) == 1 else 0


class _Tables:
    """The tensors of all models with a row for each token, by the reference's names."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        rows: Mapping[int, int],
        reference: Checkpoint,
        preferred: Checkpoint | None,
    ) -> None:
        self._rows = rows
        self._names = {id(model): self._align(model, reference) for model in checkpoints}
        self._wanted = {
            name
            for model in checkpoints
            for ours, name in self._names[id(model)].items()
            if (other := reference.lookup(name)) is not None
            and self._is_table(model, model.tensors[ours], rows[id(reference)], other)
        }
        lenders = [model for model in checkpoints if model is not preferred]
        self._preferred = {name: self._table(preferred, name) if preferred else None for name in self._wanted}
        self._others = {
            name: tuple(stored for model in lenders if (stored := self._table(model, name))) for name in self._wanted
        }

    def _align(self, model: Checkpoint, reference: Checkpoint) -> dict[str, str]:
        """Return the reference's name of each tensor of a model."""

        def fits(name: str, match: str) -> bool:
            return len(model.tensors[name].shape) == len(reference.tensors[match].shape)

        renaming, _ = find_renaming(model.tensors, reference.tensors, fits)
        return {name: match for name in model.tensors if (match := renaming(name)) is not None}

    def _is_table(self, model: Checkpoint, ours: Stored, rows: int, other: Stored) -> bool:
        """Return whether two tensors differ only in the number of tokens, with rows one after the other."""
        if len(ours.shape) != len(other.shape):
            return False
        differ = [axis for axis, (a, b) in enumerate(zip(ours.shape, other.shape, strict=True)) if a != b]
        if len(differ) != 1 or prod(ours.shape[: differ[0]]) != 1:
            return False
        return (ours.shape[differ[0]], other.shape[differ[0]]) == (self._rows[id(model)], rows)

    def _table(self, model: Checkpoint, name: str) -> Stored | None:
        own = next((ours for ours, theirs in self._names[id(model)].items() if theirs == name), name)
        return model.lookup(own)

    def resize(self, model: Checkpoint, rows: int) -> Checkpoint:
        """Return a model with this many rows in each of these tensors.

        A tied head is written out where others have their own, since its new rows are the others'.
        """
        old, names = self._rows[id(model)], self._names[id(model)]
        if old == rows:
            return model
        tensors = dict(model.tensors)
        tables = {ours: name for ours, name in names.items() if name in self._wanted}
        if all(ours == name for ours, name in names.items()):
            tables |= {name: name for name in self._wanted - names.keys()}
        for ours, name in tables.items():
            stored = model.lookup(ours)
            if stored is not None:
                axis = stored.shape.index(old)
                shape = (*stored.shape[:axis], rows, *stored.shape[axis + 1 :])
                preferred = self._preferred[name]
                tensors[ours] = ExtendedTable(
                    stored, shape, None if preferred is stored else preferred, self._others[name]
                )
        return replace(model, tensors=tensors)


def _check_tokenizers(checkpoints: Sequence[Checkpoint], rows: Mapping[int, int], of: Checkpoint) -> list[str]:
    """Refuse tokenizers with different tokens for one row; return remarks on models without a tokenizer."""
    remarks: list[str] = []
    known: dict[int, tuple[str, Checkpoint]] = {}
    for model in dict.fromkeys([of, *checkpoints]):
        download_tokenizer(model)
        tokens = tokens_of(model.folder) if model.folder else None
        if tokens is None:
            remarks.append(f"{model.path} has no tokenizer: whether its rows are the others' tokens is not checked")
            continue
        within = {row: token for row, token in tokens.items() if row < min(rows[id(model)], rows[id(of)])}
        conflict = token_conflict(within, {row: token for row, (token, _) in known.items()})
        if conflict is not None:
            token, other = known[conflict]
            raise InputError(
                f"row {conflict} is the token {within[conflict]!r} in {model.path} and {token!r} in {other.path}: "
                f"their vocabularies do not match by index, and merging the rows would mix unrelated tokens"
            )
        for row, token in within.items():
            known.setdefault(row, (token, model))
    return remarks
