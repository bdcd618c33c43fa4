"""The SQLite file of a pool, which a stranger may have altered.

A schema can hold code: endless views, triggers, indexes on expressions. So the file is used only if its schema equals
the schema that this program writes, and its pages are sound.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merging.errors import FormatError, OutputError
from merging.sources.links import refuse_link
from merging.sources.small_files import check_file

__all__ = ["SCHEMA", "TABLES", "Database"]

SCHEMA = 1

TABLES = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE base (target TEXT PRIMARY KEY, norm REAL NOT NULL);
CREATE TABLE adapters (
    name TEXT PRIMARY KEY, verdict TEXT NOT NULL, owner TEXT, licence TEXT, stated_base TEXT, created TEXT,
    downloads INTEGER NOT NULL, sha256 TEXT, folder TEXT, size INTEGER NOT NULL, kind TEXT, rank INTEGER NOT NULL,
    targets INTEGER NOT NULL, norm REAL, relative REAL, sketch BLOB, figures TEXT NOT NULL, time TEXT NOT NULL
);
CREATE INDEX by_content ON adapters (sha256);
CREATE TABLE findings (
    adapter TEXT NOT NULL REFERENCES adapters (name) ON DELETE CASCADE,
    stage TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL
);
CREATE INDEX of_adapter ON findings (adapter);
"""

_LARGEST = 1 << 32
"""The largest size of a file, in bytes. An adapter takes about three thousand."""

_BESIDE = ("", "-journal", "-wal", "-shm")
"""The endings of the files that SQLite writes."""

_LIMITS = {"LENGTH": 1 << 24, "SQL_LENGTH": 1 << 16, "EXPR_DEPTH": 64, "COMPOUND_SELECT": 8, "ATTACHED": 0}
"""Limits of one value and one statement."""

_DEFENSIVE = 1010
"""SQLITE_DBCONFIG_DEFENSIVE: only SQLite itself writes to the schema."""

_STEPS, _TURNS = 1 << 20, 1 << 11
"""The product is the most instructions of a statement on SQLite's machine: about ten seconds."""


class Database:
    """An open file with the schema of a pool.

    Raises :class:`~merging.errors.FormatError` for another schema and for a damaged file, at any time, and
    :class:`~merging.errors.OutputError` if the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for end in _BESIDE:
            refuse_link(path.with_name(path.name + end))
        check_file(path, limit=_LARGEST)
        self._effort = _Effort()
        with self._reading():
            self._file = sqlite3.connect(path, timeout=60)
        weakref.finalize(self, self._file.close)  # Python 3.13 warns of a connection that nobody closed
        try:
            with self._reading():
                self._prepare()
                self._check()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Return all rows that a query finds."""
        with self._reading():
            return self._file.execute(query, values).fetchall()

    def change(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Execute a statement for each row of values, within :meth:`writing`."""
        self._effort.turns = 0
        self._file.executemany(statement, rows)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make all changes in the body one transaction."""
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.OperationalError as error:
            raise OutputError(f"{self.path}: cannot be written: {error}") from None
        except (sqlite3.Error, ValueError) as error:
            raise self._damage_error(str(error)) from None

    def _prepare(self) -> None:
        self._file.row_factory = sqlite3.Row
        self._file.set_progress_handler(self._effort.count, _STEPS)
        if hasattr(self._file, "setlimit"):  # Python 3.11
            for name, limit in _LIMITS.items():
                self._file.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), limit)
        if hasattr(self._file, "setconfig"):  # Python 3.12
            self._file.setconfig(_DEFENSIVE, True)
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "foreign_keys = ON", "synchronous = FULL"):
            self._file.execute(f"PRAGMA {setting}")

    def _check(self) -> None:
        """Compare the schema with this program's own before it is used, then check every page."""
        found, own = _schema(self._file), _own_schema()
        if found.get("facts") == own["facts"]:
            stated = self._file.execute("SELECT value FROM facts WHERE key = 'schema'").fetchone()
            if stated is not None and stated[0] != str(SCHEMA):
                other = str(stated[0])[:20]
                raise FormatError(
                    f"{self.path}: has the schema {other}, and this version reads {SCHEMA}: use a newer one"
                )
        odd = sorted(str(name) for name in found.keys() | own.keys() if found.get(name) != own.get(name))
        if odd:
            raise FormatError(
                f"{self.path}: is not an index of a pool, or was altered: its {odd[0][:80]} is not as in a "
                f"pool: build the pool again"
            )
        sound = self._file.execute("PRAGMA quick_check(1)").fetchone()
        if sound is None or sound[0] != "ok":
            raise self._damage_error(" ".join(str(sound and sound[0]).split())[:200])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._effort.turns = 0
        try:
            yield
        except (
            sqlite3.Error,
            sqlite3.Warning,
            ValueError,
            OverflowError,
        ) as error:  # the last two for texts that are not valid
            raise self._damage_error(str(error)) from None

    def _damage_error(self, reason: str) -> FormatError:
        return FormatError(f"{self.path}: is damaged, or is not an index of a pool: {reason}: build the pool again")


class _Effort:
    """A count of a statement's instructions, separate from the database, which else would keep itself alive."""

    turns = 0

    def count(self) -> bool:
        """Return whether a statement has taken too many instructions, so that SQLite ends it."""
        self.turns += 1
        return self.turns > _TURNS


def _schema(file: sqlite3.Connection) -> dict[Any, tuple[Any, ...]]:
    """Return the schema by name: kind, table, and statement."""
    rows = file.execute("SELECT name, type, tbl_name, sql FROM sqlite_master LIMIT 100")
    return {name: tuple(rest) for name, *rest in rows}


def _own_schema() -> dict[Any, tuple[Any, ...]]:
    file = sqlite3.connect(":memory:")
    try:
        file.executescript(TABLES)
        return _schema(file)
    finally:
        file.close()
