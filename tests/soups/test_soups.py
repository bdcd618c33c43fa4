"""Soups of runs as programs leave them on the disk: found, averaged, scored, and recorded as recipes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import InputError, MergingError, OptionError
from merging.soups.schedules import schedule_weights
from merging.soups.snapshots import find_snapshots
from support.commands import ok, refused
from support.tiny import Tensors, fine_tune, identical, load, model, save

STEPS = (500, 1000, 1500, 2000)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of transformers' Trainer: checkpoints with states of the optimizer that no reader could open."""
    for number, step in enumerate(STEPS):
        folder = save(tmp_path / "run" / f"checkpoint-{step}", fine_tune(model(), number))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            os.mkfifo(folder / name)  # reading one would wait for ever
        (folder / "trainer_state.json").write_text("{")
    save(tmp_path / "run", model())  # the last weights, as the Trainer saves them next to the checkpoints
    (tmp_path / "run" / "tmp-checkpoint-2500").mkdir()
    return tmp_path / "run"


def mean(paths: list[Path], weights: list[float]) -> Tensors:
    models = [load(path) for path in paths]
    return {
        name: sum((weight * each[name].double() for weight, each in zip(weights, models, strict=True)), 0 * value).to(
            value.dtype
        )
        for name, value in models[0].items()
    }


def close(one: Tensors, other: Tensors) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(value, other[name], rtol=0, atol=1e-6) for name, value in one.items())


# ---- checkpoints on the disk


def test_a_run_of_the_trainer(run: Path, tmp_path: Path) -> None:
    """Checkpoint 1000 comes after 500, not before it as its name does; optimizer states are not opened."""
    made = merging.soup(run, output=tmp_path / "soup", schedule="1-sqrt")
    paths = [run / f"checkpoint-{step}" for step in STEPS]
    weights = schedule_weights(STEPS, "1-sqrt")
    assert close(load(tmp_path / "soup"), mean(paths, weights))
    shares = ", ".join(f"checkpoint-{step} {weight:.3g}" for step, weight in zip(STEPS, weights, strict=True))
    assert made.notices[0] == f"soup of 4 checkpoints: {shares}"
    files = sorted(path.name for path in (tmp_path / "soup").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]


def test_a_window(run: Path, tmp_path: Path) -> None:
    merging.soup(run, output=tmp_path / "soup", last=2, until=1700)
    assert close(load(tmp_path / "soup"), mean([run / "checkpoint-1000", run / "checkpoint-1500"], [0.5, 0.5]))


def test_quantized_checkpoints(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for step, scale in ((1, 1.0), (2, 3.0)):
        tensors = {name: torch.ones(16, 8).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), scale)}
        stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        save(tmp_path / f"run/checkpoint-{step}", tensors, {"quantization_config": stated})
    assert "use --dequantize" in refused("soup", tmp_path / "run", "-o", tmp_path / "soup")
    ok("soup", tmp_path / "run", "--dequantize", "-o", tmp_path / "soup")
    assert torch.equal(load(tmp_path / "soup")[name].float(), torch.full((16, 8), 2.0))


def test_a_soup_is_made_again_from_its_recipe(run: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "soup", tmp_path / "again"
    ok("soup", run, "--schedule", "cosine", "--dtype", "bfloat16", "-o", first)
    ok("rerun", first, "-o", again)
    assert identical(load(first), load(again))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    printed = ok("soup", run, "--schedule", "cosine", "--dtype", "bfloat16", "--recipe-only").stdout
    recipe = merging.load_recipe(printed)
    assert recipe.method.chain == "linear"
    assert len(recipe.models) == 4
    assert ok("soup", run, "--dry-run", "-o", tmp_path / "none").stdout.startswith("linear: 4 models into the model ")


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["epoch=0-step=90.ckpt", "epoch=1-step=180.ckpt", "last.ckpt"], [90, 180]),
        (["style-000002.safetensors", "style-000010.safetensors", "style.safetensors"], [2, 10]),
        (["style-step00000100.safetensors", "style-step00000200.safetensors", "style-000001.safetensors"], [100, 200]),
        (["style_000000500.safetensors", "style_000001000.safetensors", "optimizer.pt"], [500, 1000]),
        (["checkpoint-5/", "checkpoint-40/", "global_step7/", "runs/"], [5, 40]),
        (["checkpoint/step-5/", "checkpoint/step-40/", "profile/"], [5, 40]),
        (["epoch_0/", "epoch_1/", "logs/"], [0, 1]),
        (["version_0.txt", "checkpoints/epoch=0-step=9.ckpt", "checkpoints/epoch=0-step=18.ckpt"], [9, 18]),
    ],
)
def test_names_of_training_programs(names: list[str], steps: list[int], tmp_path: Path) -> None:
    for name in names:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    assert [each.step for each in find_snapshots([str(tmp_path)])] == steps


