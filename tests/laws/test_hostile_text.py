"""Text of strangers in every field that a file can hold, shown by every command: no terminal is sent it as it is."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from merging.cli.main import cli
from merging.continual import ContinualStore
from merging.pool import Pool
from merging.pool.candidates import candidates_in
from support.small_adapter import small_adapter
from support.tiny import checkpoint

HOSTILE = "x\x1b[2J\x07\x9b31m\u202eliv\u2066e\u2028`<b>|\x7f\rERASED\nFORGED: a line of its own\n---\nlicense: forged"
"""Clears the screen, sets a title, turns the order of letters, ends a line, a card, a span of code."""

NAME = HOSTILE.replace("/", "")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no files of such names")


def check_shown(*words: object) -> str:
    """What a command prints on either stream: printable, each line of the program's own, JSON where JSON was asked."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    text = done.stdout + done.stderr
    assert all(each.isprintable() for each in text.split("\n")), (words, text)
    assert not re.search(r"^(FORGED|---|license: forged|ERASED)", text, re.MULTILINE), (words, text)
    if "--json" in words:
        json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return text


def adapter(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A LoRA of the tiny model's up projections, whose card states a licence and a base."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(3):
        path = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, 8, generator=random) * 0.1
        tensors[f"{path}.lora_B.weight"] = torch.randn(16, 2, generator=random) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


FIELDS: dict[str, Any] = {
    "base_model_name_or_path": HOSTILE,
    "revision": HOSTILE,
    "task_type": HOSTILE,
    "peft_type": HOSTILE,
    "bias": HOSTILE,
    "peft_version": HOSTILE,
    "init_lora_weights": HOSTILE,
    "r": HOSTILE,
    "lora_alpha": HOSTILE,
    "target_modules": [HOSTILE, "up_proj"],
    "exclude_modules": HOSTILE,
    "layers_pattern": HOSTILE,
    "modules_to_save": [HOSTILE],
    "target_parameters": [HOSTILE],
    "rank_pattern": {HOSTILE: 3, f"{HOSTILE}(": 3},
    "alpha_pattern": {"up_proj": HOSTILE},
    "loftq_config": {HOSTILE: HOSTILE},
    "auto_mapping": {"base_model_class": HOSTILE, "parent_library": HOSTILE},
    HOSTILE: HOSTILE,
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda name: name if name.isidentifier() else "a key")
def test_fields_of_an_adapter(tmp_path: Path, field: str) -> None:
    """Also of the card and the config of a merge, and of the page of a comparison."""
    folder = adapter(tmp_path / "a", **{field: FIELDS[field]})
    other = adapter(tmp_path / "b", 1, **{field: FIELDS[field]})
    for json_too in ([], ["--json"]):
        check_shown("inspect", folder, *json_too)
        check_shown("verify", folder, *json_too)
        check_shown("compare", folder, other, *json_too)
        check_shown("-m", "linear", folder, other, "-o", tmp_path / "out", "--overwrite", *json_too)
    if (tmp_path / "out").exists():
        plain_card(tmp_path / "out")


