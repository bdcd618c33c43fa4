"""A project that uses the package is checked by mypy as its user would: installed, with ``--strict`` and no plugin."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import merging
from support.paths import ROOT

RIGHT = """\
import logging
from pathlib import Path

import torch
from peft import PeftModel

import merging

state = {"w": torch.ones(2, 2)}
change = merging.LowRank(torch.ones(2, 1), torch.ones(1, 2), (2, 2))
full: merging.Delta = merging.Dense(torch.ones(2, 2))


def files() -> merging.Merged:
    plan = merging.preview(["a", Path("b")], method="ties", density=0.3, base="base")
    merging.predict(plan, cluster="nodes=2")
    print(plan.output, len(plan.items), merging.__version__)
    merged: merging.Merged = merging.merge(
        ["a", "b"], method="lines+ties", output=Path("out"), dtype=torch.bfloat16, weights=[1, 0.5], max_memory="1GB",
        density={"mlp": 0.3, "*": "0.2:0.8"}, exclude=["embed"], rank=8, overwrite=True, progress=True,
    )
    baked = merging.bake(["a", Path("b")], output="baked", base="base", weights=[1, 0.5], overwrite=True)
    print(baked.notices)
    again = merging.rerun("out", output="again", overwrite=True)
    print(again.tensors, merged.facts["nu"], merged.to_dict())
    print(merging.verify_against_sources("out", sample="all", sources={"a": Path("moved")}).served)
    merging.soup("run", output="mean", last=5, schedule="1-sqrt", dtype="bfloat16", score=lambda path: len(path.name))
    print(merging.suggest(["a", "b"], base="base", max_memory="1GB").parameters)
    lora = merging.extract("a", base="base", rank=64, energy=0.9, size="20MB", norms="base", output="lora")
    print(lora.ranks, merging.resize("lora", rank=8, uniform=True, scale={"mlp": 0.5}, output="small").discarded)
    return merged


def recipes() -> merging.Merged:
    part = merging.LayerPart(model="a", layers="0:4")
    stack = merging.LayerStack(parts=(part,))
    print(stack.to_dict())
    recipe = merging.Recipe(models=["a", "b"], method="linear", base="base", rank=4)
    print(recipe == merging.load_recipe(recipe.to_yaml()), merging.load_recipe(Path("recipe.yml")).models)
    return recipe.run(output="out", overwrite=True)


def tensors() -> dict[str, torch.Tensor]:
    weight = torch.tensor(0.5, requires_grad=True)
    deltas = merging.merge_deltas([{"w": change}, {"w": full}], method="task_arithmetic", scale=weight)
    states, config = merging.peft_state_dict(deltas, rank=2)
    print(merging.peft_deltas(states, config)["w"].dense().shape, config["r"])
    return merging.merge_state_dicts([state, state], method=merging.chain("linear", {"weights": [1, 2]}))


def adapters(model: PeftModel) -> None:
    merging.merge_peft(model, ["a", "b"], method="linear", adapter_name="both", rank=8)


def stores() -> None:
    store = merging.ContinualStore.create("store", base="base", method="opcm", alpha=0.5)
    step = store.add("a", keep=2)
    if step is not None:
        print(step.number, step.source)
    print(store.export("out", kind="adapter").rank, store.log()[0].norm)


def others() -> None:
    comparison = merging.compare(["a", "b"], base="base", signs="all", full_spectra=True)
    print(comparison.cosines[0][1], comparison.models[0].name)
    print(merging.compress("a", "pack.safetensors", density=0.1).ratio)
    experts = [{"source_model": "a", "positive_prompts": ["one"]}, {"source_model": "b", "positive_prompts": ["two"]}]
    print(merging.make_moe({"base_model": "base", "experts": experts}, "mixture").experts)
    print(merging.decompress("pack.safetensors", "unpacked").kind)
    recycled: merging.Recycled = merging.recycle(["a"], base="base", train=[{"text": "a", "label": "b"}], steps=5)
    found: merging.Found = merging.search(["a"], base="base", data=[{"text": "a", "label": "b"}], budget=9)
    print(found.winner, found.recipe.models)
    gathered: merging.CollectedStatistics = merging.collect_statistics("a", "t.jsonl", "s.safetensors", fisher="labels")
    print(gathered.key, gathered.layers)
    print(merging.collect_merged_statistics(["a", "b"], ["t.jsonl", "u.jsonl"], "stats", base="base")[0].key)
    print(recycled.rank, recycled.report.to_dict(), merging.METHODS["ties"].summary)


