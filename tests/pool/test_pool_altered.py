"""Pools of strangers: an index that was altered ends in one message, and nothing is done through a link."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from merging.cli.main import cli
from merging.errors import FormatError, MergingError
from merging.pool import Pool
from merging.pool.candidates import candidates_in
from support.adapters import QUIRKS, deep_base, train

pytestmark = QUIRKS

ENDLESS = "WITH RECURSIVE n(x, y) AS (SELECT 1, 1 UNION ALL SELECT x + 1, x FROM n)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of two adapters."""
    folder = tmp_path_factory.mktemp("built")
    base = deep_base(folder / "base", layers=1)
    for seed in (1, 2):
        train(folder / "loras" / str(seed), base, seed, ["q_proj"])
    pool = Pool.create(folder / "pool", base)
    pool.build(candidates_in(folder / "loras"), allow_unknown_licence=True)
    pool.index.close()
    return folder / "pool"


@pytest.fixture
def pool(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "pool"))


def refused(pool: Path) -> str:
    """The one message that every command ends with."""
    said = set()
    for words in (["list", pool], ["show", pool, "1"], ["dedupe", pool], ["remove", pool, "1"]):
        done = CliRunner().invoke(cli, ["pool", *map(str, words)])
        assert (done.exit_code, done.exception.__class__) == (1, SystemExit), (words, done.output, done.exception)
        assert done.output.count("Error:") == 1
        said.add(done.output)
    assert len(said) == 1
    return said.pop()


def altered(pool: Path, *statements: str) -> None:
    file = sqlite3.connect(pool / "pool.sqlite", isolation_level=None)
    for statement in ("PRAGMA writable_schema = ON", *statements):
        file.execute(statement)
    file.close()


SCHEMAS = {
    "a view": (f"CREATE VIEW v AS {ENDLESS} SELECT x FROM n",),
    "a view for a table": ("DROP TABLE facts", f"CREATE VIEW facts AS {ENDLESS} SELECT 'schema' key, x value FROM n"),
    "a view of a view": ("DROP TABLE base", "CREATE VIEW base AS SELECT * FROM base"),
    "a trigger": ("CREATE TRIGGER t AFTER INSERT ON facts BEGIN DELETE FROM adapters; END",),
    "an index on an expression": ("CREATE INDEX i ON adapters (abs(rank))",),
    "a table too many": ("CREATE TABLE t (a)",),
    "a table too few": ("DROP TABLE findings",),
    "a column less": ("ALTER TABLE adapters DROP COLUMN kind",),
    "a generated column": ("ALTER TABLE base ADD COLUMN g AS (target || target)",),
    "words that are none": ("UPDATE sqlite_master SET sql = 'CREATE TABLE base (' WHERE name = 'base'",),
    "other words": ("UPDATE sqlite_master SET sql = 'CREATE TABLE base (target, norm)' WHERE name = 'base'",),
    "another page": ("UPDATE sqlite_master SET rootpage = 2 WHERE name = 'base'",),
    "a name of bytes": ("UPDATE sqlite_master SET name = x'ff' WHERE name = 'base'",),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEMAS)
def test_schemas(pool: Path, case: str) -> None:
    altered(pool, *SCHEMAS[case])
    assert "pool.sqlite: is " in refused(pool)