def plain_card(folder: Path) -> None:
    """The card is one head of YAML and Markdown without control characters."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(each.isprintable() for each in text.split("\n")), text
    _, head, rest = re.split(r"^---$\n", text, maxsplit=2, flags=re.MULTILINE)
    assert "forged" not in yaml.safe_load(head).get("license", "").partition("\\n")[0]
    assert not re.search(r"^(FORGED|---|license:)", rest, re.MULTILINE), text


def test_names_of_folders_tensors_and_headers(tmp_path: Path) -> None:
    """Every command that names a model, with what it writes."""
    base, tuned = checkpoint(tmp_path)
    one, two = adapter(tmp_path / f"1{NAME}"), adapter(tmp_path / f"2{NAME}", 1)
    (one / "README.md").write_text(yaml.safe_dump_all([{"license": HOSTILE}], explicit_start=True) + "---\n")
    (two / "README.md").write_text(yaml.safe_dump_all([{"license": HOSTILE}], explicit_start=True) + "---\n")
    bare = tmp_path / f"{NAME}.safetensors"
    save_file({HOSTILE: torch.ones(2), f"{HOSTILE}.lora_A.weight": torch.ones(2, 2)}, bare, {HOSTILE: HOSTILE})
    nonfinite = tmp_path / f"n{NAME}"
    shutil.copytree(one, nonfinite)
    tensors = load_file(nonfinite / "adapter_model.safetensors")
    save_file({k: v * float("nan") for k, v in tensors.items()}, nonfinite / "adapter_model.safetensors")
    full = tmp_path / f"f{NAME}"
    shutil.copytree(tuned[0], full)
    pack, out = tmp_path / f"p{NAME}.safetensors", tmp_path / f"o{NAME}"
    commands: list[list[object]] = [
        ["inspect", one, two, bare, full],
        ["inspect", nonfinite, "--values"],
        ["verify", one, "--base", base],
        ["verify", bare],
        ["verify", nonfinite, "--values"],
        ["compare", one, two, "--html", tmp_path / "page.html"],
        ["compare", nonfinite, one],
        ["route", one, two, "-o", tmp_path / f"r{NAME}.safetensors"],
        ["compress", one, "-o", pack],
        ["inspect", pack],
        ["decompress", pack, "-o", tmp_path / f"d{NAME}"],
        ["-m", "linear", one, two, "-o", out],
        ["-m", "linear", one, two, "-o", out, "--dry-run"],
        ["-m", "linear", one, two, "--recipe-only"],
        ["-m", "ties", one, nonfinite, "-o", out],
        ["-m", "linear", one, bare, "-o", out],
        ["-m", "linear", full, tuned[1], "-o", tmp_path / f"m{NAME}"],
        ["run", tmp_path / NAME],
        ["push", one, "me/x"],
        ["recycle", tmp_path, "--base", base, "--train", tmp_path / NAME],
        ["pool", "list", tmp_path / NAME],
        ["continual", "status", tmp_path / NAME],
        ["inspect", tmp_path / f"nothing{NAME}"],
        ["-m", "linear", f"nothing{NAME}"],
        ["methods", NAME],
    ]
    for words in commands:
        text = check_shown(*words)
        assert "\\x1b" in text or "--recipe-only" in words or "recycle" in words or "push" in words, (words, text)
        if words[0] not in ("methods", "run") and "--recipe-only" not in words and "-o" not in words:
            check_shown(*words, "--json")
    for folder in (out, tmp_path / f"m{NAME}"):
        plain_card(folder)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(each.isprintable() for each in page.split("\n"))
    assert "<b>" not in page
    recipe = yaml.safe_load(CliRunner().invoke(cli, ["-m", "linear", str(one), str(two), "--recipe-only"]).stdout)
    assert recipe["models"] == [str(one), str(two)], "YAML's own escapes keep the names"


def leaves(value: Any, put: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """How to replace each text of a JSON value."""
    if isinstance(value, str):
        yield put
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(each, lambda text, value=value, key=key: value.__setitem__(key, text))  # type: ignore[misc]


def test_every_text_of_a_manifest(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path)
    made = ContinualStore.create(tmp_path / "store", base=base, method="opcm")
    made.add(tuned[0], threads=1)
    facts = json.loads((tmp_path / "store" / "manifest.json").read_text())
    facts["steps"][0]["notices"] = ["a note"]
    facts["steps"][0]["licence"] = facts["steps"][0]["stated_base"] = "known"
    facts["refused"] = [{"source": "s", "fingerprint": "f", "reason": "r", "time": facts["steps"][0]["time"]}]
    del facts["checksum"]
    text = json.dumps(facts)
    count = len(list(leaves(facts, print)))
    assert count > 15
    seen = 0
    for place in range(count):
        poisoned = json.loads(text)
        list(leaves(poisoned, print))[place](HOSTILE)
        (tmp_path / "store" / "manifest.json").write_text(json.dumps(poisoned))
        for command in ("status", "log", "verify"):
            seen += "\\x1b" in check_shown("continual", command, tmp_path / "store")
            check_shown("continual", command, tmp_path / "store", "--json")
        seen += "\\x1b" in check_shown("continual", "add", tmp_path / "store", tuned[0])
        seen += "\\x1b" in check_shown("continual", "export", tmp_path / "store", "-o", tmp_path / "out", "--overwrite")
        if (tmp_path / "out" / "README.md").exists():
            plain_card(tmp_path / "out")
    assert seen >= 10, "names, bases, reasons and notices are shown"


def test_every_text_of_a_pool(tmp_path: Path) -> None:
    base, _ = checkpoint(tmp_path)
    one = adapter(tmp_path / "in" / f"1{NAME}")
    (one / "README.md").write_text(yaml.safe_dump_all([{"license": HOSTILE}], explicit_start=True) + "---\n")
    adapter(tmp_path / "in" / f"2{NAME}", 1, base_model_name_or_path=HOSTILE)
    shutil.copytree(one, tmp_path / "in" / f"3{NAME}")
    place = tmp_path / f"pool{NAME}"
    assert "\\x1b" in check_shown("pool", "build", place, "--base", base, tmp_path / "in")
    Pool.create(tmp_path / "pool", base).build(candidates_in(tmp_path / "in"))
    index = tmp_path / "pool" / "pool.sqlite"
    clean = index.read_bytes()
    with sqlite3.connect(index) as opened:
        columns = [
            (table, column[1])
            for (table,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for column in opened.execute(f"PRAGMA table_info({table})").fetchall()
            if column[2] == "TEXT" and column[1] not in ("folder", "figures", "verdict")  # which are no words
        ]
    opened.close()
    assert len(columns) > 12
    seen = 0
    for table, column in columns:
        index.write_bytes(clean)
        with sqlite3.connect(index) as opened:
            opened.execute("PRAGMA foreign_keys = OFF")
            rows = opened.execute(f"SELECT rowid FROM {table} LIMIT 1").fetchall()
            opened.executemany(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [(HOSTILE, row[0]) for row in rows])
        opened.close()
        for command in ("list", "stats", "dedupe"):
            seen += "\\x1b" in check_shown("pool", command, tmp_path / "pool")
            check_shown("pool", command, tmp_path / "pool", "--json")
        for name in (HOSTILE, f"1{NAME}"):
            seen += "\\x1b" in check_shown("pool", "show", tmp_path / "pool", name)
            check_shown("pool", "audit", tmp_path / "pool", name)
    assert seen >= 10, "names, owners, licences, bases and reasons are shown"


def test_a_shard_whose_name_ends_a_line(tmp_path: Path) -> None:
    """In an error too each line is the program's own."""
    (tmp_path / "config.json").write_text("{}")
    index = {"metadata": {}, "weight_map": {"w": "con\nFORGED: a line of its own"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert r"its shard con\nFORGED: a line of its own is missing" in check_shown("inspect", tmp_path)


def test_texts_without_end_are_shortened(tmp_path: Path) -> None:
    """Of a text of a stranger's its beginning, its end and its length are printed; JSON holds it in full."""
    base, _ = checkpoint(tmp_path / "models", 1)
    long = "long " * 20_000
    made = adapter(tmp_path / "adapter", base_model_name_or_path=long, rank_pattern={long: 2}, revision=long)
    (made / "README.md").write_text(f"---\nlicense: {long}\n---\n")
    Pool.create(tmp_path / "pool", base, ["tiny/base"]).build(list(candidates_in(made)))
    for words in (
        ("pool", "list", tmp_path / "pool"),
        ("pool", "show", tmp_path / "pool", "adapter"),
        ("verify", made),
        ("inspect", made),
        ("--method", "linear", made, made, "--base", tmp_path / "none", "-o", tmp_path / "out"),
    ):
        text = check_shown(*words)
        assert text and len(text) < 10_000, words
    check_shown("pool", "show", tmp_path / "pool", "adapter", "--json")
    assert "characters)" in check_shown("pool", "show", tmp_path / "pool", "adapter")


def test_names_that_command_a_terminal(tmp_path: Path) -> None:
    name = "base_model.model.layers.0.\x1b[31mq"
    path = small_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "org/\x1b[2Jbase"})
    tensors = {f"{name}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(tensors, path / "adapter_model.safetensors")
    shown = CliRunner().invoke(cli, ["inspect", str(path)], color=True).output
    assert r"org/\x1b[2Jbase" in shown and r"\x1b[31mq" in shown and "\x1b" not in shown