@merging.method("halved", needs="element")
def halved(deltas: torch.Tensor, *, scale: float = 0.5) -> torch.Tensor:
    return deltas.mean(0) * scale


print(merging.merge_state_dicts([state], base=state, method=halved(scale=0.25)))

try:
    files()
except merging.OptionError as error:
    logging.getLogger("merging").warning(str(error))
except (merging.FormatError, merging.InputError, merging.OutputError, merging.MergingError, merging.MergingWarning):
    raise
"""

WRONG = """\
import torch

import merging

state = {"w": torch.ones(2, 2)}
merging.merge("a", method=1)
merging.merge(["a"])
merging.merge(["a"], method="linear", outptu="out")
merging.merge(["a"], method="linear", dtype="int8")
merging.preview([1], method="linear")
merging.bake("a")
merging.rerun(["out"])
merging.soup("run", schedule="sine")
merging.merge_state_dicts(state, method="linear")
merging.merge_deltas([state], method="linear")
merging.merge_peft("model", "a", method="linear", rank="8")
merging.peft_deltas(["w"], {})
merging.peft_state_dict({"w": torch.ones(2, 2)})
merging.chain(["linear"])
merging.load_recipe(["a"])
merging.Recipe(models=3, method="linear")
merging.Recipe(models=["a"], method="linear", rnak=3)
merging.LayerPart(model=3)
merging.LayerStack(parts=3)
merging.Dense([1.0])
merging.LowRank(torch.ones(2, 1), torch.ones(1, 2), 4)
merging.compare(["a"], signs="some")
merging.compare(["a"], bse="base")
merging.compress("a", "out", method="zip")
merging.decompress(["pack"], "out")
merging.make_moe(3, "out")
merging.ContinualStore.create("store")
merging.ContinualStore("store").add(3)
merging.method("name", needs="columns")
merging.recycle("pool", base="base")
merging.METHODS["ties"].summry
merging.nothing
x: int = merging.merge(["a"], method="linear").path
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the package installed, next to everything that is installed here."""
    folder = tmp_path_factory.mktemp("user") / "env"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(ROOT / "merging", site / "merging", ignore=shutil.ignore_patterns("__pycache__"))
    others = [path for path in sys.path if "site-packages" in path and Path(path).is_dir()]
    (site / "others.pth").write_text("\n".join(others), encoding="utf-8")
    return folder / "bin" / "python"


def check(python: Path, folder: Path, text: str) -> tuple[int, str]:
    """Return the exit code of mypy on a file with this text, and its output."""
    (folder / "project.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    command += ["--cache-dir", str(python.parent / "cache"), "--no-error-summary", "project.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.exhaustive
def test_right_calls_pass_and_wrong_ones_are_reported(python: Path, tmp_path: Path) -> None:
    assert check(python, tmp_path, RIGHT) == (0, "")
    code, output = check(python, tmp_path, WRONG)
    assert code == 1
    reported = {int(line) for line in re.findall(r"^project\.py:(\d+): error", output, re.MULTILINE)}
    silent = [line for number, line in enumerate(WRONG.splitlines(), 1) if number > 5 and number not in reported]
    assert not silent, output


def test_every_public_name_is_used() -> None:
    for name in merging.__all__:
        assert re.search(rf"\bmerging\.{name}\b", RIGHT), name
