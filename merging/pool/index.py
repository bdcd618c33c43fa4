"""The index of a pool: all facts about every adapter that was ever audited, in one SQLite file."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.errors import FormatError, InputError, OutputError, either, nearest
from merging.pool.database import SCHEMA, TABLES, Database
from merging.pool.entry import VERDICTS, Entry, Finding, PoolVerdict, verdict_of
from merging.pool.sketches import LENGTH
from merging.sources.small_files import parse_json

__all__ = ["UNFINISHED", "Index", "is_pool"]

_NAME = "pool.sqlite"

UNFINISHED = (".pool.sqlite.new", ".pool.sqlite.new-journal")
"""Files that a kill may leave of an unfinished index."""

_FOLDER = re.compile(r"adapters/[0-9a-f]{16}(/(?!\.\.?$)[^/\\\0]+)?")
"""The form of the path of an adapter's files within the pool."""

_NAMED = ("largest_change_at",)
"""Figures that are texts."""

_TEXTS = ("owner", "licence", "stated_base", "created", "sha256", "folder", "kind")
_COUNTS = ("downloads", "size", "rank", "targets")


def is_pool(folder: Path) -> bool:
    """Whether a folder is a pool: it has an index."""
    return (folder / _NAME).is_file()


_COLUMNS = [each.name for each in fields(Entry) if each.name != "findings"]


