"""Time of extracting a LoRA from a fine-tune, against mergekit-extract-lora; and the error of budgets and ranks.

    MERGEKIT_PYTHON=peer/bin/python python tests/benchmarks/extract.py --size 0.25 --rank 64
    python tests/benchmarks/extract.py --errors

Whole processes as a user starts them, one after the other in each round; the table has the medians. The fine-tune is
the base plus changes with decaying singular values and noise. ``--errors`` compares files of one size: one rank for
all tensors, and the ranks of the budget.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import merging


def make_models(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """A Llama of about this size in bfloat16, and a fine-tune of all of its matrices, each by an amount of its own."""
    hidden = 128 * max(2, round(8 * (gigabytes / 0.5) ** (1 / 3)))
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


def run(command: list[str]) -> float:
    """Return the seconds of a process that has to succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def compare_time(folder: Path, base: Path, tuned: Path, rank: int, rounds: int) -> None:
    """Print the medians of whole processes, ours and the peer's."""
    peer = os.environ.get("MERGEKIT_PYTHON")
    ours = [sys.executable, "-m", "merging", "extract", str(tuned), "--base", str(base), "--rank", str(rank)]
    ours += ["--overwrite", "-o", str(folder / "ours"), "--quiet"]
    theirs = [str(Path(peer or "").parent / "mergekit-extract-lora"), "--model", str(tuned), "--base-model", str(base)]
    theirs += ["--out-path", str(folder / "theirs"), "--max-rank", str(rank), "--embed-lora", "--quiet"]
    times: dict[str, list[float]] = {"merge extract": [], "merge extract --exact": [], "mergekit-extract-lora": []}
    for _ in range(rounds):
        times["merge extract"].append(run(ours))
        times["merge extract --exact"].append(run([*ours, "--exact"]))
        if peer:
            times["mergekit-extract-lora"].append(run(theirs))
    medians = {name: statistics.median(each) for name, each in times.items() if each}
    print("| | seconds | times faster |\n|---|---|---|")
    slowest = medians.get("mergekit-extract-lora")
    for name, each in medians.items():
        print(f"| {name} | {each:.1f} | {f'{slowest / each:.1f}' if slowest else '-'} |")


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
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--errors", action="store_true", help="compare errors at equal sizes, and no times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned = make_models(folder, options.size)
        if options.errors:
            compare_errors(folder, base, tuned)
        else:
            compare_time(folder, base, tuned, options.rank, options.rounds)


if __name__ == "__main__":
    main()