def test_checkpoints_that_cannot_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no checkpoints of a run: folders such as checkpoint-500"):
        find_snapshots([str(tmp_path)])
    for name in ("epoch=0-step=90.ckpt", "epoch=0-step=90-v1.ckpt", "epoch=1-step=90.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"are both of step 90: name the checkpoints to use"):
        find_snapshots([str(tmp_path)])
    (tmp_path / "cat-000001.safetensors").touch()
    (tmp_path / "dog-000001.safetensors").touch()
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    with pytest.raises(InputError, match=r"several models \(cat\.\.\., dog\.\.\.\): name those to average"):
        find_snapshots([str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--last", "1"], "--last 1: a soup is made of at least two checkpoints"),
        (["--last", "5"], "--last 5: there are 4 checkpoints: 500, 1000, 1500, 2000"),
        (["--until", "700"], "of those that were found (500, 1000, 1500, 2000) 1 are left"),
        (["--window", "2"], "--window 2: is for soups that are scored: add --score COMMAND"),
        (["--minimize"], "--minimize: is for soups that are scored"),
        (["--score", "x", "--schedule", "ema"], "--schedule ema: a greedy soup is a mean"),
        (["--score", "x", "--dry-run"], "--dry-run merges nothing"),
        (["--score", "x", "--window", "9"], "--window 9: should be from 2 to the 4 checkpoints that there are"),
        (["--score", "'"], "is no command: No closing quotation"),
        (["--score", " "], "the command is empty"),
        (["--score", "x", "--score-timeout", "0"], "--score-timeout 0.0: should be a number of seconds above 0"),
    ],
)
def test_options_that_are_refused(words: list[str], message: str, run: Path, tmp_path: Path) -> None:
    assert message in refused("soup", run, *words, "-o", tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_named_checkpoints_are_listed_by_name(run: Path, tmp_path: Path) -> None:
    named = [run / f"checkpoint-{step}" for step in (500, 1500)]
    said = refused("soup", *named, "--last", "5", "-o", tmp_path / "soup")
    assert f"--last 5: there are 2 checkpoints: {named[0]}, {named[1]}\n" in said


def test_a_checkpoint_without_weights(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-1000" / "model.safetensors").unlink()
    (run / "checkpoint-1000" / "zero_to_fp32.py").touch()
    with pytest.raises(InputError, match=r"checkpoint-1000: holds the shards of DeepSpeed.*python .*zero_to_fp32\.py"):
        merging.soup(run, output=tmp_path / "soup")
    with pytest.raises(OptionError, match="'weights' is no option of a soup"):
        merging.soup(run, output=tmp_path / "soup", weights=[1])  # type: ignore[call-arg]


# ---- adapters


def lora(folder: Path, seed: int, rank: int = 4) -> Path:
    """An adapter of one matrix, whose checkpoints go on from a common start."""
    folder.mkdir(parents=True)
    start, change = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    shapes = {f"{name}.lora_A.weight": (rank, 16), f"{name}.lora_B.weight": (32, rank)}
    tensors = {
        key: torch.randn(shape, generator=start) + 0.05 * torch.randn(shape, generator=change)
        for key, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "tiny/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (down,), (up,) = ([value for key, value in tensors.items() if part in key] for part in ("lora_A", "lora_B"))
    return (up.double() @ down.double()) * config["lora_alpha"] / config["r"]


def test_adapters_keep_the_rank_of_the_checkpoints(tmp_path: Path) -> None:
    """The mean of the products, cut to their rank as an SVD cuts it; whole with enough rank."""
    paths = [lora(tmp_path / "run" / f"checkpoint-{step}", step) for step in (1, 2, 3)]
    weights = schedule_weights([1, 2, 3], "ema", 0.5)
    want = sum(weight * product(path) for weight, path in zip(weights, paths, strict=True))
    assert isinstance(want, torch.Tensor)
    made = merging.soup(tmp_path / "run", output=tmp_path / "soup", schedule="ema", ema_decay=0.5)
    assert made.rank == 4
    u, s, vh = torch.linalg.svd(want, full_matrices=False)
    assert torch.allclose(product(tmp_path / "soup"), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-4)
    assert 0 < max(made.discarded.values()) < 0.01
    whole = merging.soup(tmp_path / "run", output=tmp_path / "whole", schedule="ema", ema_decay=0.5, rank=12)
    assert whole.rank == 12
    assert torch.allclose(product(tmp_path / "whole"), want, atol=1e-5)


# ---- scores

TARGET = "model.norm.weight"
"""The tensor that the scoring program compares; its distance from a goal is the score."""

SCORER = f"""\
import sys
from pathlib import Path
from safetensors.numpy import load_file
found = load_file(Path(sys.argv[1]) / "model.safetensors")["{TARGET}"]
goal = load_file(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).with_name("goal.safetensors"))["{TARGET}"]
print("loading ...")
print(float(((found - goal) ** 2).sum() ** 0.5))
"""


@pytest.fixture
def scorer(run: Path, tmp_path: Path) -> str:
    """A command that prints the distance from the mean of checkpoints 1000 and 2000."""
    (tmp_path / "score.py").write_text(SCORER)
    goal = mean([run / "checkpoint-1000", run / "checkpoint-2000"], [0.5, 0.5])
    save_file({TARGET: goal[TARGET]}, tmp_path / "goal.safetensors")
    return f"{sys.executable} {tmp_path / 'score.py'}"


def test_a_greedy_soup(run: Path, scorer: str, tmp_path: Path) -> None:
    """Of 4 checkpoints, the two that make up the goal are chosen by their scores."""
    done = ok("soup", run, "--score", scorer, "--minimize", "-o", tmp_path / "soup", "--json")
    assert close(load(tmp_path / "soup"), mean([run / "checkpoint-1000", run / "checkpoint-2000"], [0.5, 0.5]))
    lines = [line for line in done.stderr.splitlines() if line.startswith("scored ")]
    assert len(lines) == 4 + 3
    outcome = json.loads(done.stdout)
    assert outcome["notices"][0] == "soup of 2 checkpoints: checkpoint-1000 0.5, checkpoint-2000 0.5"
    assert outcome["facts"]["score"] < 1e-6
    assert not list(tmp_path.glob(".merging-soup-*"))


def test_the_best_window(run: Path, scorer: str, tmp_path: Path) -> None:
    """A command may name the place of the path, and Python may give a function."""
    words = f"{scorer} {{}} {tmp_path / 'goal.safetensors'}"
    made = merging.soup(run, output=tmp_path / "soup", score=words, window=3, minimize=True)
    goal = load_file(tmp_path / "goal.safetensors")[TARGET]
    windows = {
        steps: float((mean([run / f"checkpoint-{step}" for step in steps], [1 / 3] * 3)[TARGET] - goal).norm())
        for steps in (STEPS[:3], STEPS[1:])
    }
    best = min(windows, key=lambda steps: windows[steps])
    assert made.facts["score"] == pytest.approx(windows[best], abs=1e-5)
    assert close(load(tmp_path / "soup"), mean([run / f"checkpoint-{step}" for step in best], [1 / 3] * 3))
    seen: list[str] = []

    def distance(path: Path) -> float:
        return -float((load(path)[TARGET] - goal).norm())

    merging.soup(run, output=tmp_path / "again", score=distance, window=3, on_event=seen.append)
    assert identical(load(tmp_path / "again"), load(tmp_path / "soup"))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such data set')", "failed with code 1: no such data set"),
        ("print('accuracy is 0.7')", "should print a number in its last line, and printed 'accuracy is 0.7'"),
        ("print(float('nan'))", "should print a number in its last line, and printed 'nan'"),
        ("pass", "should print a number in its last line, and printed nothing"),
        ("import time, subprocess; subprocess.run(['sleep', '600'])", "took more than 2 seconds and was stopped"),
    ],
)
def test_commands_that_do_not_score(code: str, message: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(code)
    words = ["--score", f"{sys.executable} {tmp_path / 'score.py'}", "--score-timeout", "2"]
    said = refused("soup", run, *words, "-o", tmp_path / "soup")
    assert message in said
    assert "checkpoint-500" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "score.py"]


def test_a_command_that_is_not_there(run: Path, tmp_path: Path) -> None:
    assert "no-such-program" in refused("soup", run, "--score", "no-such-program", "-o", tmp_path / "soup")
    with pytest.raises(MergingError, match=r"for .*checkpoint-500 the function returned None"):
        merging.soup(run, output=tmp_path / "soup", score=lambda path: None)  # type: ignore[arg-type,return-value]


def test_files_are_scored_as_outputs(run: Path, tmp_path: Path) -> None:
    """Checkpoints in files are given to the command in the form of the output."""
    files = [tmp_path / f"run_{step}.safetensors" for step in STEPS[:2]]
    for file, step in zip(files, STEPS, strict=False):
        shutil.copy(run / f"checkpoint-{step}" / "model.safetensors", file)
    seen: list[Path] = []

    def score(path: Path) -> float:
        seen.append(path)
        return float(load(path)[TARGET][0])

    merging.soup(files, output=tmp_path / "soup.safetensors", score=score)
    assert {path.name for path in seen} == {"soup.safetensors"}
