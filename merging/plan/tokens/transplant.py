"""A donor's tokens in models that lack them: their rows are approximated from tokens that both share."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from statistics import fmean, median

from merging.errors import InputError
from merging.maths.lazy_torch import torch
from merging.plan.tokens.settings import TokenizerSettings
from merging.plan.tokens.union import OutputTokens, TokenizedModel
from merging.sources import Checkpoint
from merging.sources.approximated_rows import ApproximatedRows, LackingTokens
from merging.sources.stored import Stored
from merging.sources.tied_weights import embeddings_among, is_head
from merging.sources.tokenizer_file import Tokenizer

__all__ = ["Transplant", "make_transplant"]


@dataclass(slots=True, eq=False)
class Transplant:
    """The tokens that no model has, and the tables of their rows.

    Attributes:
        lacking: the tokens, as each model lacks them.
        donor: the model that has them.
        tables: the tables of all models, by their names.
    """

    lacking: tuple[LackingTokens, ...]
    donor: Checkpoint
    tables: dict[str, list[ApproximatedRows]] = field(default_factory=dict)

    def approximate(self, model: int, name: str, table: Stored) -> ApproximatedRows:
        """Return the rows of the tokens for a table of a model."""
        rows = ApproximatedRows(table, _donor_table(self.donor, name), self.lacking[model])
        self.tables.setdefault(name, []).append(rows)
        return rows

    def compute_on(self, device: torch.device) -> None:
        """Approximate on a device."""
        for each in self.lacking:
            each.device = device

    def facts(self) -> dict[str, float]:
        """Return the numbers of tokens, and the errors of the rows that were computed, for reports."""
        counts = {
            "tokens shared": min(len(each.shared) for each in self.lacking),
            "tokens approximated": len(self.lacking[0].rows),
        }
        found: dict[str, float] = {name: float(count) for name, count in counts.items()}
        for name, tables in self.tables.items():
            errors = [error for table in tables for error in table.errors if not math.isnan(error)]
            if errors:
                values = {"median": median(errors), "mean": fmean(errors), "largest": max(errors)}
                found |= {f"relative error in the donor's {name} ({kind})": value for kind, value in values.items()}
        return found


def make_transplant(
    settings: TokenizerSettings, output: OutputTokens, donor: TokenizedModel, of: Checkpoint
) -> Transplant | None:
    """Return the tokens of a donor that no model has, None if their rows are not to be approximated.

    Raises:
        InputError: for a donor that shares no token with a model.
    """
    if settings.approximate is None:
        return None
    rows = tuple(row for token in output.unknown if (row := donor.row(token)) is not None)
    if len(rows) < len(output.unknown):
        raise InputError(f"{donor.name}: its embedding has fewer rows than its tokenizer has tokens")
    lacking = []
    tokens = sorted(donor.tokenizer.tokens.items(), key=lambda each: each[1])
    for model in output.models:
        pairs = [(row, same) for token, row in tokens if (same := model.row(token)) is not None and row < donor.rows]
        if not pairs:
            raise InputError(f"{model.name} and {donor.name} share no token, so that no row can be approximated")
        own = {row for token in model.tokenizer.tokens if (row := model.row(token)) is not None}
        pieces = _split(donor.tokenizer, output.unknown, model) if settings.approximate == "subword" else ()
        lacking.append(
            LackingTokens(
                rows=rows,
                shared=tuple(pairs),
                own=tuple(sorted(own)),
                pieces=pieces,
                method=settings.approximate,
                k=settings.k,
            )
        )
    return Transplant(tuple(lacking), of)


def _split(donor: Tokenizer, tokens: tuple[str, ...], model: TokenizedModel) -> tuple[tuple[int, ...], ...]:
    """Return the rows of the pieces that a model's tokenizer splits the texts of tokens into."""
    from tokenizers import Tokenizer as Backend  # imported late: few merges need it

    for each in (donor, model.tokenizer):
        if not each.content:
            raise InputError(f"{each.name}: has no tokenizer.json, which splitting into subwords needs")
    theirs, ours = (Backend.from_str(json.dumps(each.content)) for each in (donor, model.tokenizer))
    texts = [theirs.decode([donor.tokens[token]], skip_special_tokens=False) for token in tokens]
    split = ours.encode_batch(texts, add_special_tokens=False)
    return tuple(tuple(row for row in each.ids if row < model.rows) for each in split)


def _donor_table(donor: Checkpoint, name: str) -> Stored | None:
    """Return the donor's table of the role of another model's table, None for a vector that it lacks."""
    found = donor.lookup(name)
    if found is not None or not name.endswith("weight"):
        return found
    heads = [each for each in donor.tensors if is_head(each)]
    tables = heads if is_head(name) and heads else embeddings_among(donor.tensors)
    return donor.tensors[tables[0]] if tables else None
