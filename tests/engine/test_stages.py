"""Recipes among the models of a recipe: the bytes of stages run by hand, with neither files nor more memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import merging
from merging.display.tables import format_size
from merging.errors import InputError, MergingError, OptionError, OutputError
from merging.plan.stages import all_stages
from support.commands import ok, refused
from support.peaks import peak_of
from support.tiny import CONFIG, adapters, checkpoint, identical, load, model, save

Values = dict[str, Any]

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process takes")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base, tuned0, tuned1 and tuned2, and two adapters of ``lora/base``."""
    checkpoint(tmp_path, 3, layers=2, width=24, vocab=40)
    adapters(tmp_path / "lora", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(values: Values, output: str, **options: Any) -> dict[str, torch.Tensor]:
    merging.load_recipe(json.dumps(values)).run(output, overwrite=True, **options)
    return load(Path(output))


def preview(values: Values) -> Any:
    recipe = merging.load_recipe(json.dumps(values))
    return merging.preview(recipe.models, method=recipe.method, base=recipe.base)


def fill(values: Values, stage: Any) -> Values:
    """The same recipe with ``@`` replaced by a stage, or by the folder that it was written to."""
    if isinstance(values, list):
        return [fill(each, stage) for each in values]
    if isinstance(values, dict):
        return {key: fill(value, stage) for key, value in values.items()}
    return stage if values == "@" else values


TWO = ["tuned0", "tuned1"]
STAGES: dict[str, tuple[Values, bool]] = {
    "linear": ({"models": TWO, "method": "linear", "dtype": "bfloat16"}, True),
    "task_arithmetic": ({"models": TWO, "method": "task_arithmetic", "base": "base"}, True),
    "slerp": ({"models": TWO, "method": "slerp", "parameters": {"t": "0.2:0.8"}}, True),
    "random": ({"models": TWO, "method": "dare_ties", "base": "base", "parameters": {"drop": 0.5}}, True),
    "by rows": ({"models": TWO, "method": "nuslerp", "parameters": {"axis": "rows"}}, True),
    "statistics": ({"models": TWO, "method": "ties", "base": "base", "parameters": {"density": 0.5}}, False),
    "decomposed": ({"models": TWO, "method": "tsv", "base": "base"}, False),
    "rescaled": ({"models": TWO, "method": "lines+slerp", "base": "base"}, False),
    "layers": ({"stack": [{"model": "tuned0", "layers": "0:1"}, {"model": "tuned1", "layers": "1:2"}]}, True),
}
OUTER: dict[str, Values] = {
    "linear": {"models": ["@", "tuned2"], "method": "linear"},
    "ties": {"models": ["@", "tuned2"], "method": "ties", "base": "base", "parameters": {"density": 0.3}},
    "random": {"models": ["@", "tuned2"], "method": "dare+task_arithmetic", "base": "base"},
    "base": {"models": ["tuned2"], "method": "task_arithmetic", "base": "@", "parameters": {"scale": 0.5}},
    "twice": {"models": ["@", "tuned2", "@"], "method": "karcher"},
    "stack": {"stack": [{"model": "tuned2", "layers": "0:2"}, {"model": "@", "layers": "1:2", "scale": 0.5}]},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("outer", OUTER)
def test_the_bytes_of_stages_by_hand(folder: Path, stage: str, outer: str) -> None:
    values, lazy = STAGES[stage]
    run(values, "stage")
    by_hand = run(fill(OUTER[outer], "stage"), "by-hand", threads=1)
    nested = fill(OUTER[outer], values)
    (planned,) = preview(nested).stages or [None]
    assert planned is None or planned.lazy == lazy
    for threads in (1, 3):
        assert identical(run(nested, "nested", threads=threads), by_hand)
    for name in ("config.json",):
        assert (folder / "nested" / name).read_bytes() == (folder / "by-hand" / name).read_bytes()
    assert sorted(each.name for each in folder.iterdir()) == [
        *("base", "by-hand", "lora", "nested", "stage", "tuned0", "tuned1", "tuned2"),
    ]


@pytest.mark.parametrize("stage", ["linear", "slerp", "random", "statistics"])
def test_the_bytes_of_large_stages_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Of tensors of several tiles, which end elsewhere than a row does."""
    checkpoint(tmp_path, 3, layers=2, width=700, vocab=1000)
    monkeypatch.chdir(tmp_path)
    run(STAGES[stage][0], "stage")
    for outer in ("linear", "ties"):
        by_hand = run(fill(OUTER[outer], "stage"), "by-hand", threads=1)
        assert identical(run(fill(OUTER[outer], STAGES[stage][0]), "nested", threads=2), by_hand)


LORAS = ["lora/adapter0", "lora/adapter1"]


@pytest.mark.parametrize(
    ("values", "lazy"),
    [
        ({"method": "linear"}, True),
        ({"method": "task_arithmetic", "parameters": {"scale": 0.7}}, True),
        ({"method": "lines+task_arithmetic"}, True),
        ({"method": "slerp"}, True),
        ({"method": "ties", "parameters": {"density": 0.5}}, False),
        ({"method": "knots+ties"}, False),
    ],
)
def test_adapters_that_are_baked_in_a_stage(folder: Path, values: Values, lazy: bool) -> None:
    """The form of mergekit's ``model+lora``."""
    stage = {"models": LORAS, "base": "lora/base", "as": "model", **values}
    run(stage, "stage")
    outer = {"models": ["@", "lora/base"], "method": "linear"}
    by_hand = run(fill(outer, "stage"), "by-hand")
    nested = fill(outer, stage)
    assert [each.lazy for each in preview(nested).stages] == [lazy]
    assert identical(run(nested, "nested", threads=2), by_hand)


@pytest.mark.parametrize("method", ["linear", "ties", "svd"])
def test_adapters_of_adapters(folder: Path, method: str) -> None:
    """A stage that makes an adapter is like its single file, whose rank is not padded."""
    stage = {"models": LORAS, "base": "lora/base", "method": method}
    run(stage, "stage.safetensors")
    for more in ({}, {"base": "lora/base", "as": "model"}):
        outer = {"models": ["@", LORAS[1]], "method": "linear", **more}
        by_hand = run(fill(outer, "stage.safetensors"), "by-hand")
        assert identical(run(fill(outer, stage), "nested"), by_hand)
    with safe_open(folder / "nested" / "model.safetensors", "pt") as opened:
        stated = json.loads(opened.metadata()["merging_recipe"])
    assert stated["models"][0] == {"models": LORAS, "method": method, "base": "lora/base"}


THREE = {
    "models": [
        {"models": [STAGES["statistics"][0], "tuned2"], "method": "slerp"},
        {"models": [STAGES["linear"][0], {"models": [STAGES["statistics"][0]], "method": "passthrough"}],
         "method": "linear"},
    ],
    "method": "dare_ties",
    "base": "base",
}  # fmt: skip


def test_a_stage_that_is_named_twice_is_computed_once(folder: Path) -> None:
    """A tree of stages is a graph: what is written twice is one stage, after those that it needs."""
    stages = all_stages(preview(THREE).stages)
    assert [(stage.name, stage.lazy) for stage in stages] == [
        ("models.0.models.0", False),
        ("models.0", True),
        ("models.1.models.0", True),
        ("models.1.models.1", True),
        ("models.1", True),
    ]
    for number, stage in enumerate((STAGES["statistics"][0], STAGES["linear"][0])):
        run(stage, f"s{number}")
    run({"models": ["s0", "tuned2"], "method": "slerp"}, "s2")
    run({"models": ["s1", "s0"], "method": "linear"}, "s3")
    by_hand = run({**THREE, "models": ["s2", "s3"]}, "by-hand")
    assert identical(run(THREE, "nested", threads=2), by_hand)


def test_stages_are_kept(folder: Path) -> None:
    (folder / "three.yml").write_text(json.dumps(THREE))
    ok("run", "three.yml", "-o", "plain")
    ok("run", "three.yml", "-o", "out", "--keep-stages", "stages")
    names = ["models.0", "models.0.models.0", "models.1", "models.1.models.0", "models.1.models.1"]
    assert sorted(each.name for each in (folder / "stages").iterdir()) == names
    assert identical(load(folder / "out"), load(folder / "plain"))
    assert identical(load(folder / "stages" / "models.0.models.0"), run(STAGES["statistics"][0], "by-hand"))
    for name in ("config.json", "README.md"):
        kept = (folder / "stages" / "models.0.models.0" / name).read_bytes()
        assert kept == (folder / "by-hand" / name).read_bytes()
    said = refused("run", "three.yml", "-o", "other", "--keep-stages", "stages")
    assert "models.0.models.0: exists already" in said
    assert not (folder / "other").exists()
    ok("run", "three.yml", "-o", "out", "--keep-stages", "stages", "--overwrite")
    (folder / "flat.yml").write_text("{models: [tuned0], method: passthrough}")
    assert "keeps recipes among the models, and there is none" in refused("run", "flat.yml", "--keep-stages", "stages")


@pytest.mark.parametrize(("output", "stages"), [("out", "out"), ("out", "out/kept"), ("kept/models.0/out", "kept")])
def test_stages_are_not_kept_in_the_output(folder: Path, output: str, stages: str) -> None:
    (folder / "three.yml").write_text(json.dumps(THREE))
    said = refused("run", "three.yml", "-o", output, "--keep-stages", stages)
    assert "would be one in the other" in said
    assert not (folder / "out").exists()
    assert not (folder / "kept").exists()


def test_a_killed_process_leaves_its_folder_to_the_next(folder: Path) -> None:
    """The folder of configs and tokenizers of stages, in the system's temporary folder."""
    (folder / "tmp").mkdir()
    (folder / "killed.py").write_text(
        "import json, os, merging\n"
        f"merging.preview([merging.Recipe(**{STAGES['linear'][0]!r}), 'base'], method='slerp')\n"
        "os._exit(9)\n"
    )
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    subprocess.run([sys.executable, "killed.py"], env=environment, check=False)
    (left,) = (folder / "tmp").iterdir()
    subprocess.run([sys.executable, "killed.py"], env=environment, check=False)
    (other,) = (folder / "tmp").iterdir()
    assert other != left


def test_a_dry_run_shows_the_stages_and_computes_nothing(folder: Path) -> None:
    (folder / "three.yml").write_text(json.dumps(THREE))
    shown = ok("run", "three.yml", "-o", "out", "--dry-run").stdout
    size = merging.preview(TWO, method="ties", base="base").out_bytes
    assert f"  disk    {format_size(size)} to set stages aside meanwhile" in shown
    assert "  stage   models.0.models.0: 2 models by ties, set aside, " in shown
    assert "  stage   models.1: 2 models by linear, computed when it is read" in shown
    facts = json.loads(ok("run", "three.yml", "-o", "out", "--dry-run", "--json").stdout)
    assert facts["set_aside_bytes"] >= size
    assert facts["models"] == THREE["models"]
    assert not (folder / "out").exists()


def test_cards_list_the_models_in_files(folder: Path) -> None:
    run(THREE, "out")
    card = (folder / "out" / "README.md").read_text()
    listed = card.split("\n\n")[2:4]
    assert listed[0] == "3 models merged by `dare+ties`:"
    assert [line.split("`")[1] for line in listed[1].splitlines()] == ["tuned0", "tuned1", "base", "tuned2"]
    assert "- base: `base`" in listed[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": [{"models": ["tuned0", "lora/base"], "method": "linear"}], "method": "passthrough"},
         r"^models.0: .*the models do not hold|^models.0: the models have vocabularies"),
        ({"models": ["tuned0", {"models": ["tuned1"], "method": "ties"}], "method": "linear"},
         r"^models.1: ties merges what each model changed .* full checkpoints need this model as base="),
        ({"models": [{"models": [{"models": ["none"], "method": "linear"}], "method": "linear"}], "method": "linear"},
         r"^models.0.models.0: none: there is no such file or folder"),
        ({"models": [{"models": ["tuned0"], "method": "linear", "rank": 3}], "method": "linear"},
         r"^models.0: rank=: only a merged adapter has ranks"),
        ({"models": ["tuned0"], "method": "linear", "base": {"models": LORAS, "method": "linear"}},
         r"base \(linear\): is an adapter, and base= wants the full model"),
    ],
)  # fmt: skip
def test_errors_name_the_place(folder: Path, values: Values, message: str) -> None:
    with pytest.raises(MergingError, match=message):
        run(values, "out")
    assert not (folder / "out").exists()


