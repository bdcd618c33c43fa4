"""The tokens of an output, and the origin of their rows in each model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merging.errors import InputError, OptionError, nearest
from merging.plan.tokens.settings import TokenizerSettings, TokenSource
from merging.sources.gathered_rows import RowMap, RowSource
from merging.sources.tokenizer_file import Tokenizer

__all__ = ["OutputTokens", "TokenizedModel", "is_same_model", "unite_tokens"]


def is_same_model(name: str, wanted: str) -> bool:
    """Return whether two names mean one model."""
    if name.rstrip("/") == wanted.rstrip("/"):
        return True
    one, other = Path(name).expanduser(), Path(wanted).expanduser()
    return one.exists() and other.exists() and one.samefile(other)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedModel:
    """A model with its tokenizer: its name in the recipe, and the number of rows of its embedding."""

    name: str
    tokenizer: Tokenizer
    rows: int

    def row(self, token: str) -> int | None:
        """Return the row of a token, None where the model has no such row."""
        row = self.tokenizer.tokens.get(token)
        return row if row is not None and row < self.rows else None


def unite_tokens(source: Tokenizer, others: Sequence[Tokenizer], named: Sequence[str]) -> dict[str, int]:
    """Return the row of each token: the rows of ``source`` first, then the tokens of others that it lacks.

    Further tokens are in the order of the others and of their rows, so that it never depends on chance.

    Args:
        source: the tokenizer whose rows stay as they are.
        others: the tokenizers whose tokens are added.
        named: further tokens.
    """
    rows = dict(source.tokens)
    free = max(rows.values(), default=-1) + 1
    further = (token for each in others for token in sorted(each.tokens, key=each.tokens.__getitem__))
    for token in (*further, *named):
        if token not in rows:
            rows[token] = free
            free += 1
    return rows


class OutputTokens:
    """The rows of the output's tables of tokens.

    A token that a model lacks has the row of the base, else the mean of all models that have it, unless the settings
    give it another source. A token that all lack (``unknown``) has a row of zeros, or a row of the model's table of
    approximations, whose number is the number of models.
    """

    def __init__(
        self,
        settings: TokenizerSettings,
        tokens: Mapping[str, int],
        models: Sequence[TokenizedModel],
        *,
        base: int | None,
        padding: int,
        least_rows: int,
    ) -> None:
        """Choose the number of rows.

        Args:
            settings: the sources of single tokens, and the multiple that the number of rows is to be.
            tokens: the row of each token.
            models: the models, in the order of their numbers.
            base: the number of the base.
            padding: the number of the model whose rows behind the last token are kept.
            least_rows: the least number of rows, unless it is to be a multiple.
        """
        self.tokens, self.models = tokens, models
        self._settings, self._base, self._padding = settings, base, padding
        least, multiple = max(tokens.values(), default=-1) + 1, settings.pad_to_multiple_of
        self.rows = -(-least // multiple) * multiple if multiple else max(least, least_rows)
        self._by_row = {row: token for token, row in tokens.items()}
        self._named = {token: self._named_source(token, row.source) for token, row in settings.tokens.items()}
        found = {token for token in tokens if any(model.row(token) is not None for model in models)}
        self.unknown = tuple(token for token in tokens if token not in found and self._named.get(token) is None)
        self._unknown = {token: number for number, token in enumerate(self.unknown)}
        self._taken = [set(model.tokenizer.tokens.values()) for model in models]

    def map_of(self, model: int) -> RowMap:
        """Return the origin of each row of a model's tables."""
        return RowMap.of(self._sources(model))

    def count_lacking(self, model: int) -> int:
        """Return the number of tokens that a model has no row for."""
        return sum(self.models[model].row(token) is None for token in self.tokens)

    def _sources(self, model: int) -> Iterator[RowSource]:
        for row in range(self.rows):
            token = self._by_row.get(row)
            yield self._pad(model, row) if token is None else self._source(model, token)

    def _source(self, model: int, token: str) -> RowSource:
        given = self._settings.tokens.get(token)
        own = self.models[model].row(token)
        if own is not None and not (given and given.force):
            return ((model, own),)
        named = self._named.get(token)
        if named is None and self._settings.approximate is not None and token in self._unknown:
            return ((len(self.models), self._unknown[token]),)
        return self._default(token) if named is None else named

    def _default(self, token: str) -> RowSource:
        rows = [(number, model.row(token)) for number, model in enumerate(self.models)]
        found = [(number, row) for number, row in rows if row is not None]
        of_base = [(number, row) for number, row in found if number == self._base]
        return tuple(of_base or found)

    def _pad(self, model: int, row: int) -> RowSource:
        """Return the source of a row without a token: such a row of the model, or of the tokenizer's model."""
        for number in (model, self._padding):
            if row < self.models[number].rows and row not in self._taken[number]:
                return ((number, row),)
        return None

    def _named_source(self, token: str, source: TokenSource | None) -> RowSource:
        """Return the source of a token that the settings name; None where they leave it to the default."""
        if source is None:
            return None
        if source.kind == "zero":
            return ()
        names = [model.name for model in self.models]
        number = next((index for index, name in enumerate(names) if is_same_model(name, str(source.model))), None)
        if number is None:
            raise OptionError(
                f"tokenizer: the source of {token!r}, {source.model}, is none of the models"
                f"{nearest(str(source.model), names)}"
            )
        wanted = token if source.kind == "model" else source.token
        row = self.models[number].row(wanted) if wanted is not None else source.token_id
        if row is None or row >= self.models[number].rows:
            what = f"the token {wanted!r}" if wanted is not None else f"a row {source.token_id}"
            raise InputError(f"tokenizer: the source of {token!r}, {source.model}, does not have {what}")
        return ((number, row),)
