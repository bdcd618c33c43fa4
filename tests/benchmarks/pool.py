"""What building a pool of many adapters costs, against reading and hashing their bytes in the same run.

    python tests/benchmarks/pool.py --adapters 1000

The adapters are random ones of rank 8 for a Llama-shaped base of width 512 (every hundredth repeats the one before it
in other factors). `build` runs in a process of its own, on a tenth of them and then, into another pool, on all of them:
seconds and memory must grow no faster than their number, apart from comparing all with all, which is told apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, LAYERS, RANK = 512, 8, 8
MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qv"]


def make_base(folder: Path) -> Path:
    """A base of the modules that the adapters change."""
    folder.mkdir()
    save_file({f"{name}.weight": 0.02 * torch.randn(WIDTH, WIDTH) for name in MODULES}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder: Path, number: int) -> None:
    """A random adapter; every hundredth is the one before it, by factors of other sizes."""
    repeats = number % 100 == 99
    random = torch.Generator().manual_seed(number - repeats)
    tensors = {}
    for name in MODULES:
        gauge = 2.0 if repeats else 1.0
        down, up = (0.02 * torch.randn(size, generator=random) for size in ((RANK, WIDTH), (WIDTH, RANK)))
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": down * gauge,
            f"base_model.model.{name}.lora_B.weight": up / gauge,
        }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge(*arguments: object) -> float:
    """The seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "merging", *map(str, arguments)], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Make, build, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=1000)
    count: int = parser.parse_args().adapters
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        base = make_base(place / "base")
        for number in range(count):
            make_adapter(place / ("first" if number < count // 10 else "others") / f"{number:05}", number)
        few = merge("pool", "build", place / "few", place / "first", "--base", base)
        small = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        many = merge("pool", "build", place / "many", place / "first", place / "others", "--base", base)
        large = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        compared = merge("pool", "dedupe", place / "many")
        told = subprocess.run(
            [sys.executable, "-m", "merging", "pool", "stats", str(place / "many"), "--json"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        start = time.perf_counter()
        files = list(place.glob("[fo]*/*/adapter_model.safetensors"))
        for file in files:
            hashlib.sha256(file.read_bytes())
        read = time.perf_counter() - start
        size = sum(file.stat().st_size for file in files)
    facts = json.loads(told)
    assert facts["verdicts"]["quarantined"] == count // 100, facts
    print(f"{count} adapters, {size / 1e6:.0f} MB; {count // 100} repeats planted, all found, nothing else held back")
    print(f"build: {many:.1f} s, {many / read:.1f} times reading and hashing; {few:.1f} s of a tenth of them")
    print(f"comparing all with all again: {compared:.1f} s")
    print(f"peak memory: {large / 1024:.0f} MB, of a tenth {small / 1024:.0f} MB")


if __name__ == "__main__":
    main()
