"""The tokenizer that was saved with an adapter, as the tokenizer of a full model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from merging.display.tables import plural
from merging.errors import InputError
from merging.hub.address import Address
from merging.hub.repository import open_repository
from merging.plan.tokens.union import is_same_model
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.gathered_rows import GatheredRows, RowMap
from merging.sources.small_files import is_there
from merging.sources.tied_weights import embeddings_among, is_table
from merging.sources.tokenizers import TOKENIZER_FILES, token_conflict, tokens_of

__all__ = [
    "GENERATION",
    "SavedTokenizer",
    "adapter_folder",
    "find_saved_tokenizer",
    "grow_tables",
    "lent_tokenizer",
]

GENERATION = "generation_config.json"

_KINDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files that make a tokenizer, without which others only describe one."""


@dataclass(frozen=True, slots=True, eq=False)
class SavedTokenizer:
    """The tokenizer in an adapter's folder.

    Attributes:
        adapter: the adapter.
        folder: the folder of its files.
        tokens: the tokens by row; None for a kind of tokenizer that is not read.
    """

    adapter: Adapter
    folder: Path
    tokens: dict[int, str] | None

    @property
    def rows(self) -> int:
        """The number of rows that the tokens need; 0 for a kind of tokenizer that is not read."""
        return max(self.tokens, default=-1) + 1 if self.tokens else 0

    @property
    def as_checkpoint(self) -> Checkpoint:
        """The tokenizer as a model without tensors, from whose folder files are copied."""
        return Checkpoint(self.adapter.path, {}, self.adapter.files, folder=self.folder, origin=self.adapter.origin)

    def compare(self, base: Checkpoint) -> str | None:
        """Return a remark on rows that are other tokens for the base's tokenizer, None without any."""
        known = tokens_of(base.folder) if base.folder else None
        row = token_conflict(self.tokens, known) if self.tokens and known else None
        if row is None or not self.tokens or not known:
            return None
        count = sum(known.get(row, token) != token for row, token in self.tokens.items())  # further rows are new
        return (
            f"{self.adapter.path}: its tokenizer has another token than the base's in {plural(count, 'row')}, such as "
            f"{self.tokens[row]!r} for {known[row]!r} in row {row}"
        )


def find_saved_tokenizer(adapter: Adapter) -> SavedTokenizer | None:
    """Return the tokenizer in an adapter's folder, None without one. On the Hub its files are downloaded."""
    folder = adapter_folder(adapter)
    if folder is None or not any(is_there(folder / name) for name in _KINDS):
        return None
    return SavedTokenizer(adapter, folder, tokens_of(folder))


def adapter_folder(adapter: Adapter) -> Path | None:
    """Return the folder of an adapter's files, None for a bare file. On the Hub its small files are downloaded."""
    if adapter.origin is None:
        return adapter.path if adapter.path.is_dir() else None
    repository = open_repository(Address(adapter.origin.repo, adapter.origin.commit))
    repository.download_files((*TOKENIZER_FILES, GENERATION), adapter.origin.folder)
    return repository.folder / adapter.origin.folder


def lent_tokenizer(source: str, named: Iterable[tuple[str, Model]]) -> SavedTokenizer | None:
    """Return the tokenizer of the adapter with this name, None if no adapter has it.

    Raises :class:`~merging.errors.InputError` for an adapter without a tokenizer.
    """
    adapter = next((model for name, model in named if isinstance(model, Adapter) and is_same_model(name, source)), None)
    if adapter is None:
        return None
    found = find_saved_tokenizer(adapter)
    if found is None:
        raise InputError(f"{adapter.path}: has no tokenizer next to its weights: name another model")
    return found


def grow_tables(base: Checkpoint, old: int, rows: int) -> Checkpoint:
    """Return a model whose tables have more rows than ``old``: the mean of all rows, as transformers' resizing does."""
    grown = RowMap(rows, (0, old, rows), (((0, 0),), None))
    tables = {*embeddings_among(base.tensors), *filter(is_table, base.tensors)}
    found = {name: base.tensors[name] for name in tables if base.tensors[name].shape[:1] == (old,)}
    return replace(
        base, tensors={**base.tensors, **{name: GatheredRows(each, grown, [each]) for name, each in found.items()}}
    )
