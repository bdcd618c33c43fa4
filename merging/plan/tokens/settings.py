"""The settings of the output's tokenizer, with the field names of mergekit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from merging.display.tables import Displayed
from merging.errors import nearest
from merging.sources.approximated_rows import Approximation

__all__ = ["PRESETS", "TokenRow", "TokenSource", "TokenizerSettings", "names_file", "rename_models", "resolve_template"]

PRESETS = ("union", "base")
"""Sources of a tokenizer that are no names of models."""

_TEMPLATE_FILES = (".jinja", ".jinja2", ".txt", ".json")


class TokenSource(Displayed, BaseModel):
    """The origin of a token's rows: the token itself in a model, another token of a model, or zeros."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["model", "model_token", "zero"]
    model: str | None = None
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, Mapping):
            _check_keys(value, cls, "source")
        return {"kind": "model", "model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_fields(self) -> TokenSource:
        stated = [name for name in ("model", "token", "token_id") if getattr(self, name) is not None]
        if self.kind == "zero" and stated:
            raise ValueError(f"a source of kind 'zero' has no {stated[0]!r}: leave it out")
        if self.kind != "zero" and self.model is None:
            raise ValueError(f"a source of kind {self.kind!r} needs the 'model' whose token it is")
        if self.kind == "model_token" and (self.token is None) == (self.token_id is None):
            raise ValueError("a source of kind 'model_token' needs either a 'token' or a 'token_id'")
        if self.kind == "model" and len(stated) > 1:
            raise ValueError(f"a source with {stated[1]!r} is of kind 'model_token': write kind: model_token")
        return self

    @model_serializer
    def _plain(self) -> Any:
        if self.kind == "model":
            return self.model
        fields = {"kind": self.kind, "model": self.model, "token": self.token, "token_id": self.token_id}
        return {name: value for name, value in fields.items() if value is not None}


class TokenRow(Displayed, BaseModel):
    """The rows of one token: for models that lack it, or with ``force`` for all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: TokenSource | None = None
    force: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            _check_keys(value, cls, "a token")
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> TokenRow:
        if self.force and self.source is None:
            raise ValueError("'force' needs a 'source', whose rows all models get")
        return self

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        source = {} if self.source is None else {"source": self.source.model_dump()}
        return source | ({"force": True} if self.force else {})


class TokenizerSettings(Displayed, BaseModel):
    """The output's tokenizer: the union of all models' tokens, or the tokenizer of one model.

    ``approximate`` is the way to approximate rows of tokens that none of the models has, from ``k`` tokens that a model
    shares with the tokenizer's model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field("union", min_length=1)
    tokens: dict[str, TokenRow] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(None, ge=1, le=65_536)
    approximate: Approximation | None = None
    k: int = Field(64, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            _check_keys(value, cls, "tokenizer")
            return {**value, "source": str(value["source"])} if isinstance(value.get("source"), Path) else value
        return {"source": str(value) if isinstance(value, Path) else value}

    @model_serializer
    def _plain(self) -> Any:
        fields: dict[str, Any] = {"source": self.source}
        if self.tokens:
            fields["tokens"] = {token: row.model_dump() for token, row in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            fields["pad_to_multiple_of"] = self.pad_to_multiple_of
        if self.approximate is not None:
            fields |= {"approximate": self.approximate, "k": self.k}
        return self.source if len(fields) == 1 else fields

    def rename(self, names: Callable[[str], str]) -> TokenizerSettings:
        """Return the settings with other names of models."""
        return TokenizerSettings.model_validate(rename_models(self.model_dump(), lambda name, keys: names(name)))


def _check_keys(value: Mapping[Any, Any], cls: type[BaseModel], what: str) -> None:
    """Refuse a key that a class has no field for. Raises ValueError, whose place pydantic knows."""
    for key in map(str, value):
        if key not in cls.model_fields:
            known = list(cls.model_fields)
            raise ValueError(f"{what} has no {key!r}{nearest(key, known)}: use {', '.join(known)}")


Rename = Callable[[Any, tuple[str, ...]], Any]
"""A function that returns another name for a model, from its name and its keys."""


def rename_models(settings: Any, rename: Rename) -> Any:
    """Return plain settings, of any content, with other names of models; presets keep theirs."""
    if isinstance(settings, str):
        return settings if settings in PRESETS else rename(settings, ())
    if not isinstance(settings, dict):
        return settings
    changed = dict(settings)
    source = changed.get("source")
    if isinstance(source, str) and source not in PRESETS:
        changed["source"] = rename(source, ("source",))
    tokens = changed.get("tokens")
    if isinstance(tokens, dict):
        changed["tokens"] = {token: _rename_row(row, rename, ("tokens", str(token))) for token, row in tokens.items()}
    return changed


def _rename_row(row: Any, rename: Rename, keys: tuple[str, ...]) -> Any:
    if not isinstance(row, dict):
        return row
    source = row.get("source")
    if isinstance(source, str):
        return {**row, "source": rename(source, (*keys, "source"))}
    if isinstance(source, dict) and isinstance(source.get("model"), str):
        return {**row, "source": {**source, "model": rename(source["model"], (*keys, "source", "model"))}}
    return row


def resolve_template(template: Any, rename: Rename) -> Any:
    """Return a chat template with its path renamed, if it is a file."""
    return rename(template, ()) if isinstance(template, str) and names_file(template) else template


def names_file(template: str) -> bool:
    """Return whether a chat template is the path of a file, and neither a name nor a text."""
    return "\n" not in template and "{" not in template and template.endswith(_TEMPLATE_FILES)
