"""The cost of starting: processor seconds of a small merge above ``import torch``, and of each further merge.

    python tests/benchmarks/start.py --rounds 5

The models are Llama-shaped and tiny, so that nothing but the start is measured. ``import torch`` and the commands take
turns, each in processes of their own. The medians are printed as a table for docs/benchmarks/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

RECIPES = 10

_IN_ONE_PROCESS = f"""
import sys, time
import merging
models = sys.argv[1:]
merging.merge(models, method="linear", output="called", overwrite=True)
begun = time.process_time()
for _ in range({RECIPES}):
    merging.merge(models, method="linear", output="called", overwrite=True)
print((time.process_time() - begun) / {RECIPES})
"""


def write_model(folder: Path, seed: int) -> Path:
    """Write a model of two blocks."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(2) for part in ("up", "down")]
    save_file({name: torch.randn(16, 16, generator=random) for name in names}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def processor_seconds(command: list[str], folder: Path) -> float:
    """Return the processor seconds, of user and system, that a command takes."""
    before = os.times()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure in turns, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds: int = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        models = [write_model(place / name, seed) for seed, name in enumerate(("one", "two"))]
        recipes = [place / f"{number}.yml" for number in range(RECIPES)]
        for recipe in recipes:
            recipe.write_text("models: [one, two]\nmethod: linear\n")
        merge = [sys.executable, "-m", "merging"]
        commands = {
            "`import torch`": [sys.executable, "-c", "import torch"],
            "`merge --method linear one two`": [*merge, "--method", "linear", "one", "two", "-o", "out", "--overwrite"],
            "`merge plan` of the same": [*merge, "plan", "--method", "linear", "one", "two"],
            "`merge inspect one`": [*merge, "inspect", "one"],
            "`merge run`, a recipe": [*merge, "run", str(recipes[0]), "-o", "out", "--overwrite"],
            f"`merge run`, {RECIPES} recipes": [*merge, "run", *map(str, recipes), "-o", "several", "--overwrite"],
        }
        taken: dict[str, list[float]] = {name: [] for name in commands}
        calls = []
        for _ in range(rounds):
            for name, command in commands.items():
                taken[name].append(processor_seconds(command, place))
            called = [sys.executable, "-c", _IN_ONE_PROCESS, *map(str, models)]
            calls.append(float(subprocess.run(called, cwd=place, check=True, capture_output=True, text=True).stdout))
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    alone, (one, many) = seconds["`import torch`"], list(seconds.values())[-2:]
    print("| | processor seconds | above `import torch` |")
    print("|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value - alone:+.2f} |")
    print(f"| each further recipe | {(many - one) / (RECIPES - 1):.3f} | |")
    print(f"| each further `merging.merge` in one process | {statistics.median(calls):.3f} | |")


if __name__ == "__main__":
    main()
