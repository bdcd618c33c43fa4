"""Every public object shows itself in a line or a small table, whatever strangers called their models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

import merging
from merging.api.inspect import inspect
from merging.api.prototypes import export_prototypes
from merging.continual.layer_spectra import LayerSpectrum
from merging.continual.watch import Event
from merging.display.tables import Displayed, Table
from merging.geometry import sign_agreement
from merging.maths.delta import Stack
from merging.maths.site import Site
from merging.pool import Built, Entry, Finding, Pool
from merging.pool.candidates import candidates_in
from merging.recycling import Recycled, Report, Row, Settings, Verdict
from merging.recycling.bootstrap import Gap
from merging.searches.report import ComparedRow, SearchReport, TrialRow
from merging.searches.workflow import Found
from merging.serving import verify
from merging.sources.stored import open_safetensors
from support.tiny import adapters, checkpoint, fine_tune, model, save

HOSTILE = "<img src=x onerror=alert(1)>&\x1b[31m\u202e\n\ud800"
NAME = "<img src=x onerror=alert(1)>&\x1b[31m\u202e"
LONGEST_LINE, LONGEST, LINES, LONGEST_HTML = 2500, 5000, 30, 15_000

PACKAGES = ("", ".compression", ".continual", ".geometry", ".pool", ".recycling", ".serving", ".api.inspect")
TAGS = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


def public_classes() -> dict[str, type]:
    found = {}
    for package in PACKAGES:
        module = import_module(f"merging{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and not issubclass(value, (Exception, Warning)):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def _search_report() -> SearchReport:
    trial = TrialRow(HOSTILE * 100, 1, 0.5, "50%", 30, True, 0.1, "")
    row = ComparedRow(HOSTILE * 100, HOSTILE * 100, 0.5, "50%", ("50%",), Gap(0.1, 0.0, 0.2))
    return SearchReport((trial,) * 300, (row,) * 5, True, "accuracy", (HOSTILE,), 0.01, HOSTILE * 300)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Results of all public functions, on models with hostile names, and records full of such texts."""
    place = tmp_path_factory.mktemp("display")
    base, made = adapters(place / "made", 3)
    lora = [Path(shutil.copytree(path, place / f"{number}{NAME}")) for number, path in enumerate(made)]
    full = [save(place / f"full{number}{NAME}", fine_tune(model(layers=2, width=16), number)) for number in range(2)]
    out = place / NAME
    options: dict[str, Any] = {"base": base, "allow_different_bases": True}
    store = merging.ContinualStore.create(place / f"store{NAME}", base=base)
    empty = repr(store)
    steps = [store.add(path, allow_different_bases=True) for path in lora]
    pool = Pool.create(place / f"pool{NAME}", base, ["tiny/base"])
    built = pool.build(candidates_in(place / "made"))
    pack = merging.compress(lora[0], place / "pack.safetensors")
    deltas = [
        merging.peft_deltas(
            open_tensors(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())
        )
        for path in lora
    ]
    row = Row(HOSTILE * 100, HOSTILE * 100, 0.5, 0.5, Gap(0.1, 0.0, 0.2))
    report = Report(
        (row,) * 300, Verdict(False, HOSTILE * 300), "accuracy", True, {"train": 5}, notices=(HOSTILE,) * 50
    )
    finding = Finding(HOSTILE, "rejected", HOSTILE * 300)
    merged = merging.merge(lora, method="ties", output=out, rank=1, **options)
    return [
        empty,
        merged,
        merging.preview(full, method="lines+ties", base=base),
        merging.preview(lora, method="linear", **options),
        merging.predict(merging.preview(full, method="ties", base=base), cluster="nodes=2,gpus=1"),
        merging.load_recipe("models: [a, b]\nmethod: lines+ties\nexclude: ['<script>']"),
        merging.load_recipe("stack: [{model: a, layers: '0:2'}, {model: '<script>', layers: '1:2'}]").models[0],
        merging.chain("lines+ties", {"weights": [0.1] * 300}),
        merging.chain("task_arithmetic", {"weights": torch.ones(300, requires_grad=True)}),
        merging.chain("ties").required_statistics(),
        merging.METHODS,
        merging.compare(lora, **options),
        merging.compare(full, base=base, intruders=True, signs="all"),
        merging.suggest(lora, **options),
        Found(out, HOSTILE, merging.Recipe(models=("a",), method="linear"), _search_report()),
        sign_agreement(lora, **options),
        pack,
        merging.decompress(pack.path, place / "unpacked"),
        export_prototypes(lora, place / "prototypes.safetensors", allow_different_bases=True),
        merging.merge_deltas(deltas, method="linear"),
        merging.LowRank(torch.ones(4, 1), torch.ones(1, 6), (4, 6)),
        merging.Dense(torch.ones(50, 60)),
        Site("a" * 3000, (4, 4)),
        Stack.of(torch.ones(300, 4, 5)),
        Stack([]),
        store,
        *steps,
        store.log(),
        store.manifest(),
        store.verify(),
        store.fetch(lora[0]),
        store.fetch(full[0], allow_different_bases=True),
        Event("refused", HOSTILE, reason=HOSTILE * 300),
        LayerSpectrum(None, 5, 0.1, 0.2, 0.3),
        pool,
        built,
        Built(3, {"ok": 3}),
        pool.index.entries(),
        Entry(
            HOSTILE * 100,
            findings=(finding,) * 300,
            figures={f"{HOSTILE}{n}": n for n in range(300)},
            sketch=b"x" * 999,
        ),
        finding,
        verify(str(lora[0])),
        inspect(lora[0]),
        inspect(full[0], values=True),
        Settings(target_lora=HOSTILE * 300),
        report,
        Recycled(Path(HOSTILE[:-1]), 8, 0.5, report),
        merging.CollectedStatistics(
            path=Path(HOSTILE[:-1]),
            model=HOSTILE * 100,
            key="k",
            layers=3,
            examples=2,
            tokens=9,
            fisher=None,
            bytes=7,
            seconds=0.1,
        ),
        open_safetensors(full[0] / "model.safetensors")[0],
    ]


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in open_safetensors(path)[0].items()}


