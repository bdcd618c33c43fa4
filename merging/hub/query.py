"""Queries for models on the Hub: adapters by base, author, tag or word."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from itertools import islice
from typing import Any, Literal

from merging.errors import InputError, OptionError, nearest
from merging.hub.address import Address
from merging.hub.client import api, offline, with_retries

__all__ = ["HubModel", "Query", "parse_query"]

_PREFIX = "hub:"
_EXPANDED = ["sha", "createdAt", "downloads", "gated", "tags"]
_BASE = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model that a query found: commit, date of creation, number of downloads, whether it is gated, and tags."""

    repo: str
    commit: str
    created: datetime
    downloads: int
    gated: bool
    tags: tuple[str, ...]

    @property
    def address(self) -> Address:
        return Address(self.repo, self.commit)


@dataclass(frozen=True, slots=True)
class Query:
    """A query for adapters of a ``base`` or an ``author``, with a ``tag``, or with the word ``search`` in their names.

    As text: ``hub:base=ORG/NAME,author=ORG,tag=TAG,search=WORD,limit=N``; each part is optional. The query returns the
    first ``limit`` models in the order ``sort``: the latest first, or the most downloaded.
    """

    base: str | None = None
    author: str | None = None
    tag: str | None = None
    search: str | None = None
    limit: int = 100
    sort: Literal["created", "downloads"] = "created"

    def models(self) -> list[HubModel]:
        """Return the models, oldest first. Raises :class:`~merging.errors.InputError` if the Hub cannot be asked."""
        if offline():
            raise InputError(f"{self}: the Hub is not asked while HF_HUB_OFFLINE is set")
        wanted = [f"base_model:adapter:{self.base}"] if self.base else []
        wanted += [self.tag] if self.tag else []
        asked: dict[str, Any] = {
            "filter": wanted or None,
            "author": self.author,
            "search": self.search,
            "sort": "created_at" if self.sort == "created" else "downloads",
            "limit": self.limit,
            "expand": _EXPANDED,
        }
        listed = with_retries(lambda: list(islice(api().list_models(**asked), self.limit)), str(self))
        found = [
            HubModel(
                repo=info.id,
                commit=info.sha,
                created=info.created_at or datetime.fromtimestamp(0, timezone.utc),
                downloads=info.downloads or 0,
                gated=bool(info.gated),
                tags=tuple(info.tags or ()),
            )
            for info in listed
            if info.sha
        ]
        return sorted(found, key=lambda each: (each.created, each.repo))

    def __str__(self) -> str:
        default = Query()
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return _PREFIX + ",".join(f"{name}={value}" for name, value in parts if value != getattr(default, name))


def parse_query(text: str) -> Query | None:
    """Return the query that a text means, None if it does not begin with ``hub:``.

    Raises :class:`~merging.errors.OptionError` for an unknown part.
    """
    if not text.startswith(_PREFIX):
        return None
    query = Query()
    names = [field.name for field in fields(Query)]
    for part in text.removeprefix(_PREFIX).split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or not value or name not in names:
            raise OptionError(
                f"{text}: {part!r} is not a part of a query{nearest(name, names)}: write hub:base=ORG/NAME,author=ORG,"
                f"tag=TAG,search=WORD,limit=N"
            )
        stated: dict[str, Any] = {name: _value(text, name, value)}
        query = replace(query, **stated)
    if not (query.base or query.author or query.tag or query.search):
        raise OptionError(f"{text}: asks for every model there is: name a base, an author, a tag or a word")
    return query


def _value(text: str, name: str, value: str) -> str | int:
    if name == "limit":
        if not re.fullmatch("[0-9]{1,6}", value) or not 0 < int(value) <= 100_000:
            raise OptionError(f"{text}: limit = {value}: a number from 1 to 100000 is wanted")
        return int(value)
    if name == "base" and not _BASE.fullmatch(value):
        raise OptionError(f"{text}: base = {value}: ORG/NAME is wanted")
    if name == "sort" and value not in ("created", "downloads"):
        raise OptionError(f"{text}: sort = {value}: created or downloads")
    return value
