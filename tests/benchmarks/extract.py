"""Time of extracting a LoRA from a fine-tune, against mergekit-extract-lora; and the error of budgets and ranks.

    MERGEKIT_PYTHON=peer/bin/python python tests/benchmarks/extract.py --size 0.5 --hidden 2048 --rank 64
    python tests/benchmarks/extract.py --matrices
    python tests/benchmarks/extract.py --errors

Whole processes as a user starts them, one after the other in each round; the table has the medians. The fine-tune is
the base plus changes with decaying singular values and noise. ``--matrices`` times the decomposition of one change by
the lines of mergekit and of sd-scripts (``networks/extract_lora_from_models.py``), in one process. ``--errors``
compares files of one size: one rank for all tensors, and the ranks of the budget.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import merging
from merging.maths.delta import Dense
from merging.maths.spectra import decompose_change


def make_models(folder: Path, gigabytes: float, hidden: int) -> tuple[Path, Path]:
    """A Llama of about this size in bfloat16, and a fine-tune of all of its matrices, each by an amount of its own."""
    block = hidden * hidden * 3 + 3 * hidden * (hidden * 11 // 4)
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 4000 * hidden) / block))
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "base", max_shard_size="100GB")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "tuned", max_shard_size="100GB")
    tensors = load_file(folder / "base" / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    tuned = {}
    for place, (name, value) in enumerate(tensors.items()):
        tuned[name] = value
        if value.dim() == 2:
            left, right = (torch.randn(size, 256, generator=random) for size in value.shape)
            decay = torch.arange(1, 257) ** -(0.25 + place % 3 / 2)
            change = (left * decay) @ right.mT * 0.002 + 0.0005 * torch.randn(value.shape, generator=random)
            tuned[name] = (value.float() + change).bfloat16()
    save_file(tuned, folder / "tuned" / "model.safetensors", {"format": "pt"})
    return folder / "base", folder / "tuned"


@dataclass(frozen=True)
class Times:
    """Seconds of a process, and the seconds that it kept processors busy."""

    wall: float
    busy: float


def run(command: list[str]) -> Times:
    """Return the times of a process that has to succeed."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Times(time.perf_counter() - began, busy)


def compare_time(folder: Path, base: Path, tuned: Path, rank: int, rounds: int, exact: bool) -> None:
    """Print the medians of whole processes, ours and the peer's."""
    peer = os.environ.get("MERGEKIT_PYTHON")
    ours = [sys.executable, "-m", "merging", "extract", str(tuned), "--base", str(base), "--rank", str(rank)]
    ours += ["--overwrite", "-o", str(folder / "ours"), "--quiet"]
    theirs = [str(Path(peer or "").parent / "mergekit-extract-lora"), "--model", str(tuned), "--base-model", str(base)]
    theirs += ["--out-path", str(folder / "theirs"), "--max-rank", str(rank), "--embed-lora", "--quiet"]
    commands = {"merge extract": ours}
    if exact:
        commands["merge extract --exact"] = [*ours, "--exact"]
    if peer:
        commands["mergekit-extract-lora"] = theirs
    times: dict[str, list[Times]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(run(command))
    show({name: summarize(each) for name, each in times.items()})


def summarize(times: list[Times]) -> Times:
    """The medians of times."""
    return Times(statistics.median(each.wall for each in times), statistics.median(each.busy for each in times))


def show(medians: dict[str, Times]) -> None:
    """Print a table of times; the last row is the slowest, with which the others are compared."""
    slowest = list(medians.values())[-1]
    print("| | seconds | times faster | processor seconds | times fewer |\n|---|---|---|---|---|")
    for name, each in medians.items():
        ratios = slowest.wall / each.wall, slowest.busy / each.busy
        print(f"| {name} | {each.wall:.2f} | {ratios[0]:.1f} | {each.busy:.2f} | {ratios[1]:.1f} |")


def compare_matrices(rank: int) -> None:
    """Print the times of decomposing the change of one matrix, on one core."""
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    for rows, columns in ((1280, 1280), (2048, 2048)):
        decay = torch.arange(1, 257) ** -0.5
        change = (torch.randn(rows, 256, generator=random) * decay) @ torch.randn(256, columns, generator=random)
        change += 0.2 * torch.randn(rows, columns, generator=random)
        ways: dict[str, Callable[[], object]] = {
            "merge extract": partial(decompose_change, Dense(change), rank, shape=(rows, columns)),
            "mergekit: svd(full_matrices=False)": partial(torch.linalg.svd, change, full_matrices=False),
            "sd-scripts: svd": partial(torch.linalg.svd, change),
        }
        medians = {}
        for name, way in ways.items():
            began, busy = time.perf_counter(), time.process_time()
            way()
            medians[name] = Times(time.perf_counter() - began, time.process_time() - busy)
        print(f"\n{rows} x {columns}, rank {rank}")
        show(medians)


def compare_errors(folder: Path, base: Path, tuned: Path) -> None:
    """Print the relative error over all tensors of files of several sizes."""
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    energy = {name: float((after[name].double() - each.double()).square().sum()) for name, each in before.items()}
    total = sum(energy.values())
    print("| rank for all | size | error | error of --size | ranks |\n|---|---|---|---|---|")
    for rank in (8, 32, 128):
        same = merging.extract(
            tuned, base=base, rank=rank, uniform=True, norms="base", output=folder / "same", overwrite=True
        )
        size = (folder / "same" / "adapter_model.safetensors").stat().st_size
        budget = merging.extract(tuned, base=base, size=size, norms="base", output=folder / "sized", overwrite=True)
        errors = [
            sqrt(sum(value * each.discarded.get(name, 1.0) for name, value in energy.items()) / total)
            for each in (same, budget)
        ]
        kept = [each for each in budget.ranks.values() if each]
        cells = [rank, f"{size / 1e6:.1f} MB", f"{errors[0]:.3f}", f"{errors[1]:.3f}", f"{min(kept)} to {max(kept)}"]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    """Run what the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.25, help="gigabytes of the base")
    parser.add_argument("--hidden", type=int, default=1024, help="width of its layers")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--errors", action="store_true", help="compare errors at equal sizes, and no times")
    parser.add_argument("--exact", action="store_true", help="time our exact decomposition too")
    parser.add_argument("--matrices", action="store_true", help="time decompositions of single matrices")
    options = parser.parse_args()
    if options.matrices:
        compare_matrices(options.rank)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned = make_models(folder, options.size, options.hidden)
        if options.errors:
            compare_errors(folder, base, tuned)
        else:
            compare_time(folder, base, tuned, options.rank, options.rounds, options.exact)


if __name__ == "__main__":
    main()