VALUES = {
    "verdict": ("UPDATE adapters SET verdict = 'splendid'", "verdict"),
    "bytes for a text": ("UPDATE adapters SET owner = x'00'", "owner"),
    "no UTF-8": ("UPDATE adapters SET owner = CAST(x'ff' AS TEXT)", "UTF-8"),
    "a text for a number": ("UPDATE adapters SET size = 'large'", "size"),
    "a text for a norm": ("UPDATE adapters SET norm = 'large'", "norm"),
    "a short sketch": ("UPDATE adapters SET sketch = x'0011'", "sketch"),
    "a folder elsewhere": ("UPDATE adapters SET folder = '../../secret'", "folder"),
    "an absolute folder": ("UPDATE adapters SET folder = '/etc'", "folder"),
    "a folder within": ("UPDATE adapters SET folder = 'adapters/0123456789abcdef/..'", "folder"),
    "figures": ("UPDATE adapters SET figures = '{'", "not valid JSON"),
    "deep figures": (f"UPDATE adapters SET figures = '{'[' * 9000}'", "not valid JSON|nested too deeply"),
    "a figure": ("UPDATE adapters SET figures = '{\"relative_norm\": []}'", "figure"),
    "a reason": ("INSERT INTO findings SELECT name, 'x', 'ok', x'00' FROM adapters", "finding"),
    "a finding's verdict": ("INSERT INTO findings SELECT name, 'x', 'y', 'z' FROM adapters", "verdict"),
    "a huge value": ("UPDATE adapters SET owner = zeroblob(100000000)", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values(pool: Path, case: str) -> None:
    statement, told = VALUES[case]
    altered(pool, statement)
    with pytest.raises(FormatError, match=rf"pool\.sqlite: .*({told})"):
        Pool(pool).index.entries()
    assert "pool.sqlite: " in refused(pool)


def test_facts(pool: Path) -> None:
    altered(pool, "INSERT OR REPLACE INTO facts VALUES ('owner_cap', 'many'), ('smoke_limits', '[1]')")
    with pytest.raises(FormatError, match="owner_cap is 'many'"):
        Pool(pool).dedupe()
    altered(pool, "UPDATE facts SET value = '2' WHERE key = 'schema'")
    assert "has the schema 2, and this version reads 1: use a newer one" in refused(pool)


def test_pages_that_were_altered(pool: Path) -> None:
    """Bytes of every part of the file, at random: read or refused, in bounded time, with no other error."""
    path, chance = pool / "pool.sqlite", random.Random(5)
    whole, read = path.read_bytes(), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: len(data) if chance.random() < 0.9 else chance.randrange(len(data))])
        try:
            opened = Pool(pool)
            opened.index.entries()
            opened.index.base_norms()
            read += 1
        except MergingError as error:
            assert "pool" in str(error)
    assert read < 140


def test_a_page_that_is_its_own_child(pool: Path) -> None:
    """A tree of pages in a circle would be walked for ever."""
    path = pool / "pool.sqlite"
    data = bytearray(path.read_bytes())
    size, page = int.from_bytes(data[16:18], "big"), 3
    start = (page - 1) * size
    data[start : start + 12] = bytes([5, 0, 0, 0, 0, size >> 8, size & 255, 0]) + page.to_bytes(4, "big")
    path.write_bytes(data)
    assert "is damaged" in refused(pool)


@pytest.mark.parametrize("name", ["pool.sqlite", "adapters", ".lock", "pool.sqlite-journal", "pool.sqlite-wal"])
def test_parts_that_are_links(pool: Path, tmp_path: Path, name: str) -> None:
    """A linked folder of adapters would be emptied by the next command that writes."""
    elsewhere = tmp_path / "elsewhere"
    if (pool / name).exists():
        shutil.move(pool / name, elsewhere)
    (pool / name).symlink_to(elsewhere)
    if name == "adapters":
        (elsewhere / "precious").write_text("mine")
    with pytest.raises(FormatError, match=f"{name}: is a link"):
        Pool(pool).dedupe()
    if name == "adapters":
        assert (elsewhere / "precious").read_text() == "mine"


def _folder(pool: Path) -> Path:
    return next((pool / "adapters").iterdir())


def _file(pool: Path) -> Path:
    return next(_folder(pool).glob("*.safetensors"))


@pytest.mark.parametrize("part", [_folder, _file])
def test_adapters_that_are_links(pool: Path, tmp_path: Path, part: Callable[[Path], Path]) -> None:
    path = part(pool)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="is a link"):
        for entry in Pool(pool).index.entries():
            entry.place(pool)
    done = CliRunner().invoke(cli, ["pool", "dedupe", str(pool)])
    assert done.exit_code == 1 and "is a link" in done.output


def test_a_strange_link_goes_and_its_target_and_what_is_not_ours_stay(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (pool / "adapters" / "0123456789abcdef").symlink_to(tmp_path / "precious")
    (pool / "adapters" / ".new.abcd_123").symlink_to(tmp_path / "precious")
    (pool / "adapters" / "my notes").mkdir()
    Pool(pool).dedupe()
    kept = [Path(str(entry.folder)).name for entry in Pool(pool).index.entries()]
    assert sorted(path.name for path in (pool / "adapters").iterdir()) == sorted([*kept, "my notes"])
    assert (tmp_path / "precious" / "file").exists()


def test_companions_that_are_links_are_not_kept(pool: Path, tmp_path: Path) -> None:
    """An adapter whose licence leads elsewhere is noted as rejected, and no file of it is copied."""
    (tmp_path / "secret").write_text("secret")
    source = train(tmp_path / "lora", Path(Pool(pool).base), 7, ["q_proj"])
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    Pool(pool).build(candidates_in(source))
    entry = Pool(pool).index.entry(str(source))
    assert (entry.verdict, entry.folder) == ("rejected", None)
    assert "LICENSE: is a link out of its folder" in entry.findings[0].reason
    assert len(list((pool / "adapters").iterdir())) == 2