def reachable(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the objects of this package that a value holds."""
    if depth == 0:
        return
    if isinstance(value, Displayed):
        yield value
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (tuple, list)):
        inner = list(value)
    elif is_dataclass(value):
        inner = [getattr(value, each.name) for each in fields(value)]
    else:
        inner = [getattr(value, name) for name in type(value).model_fields] if isinstance(value, BaseModel) else []
    for each in inner[:8]:
        yield from reachable(each, depth - 1)


class Checker(HTMLParser):
    """A parser of a fragment that may have no tag but those of tables, and no attribute but a style."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        assert all(name == "style" and (value or "").startswith("text-align: ") for name, value in attrs)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_repr(text: str) -> None:
    assert 0 < len(text) <= LONGEST, text
    lines = text.split("\n")
    assert len(lines) <= LINES, text
    assert max(map(len, lines)) <= LONGEST_LINE, text
    assert all(line.isprintable() for line in lines), text
    assert "object at" not in text
    assert " at 0x" not in text


def check_html(html: str) -> None:
    assert len(html) <= LONGEST_HTML, len(html)
    parser = Checker()
    parser.feed(html)
    parser.close()
    assert not parser.open
    assert parser.text.replace("\n", "").isprintable()


def test_results_show_themselves(shown: list[Any]) -> None:
    checked = [each for result in shown for each in reachable(result)]
    assert len(checked) > 150
    for each in checked:
        check_repr(repr(each))
        check_repr(str(each))
        check_html(each._repr_html_())
    assert any(NAME.partition("\x1b")[0] in repr(each) for each in checked)
    assert any("&lt;img" in each._repr_html_() for each in checked)


def test_all_public_classes_are_among_them(shown: list[Any]) -> None:
    """A new class of a package's ``__all__`` must be added to the results above."""
    seen = {kind for result in shown for each in reachable(result) for kind in type(each).__mro__}
    assert [name for name, kind in public_classes().items() if kind not in seen] == []


def test_a_line_says_the_facts(shown: list[Any]) -> None:
    lines = [repr(each) for each in shown]
    assert "LowRank(shape=(4, 6), rank=1, dtype=torch.float32)" in lines
    assert "Dense(shape=(50, 60), dtype=torch.float32)" in lines
    assert "Stack(models=300, present=300, low_rank=False, shape=(4, 5))" in lines
    assert "Recipe(models=('a', 'b'), method=Lines(then=Ties(" in "".join(lines)
    assert any(line.startswith("Merged(path=") and "kind='adapter', method='ties'" in line for line in lines)


def test_tables_say_how_much_they_leave_out() -> None:
    table = Table("Numbers", ("name", "size"), rows=[(f"n{n}", n) for n in range(300)], notes=["a note"])
    lines = table.text().splitlines()
    assert lines[:3] == ["Numbers", "  name  size", "  n0       0"]
    assert lines[-2:] == ["... and 280 more", "a note"]
    assert "and 280 more" in table.html()
    assert Table("Nothing").text() == "Nothing"


def test_stores_and_pools_that_are_gone_still_show_themselves(tmp_path: Path) -> None:
    base, _ = checkpoint(tmp_path, 0)
    store = merging.ContinualStore.create(tmp_path / "store", base=base)
    assert "0 models by opcm" in repr(store)
    shutil.rmtree(tmp_path / "store")
    assert "is not a store" in repr(store)
    assert "is not a store" in store._repr_html_()


@pytest.mark.parametrize("method", sorted(merging.METHODS))
def test_methods_show_their_parameters(method: str) -> None:
    made = merging.METHODS[method].load()
    assert method in repr(merging.METHODS)
    assert made.__repr__ is not object.__repr__