def test_values_that_are_refused_name_the_stage(folder: Path) -> None:
    tensors = load(folder / "tuned1")
    tensors["model.norm.weight"][3] = torch.nan
    save(folder / "tuned1", tensors)
    for stage in ("linear", "statistics"):
        with pytest.raises(InputError, match=r"tuned1.*holds NaN"):
            run(fill(OUTER["linear"], STAGES[stage][0]), "out")
        assert not [each for each in folder.iterdir() if "out" in each.name]


def test_a_stream_of_the_hub_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="stream=True reads each file once"):
        run(fill(OUTER["linear"], STAGES["linear"][0]), "out", stream=True)


def test_progress_runs_to_its_end(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(THREE, "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


# ---- disk and memory


def large(folder: Path) -> list[str]:
    """A base and three fine-tunes of 17 MB, in one unit of work a tensor."""
    random = torch.Generator().manual_seed(0)
    shapes = {f"layers.{layer}.mlp.up_proj.weight": (4100, 1024) for layer in range(2)}
    base = {name: torch.randn(shape, generator=random).to(torch.bfloat16) for name, shape in shapes.items()}
    tuned = [{name: value.roll(number, 0) for name, value in base.items()} for number in (1, 2, 3)]
    return [str(save(folder / str(number), tensors)) for number, tensors in enumerate([base, *tuned])]


@pytest.mark.exhaustive
@LINUX
@pytest.mark.parametrize("lazy", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_three_stages_take_the_memory_of_one(tmp_path: Path, lazy: bool) -> None:
    base, one, two, three = large(tmp_path)
    inner: Values = {"models": [one, two], "method": "linear" if lazy else "ties", "base": base}
    middle: Values = {"models": [inner, three], "method": "task_arithmetic", "base": base}
    options = {"models": [middle, one], "method": "linear", "output": str(tmp_path / "out.safetensors")}
    planned = merging.preview(**options)
    peak = peak_of(options, 1)
    assert peak.taken <= peak.promised == planned.memory(1)
    single = merging.preview([one, two], method="linear" if lazy else "ties", base=base).memory(1)
    assert peak.promised < 2.5 * single


_WATCHED = """
import sys, json, merging
merging.load_recipe(sys.argv[1]).run(sys.argv[2], threads=1)
"""


def size_of(path: Path) -> int:
    """The room of a file on the disk; 0 if it is gone."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def watch(folder: Path, values: Values) -> int:
    """The most bytes on the disk next to an output while it is made, in files without names too."""
    process = subprocess.Popen([sys.executable, "-c", _WATCHED, json.dumps(values), str(folder / "out")])
    most = 0
    while process.poll() is None:
        named = _files_below(folder)
        links = [link for link in Path(f"/proc/{process.pid}/fd").glob("*") if _is_nameless(link, folder)]
        most = max(most, sum(map(size_of, [*named, *links])))
        time.sleep(0.005)
    assert process.returncode == 0
    return most


def _files_below(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.glob(".out.*/**/*") if path.is_file()]
    except OSError:  # a folder was moved meanwhile
        return []


def _is_nameless(link: Path, folder: Path) -> bool:
    try:
        target = str(link.readlink())
    except OSError:
        return False
    return target.startswith(str(folder)) and target.endswith("(deleted)")


@pytest.mark.exhaustive
@LINUX
@pytest.mark.parametrize("aside", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_three_stages_take_the_disk_of_the_output(tmp_path: Path, aside: bool) -> None:
    """Stages that are set aside take the room of one of them at a time."""
    base, one, two, three = large(tmp_path)
    size = 2 * 4100 * 1024 * 2
    inner: Values = {"models": [one, two], "method": "ties" if aside else "slerp"} | ({"base": base} if aside else {})
    middle: Values = {"models": [inner, three], "method": "task_arithmetic", "base": base}
    most = watch(tmp_path, {"models": [middle, one], "method": "linear"})
    assert (1 + aside) * size // 2 < most < (1 + aside) * size + (1 << 20)


@LINUX
def test_a_kill_leaves_nothing_behind(tmp_path: Path) -> None:
    """Of a stage that is set aside nothing has a name; the next merge removes the rest."""
    base, one, two, three = large(tmp_path)
    stage = {"models": [one, two], "method": "ties", "base": base}
    values = json.dumps({"models": [stage, three], "method": "linear"})
    process = subprocess.Popen([sys.executable, "-c", _WATCHED, values, str(tmp_path / "out")])
    while process.poll() is None and not list(tmp_path.glob(".out.*/scratch")):
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".out.*/scratch/*")) == []
    merging.load_recipe(values).run(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "out"]


def test_a_full_disk_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merging.engine import stages

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = threading.active_count()  # other libraries may have threads in this process
    monkeypatch.setattr(stages, "write_at", full)
    with pytest.raises(OutputError, match="a stage cannot be set aside: No space left on device"):
        run(fill(OUTER["linear"], STAGES["statistics"][0]), "out")
    assert not [each for each in folder.iterdir() if "out" in each.name]
    assert threading.active_count() <= before


def test_stages_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice with several sources of mergekit: a merge of layers in a stack, with gradients over these layers."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, model(seed, layers=6), {**CONFIG, "num_hidden_layers": 6})
    parts = [{"model": name, "layers": "2:5"} for name in "ab"]
    middle = {"models": parts, "method": "linear", "parameters": {"weights": ["0:1", "1:0"], "normalize": False}}
    got = run({"stack": [{"model": "a", "layers": "0:2"}, {"model": middle}], "dtype": "float64"}, "out")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    one = {**middle, "models": [{**part, "layers": "3:4"} for part in parts]}
    alone = run({"stack": [{"model": "a", "layers": "0:2"}, {"model": one}, {"model": "b", "layers": "5:6"}]}, "one")
    for place, (source, index) in {2: (a, 3), 3: (b, 5)}.items():  # of one block alone the last point counts
        for name in ("mlp.up_proj.weight", "input_layernorm.weight"):
            want = source[f"model.layers.{index}.{name}"]
            assert torch.allclose(alone[f"model.layers.{place}.{name}"], want, rtol=0, atol=1e-6)
    for place in range(3):
        t = place / 2
        name = "model.layers.{}.mlp.up_proj.weight"
        want = t * a[name.format(place + 2)].double() + (1 - t) * b[name.format(place + 2)].double()
        assert torch.allclose(got[name.format(place + 2)], want, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 5
