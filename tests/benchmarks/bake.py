"""Time and memory of baking a LoRA into a sharded base, against PEFT's way: load, merge_and_unload, save.

    python tests/benchmarks/bake.py --size 2 --rounds 3

Whole processes as a user starts them, which alternate. Private memory is what the kernel counts as written by the
process alone, in the whole process and above a process that only imports. Pages of files that are read do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from speed import table
from transformers import LlamaConfig, LlamaForCausalLM

THEIRS = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""

IMPORTS = {
    "merge bake": "import torch, safetensors, pydantic, yaml, huggingface_hub, merging.api.bake, merging.engine.run",
    "PEFT": "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM",
}

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The seconds of a process and of the processors in it, and its largest private and resident memory in bytes."""

    seconds: float
    busy: float
    private: int
    resident: int


def make_models(folder: Path, gigabytes: float) -> None:
    """A Llama of about this size in bfloat16, in shards, and a LoRA of rank 16 on all of its linear layers."""
    hidden = 2048 if gigabytes > 0.5 else 512
    vocabulary = 16 * hidden
    block = hidden * hidden * 2.5 + 3 * hidden * 4 * hidden
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / block)),
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    lora = get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False))
    lora.save_pretrained(folder / "lora")
    stated = folder / "lora" / "adapter_config.json"
    stated.write_text(json.dumps(json.loads(stated.read_text()) | {"base_model_name_or_path": str(folder / "base")}))


def measure(command: list[str]) -> Cost:
    """Run a process that has to succeed, and look at its memory every 5 milliseconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    private = resident = 0
    while True:
        private = max(private, read_bytes(process.pid, "smaps_rollup", "Private_Dirty:"))
        resident = max(resident, read_bytes(process.pid, "status", "VmHWM:"))
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.005)
    if status:
        raise RuntimeError(f"{command}: ended with {os.waitstatus_to_exitcode(status)}")
    seconds = time.perf_counter() - began
    return Cost(seconds=seconds, busy=usage.ru_utime + usage.ru_stime, private=private, resident=resident)


def read_bytes(process: int, file: str, key: str) -> int:
    """Return a number of bytes that the kernel states of a process, 0 if that has ended."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference of two models' tensors, relative to the largest value of each."""
    place = {name: file for file in sorted(other.glob("*.safetensors")) for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    largest = 0.0
    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                ours, theirs = tensors.get_tensor(name).float(), safe_open(place[name], "pt").get_tensor(name).float()
                largest = max(largest, float((ours - theirs).abs().max() / theirs.abs().max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=float, default=2.0, help="gigabytes of the base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the models (default: the temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as root:
        folder = Path(root)
        make_models(folder, args.size)
        base, lora = str(folder / "base"), str(folder / "lora")
        merge = [sys.executable, "-m", "merging", "bake", lora, "--shard-size", "500MB", "--overwrite", "--quiet"]
        commands = {
            "merge bake": [*merge, "-o", str(folder / "merge bake")],
            "merge bake --as-trained nf4": [*merge, "--as-trained", "nf4", "-o", str(folder / "as trained")],
            "PEFT": [sys.executable, "-W", "ignore", "-c", THEIRS, base, lora, str(folder / "PEFT")],
        }
        imports = {name: measure([sys.executable, "-W", "ignore", "-c", code]) for name, code in IMPORTS.items()}
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                shutil.rmtree(command[-1], ignore_errors=True)
                costs[name].append(measure(command))
        rows = []
        for name, each in costs.items():
            private = max(cost.private for cost in each)
            above = private - imports["PEFT" if name == "PEFT" else "merge bake"].private
            seconds = statistics.median(cost.seconds for cost in each)
            resident = max(cost.resident for cost in each)
            busy = statistics.median(cost.busy for cost in each)
            rows.append(
                [
                    name,
                    f"{seconds:.0f} s",
                    f"{busy:.0f} s",
                    *(f"{size / 1e6:,.0f} MB" for size in (private, above, resident)),
                ]
            )
        difference = largest_difference(folder / "merge bake", folder / "PEFT")
    print(table(["", "time", "of the processors", "private memory", "above the imports", "resident memory"], rows))
    print(f"largest difference of a weight: {difference:.2g} of the tensor's largest")


if __name__ == "__main__":
    main()