class Index:
    """The SQLite file of a pool. Every method is one transaction, so that a kill leaves the state before or after it.

    Raises :class:`~merging.errors.OutputError` if the disk refuses, and :class:`~merging.errors.FormatError` for a
    file that is not an index of this version.
    """

    def __init__(self, pool: Path) -> None:
        self.path = pool / _NAME
        if not os.path.lexists(self.path):
            build = either("merge pool build", "Pool.build")
            raise InputError(f"{pool}: is not a pool (it has no {_NAME}): make one with {build}")
        self._database = Database(self.path)

    @classmethod
    def create(cls, pool: Path, **facts: str) -> Index:
        """Create the index of a new pool with some facts, atomically."""
        new = pool / UNFINISHED[0]
        try:
            for left in UNFINISHED:  # the remains of a killed attempt
                (pool / left).unlink(missing_ok=True)
            os_calls.create(new).close()
            file = sqlite3.connect(new)
            try:
                file.executescript(f"PRAGMA synchronous = FULL; BEGIN; {TABLES}")
                file.executemany("INSERT INTO facts VALUES (?, ?)", {"schema": str(SCHEMA), **facts}.items())
                file.commit()
            finally:
                file.close()
            new.replace(pool / _NAME)
            os_calls.sync_folder(pool)
        except OSError as error:
            raise OutputError(f"{pool}: cannot be created: {error.strerror}") from None
        except sqlite3.OperationalError as error:
            raise OutputError(f"{pool}: cannot be created: {error}") from None
        return cls(pool)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def fact(self, key: str) -> str | None:
        """Return a fact about the pool itself, None if it is not noted."""
        rows = self._database.rows("SELECT value FROM facts WHERE key = ?", (key,))
        return str(rows[0]["value"]) if rows else None

    def note(self, **facts: str) -> None:
        """Note facts about the pool itself."""
        with self._database.writing():
            self._database.change("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def base_norms(self) -> dict[str, float]:
        """Return the Frobenius norms of the base's tensors that were computed so far."""
        norms = {row["target"]: row["norm"] for row in self._database.rows("SELECT * FROM base")}
        if not all(_is(name, str) and _is_number(norm) and norm >= 0 for name, norm in norms.items()):
            raise self._alteration_error("a norm of the base is not a number")
        return norms

    def put(self, entry: Entry, base_norms: Mapping[str, float] | None = None) -> None:
        """Note an adapter and its findings. They replace its earlier entry."""
        values = [getattr(entry, name) for name in _COLUMNS]
        values[_COLUMNS.index("figures")] = json.dumps(entry.figures)
        marks = ", ".join("?" * len(values))
        found = [(entry.name, each.stage, each.verdict, each.reason) for each in entry.findings]
        with self._database.writing():
            self._database.change("DELETE FROM findings WHERE adapter = ?", [(entry.name,)])
            self._database.change(f"INSERT OR REPLACE INTO adapters ({', '.join(_COLUMNS)}) VALUES ({marks})", [values])
            self._database.change("INSERT INTO findings VALUES (?, ?, ?, ?)", found)
            self._database.change("INSERT OR REPLACE INTO base VALUES (?, ?)", (base_norms or {}).items())

    def judge(self, stage: str, findings: Mapping[str, Finding]) -> None:
        """Replace the findings of one stage for all adapters, and update all verdicts."""
        rows = [(name, found.stage, found.verdict, found.reason) for name, found in findings.items()]
        with self._database.writing():
            self._database.change("DELETE FROM findings WHERE stage = ?", [(stage,)])
            self._database.change("INSERT INTO findings VALUES (?, ?, ?, ?)", rows)
            verdicts = [(verdict_of(entry.findings), entry.name) for entry in self.entries()]
            self._database.change("UPDATE adapters SET verdict = ? WHERE name = ?", verdicts)

    def note_findings(self, name: str, stage: str, findings: Sequence[Finding], figures: Mapping[str, float]) -> None:
        """Replace the findings of one stage for one adapter, and add figures."""
        entry = self.entry(name)
        kept = tuple(found for found in entry.findings if found.stage != stage)
        found = (*kept, *findings)
        self.put(replace(entry, verdict=verdict_of(found), findings=found, figures={**entry.figures, **figures}))

    def remove(self, names: Iterable[str]) -> None:
        """Forget adapters."""
        with self._database.writing():
            self._database.change("DELETE FROM adapters WHERE name = ?", ((name,) for name in names))

    def names(self) -> set[str]:
        """Return the names of all adapters that were audited."""
        return {row["name"] for row in self._database.rows("SELECT name FROM adapters")}

    def entries(self, verdicts: Sequence[PoolVerdict] = VERDICTS) -> list[Entry]:
        """Return the adapters with one of these verdicts, sorted by name."""
        found = map(self._entry, self._database.rows("SELECT * FROM adapters ORDER BY name"))
        return [entry for entry in found if entry.verdict in verdicts]

    def entry(self, name: str) -> Entry:
        """Return one adapter, by its name, the end of its name (``spam`` for ``/home/me/spam``), or a relative path.

        The commit of an adapter on the Hub may be left out.

        Raises :class:`~merging.errors.InputError` for an unknown name, and for an end that is not unique.
        """
        here = str(Path(name).expanduser().absolute())
        rows = "SELECT * FROM adapters WHERE name IN (?, ?) ORDER BY name != ?"
        if found := self._database.rows(rows, (name, os.path.normpath(here), name)):
            return self._entry(found[0])
        end = f"/{name.rstrip('/')}"
        ending = [
            known
            for known in sorted(self.names())
            if any(f"/{each}".endswith(end) for each in (known.rstrip("/"), known.partition("@")[0]))
        ]
        if len(ending) > 1:
            raise InputError(f"{name}: may be {', '.join(ending[:5])}: write more of it")
        if not ending:
            raise InputError(f"{name}: is not in the pool{nearest(name, self.names())}")
        return self.entry(ending[0])

    def _entry(self, row: sqlite3.Row) -> Entry:
        rows = self._database.rows("SELECT * FROM findings WHERE adapter = ? ORDER BY rowid", (row["name"],))
        findings = tuple(Finding(each["stage"], each["verdict"], each["reason"]) for each in rows)
        values = {name: row[name] for name in _COLUMNS}
        if odd := _odd_value(values, findings):
            raise self._alteration_error(f"the {odd} of an adapter is not valid")
        values["figures"] = parse_json(values["figures"], f"{self.path}: the figures of {values['name']}")
        if not all(_is_number(value) or key in _NAMED for key, value in values["figures"].items()):
            raise self._alteration_error("a figure of an adapter is not a number")
        return Entry(**values, findings=findings)

    def _alteration_error(self, reason: str) -> FormatError:
        return FormatError(f"{self.path}: is damaged, or was altered: {reason}: build the pool again")


def _odd_value(values: Mapping[str, Any], findings: Sequence[Finding]) -> str | None:
    """Return the name of a value that is not valid, None if all are."""
    odd = [name for name in ("name", "verdict", "figures", "time") if not _is(values[name], str)]
    odd += [name for name in _TEXTS if values[name] is not None and not _is(values[name], str)]
    odd += [name for name in _COUNTS if not _is(values[name], int)]
    odd += [name for name in ("norm", "relative") if values[name] is not None and not _is_number(values[name])]
    if odd:
        return odd[0]
    if values["sketch"] is not None and not (_is(values["sketch"], bytes) and len(values["sketch"]) == 8 * LENGTH):
        return "sketch"
    if values["folder"] is not None and not _FOLDER.fullmatch(values["folder"]):
        return "folder"
    if any(not (_is(each.stage, str) and _is(each.reason, str)) for each in findings):
        return "finding"
    return None if {values["verdict"], *(each.verdict for each in findings)} <= {*VERDICTS} else "verdict"


def _is(value: object, kind: type) -> bool:
    return type(value) is kind


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
