"""Predictions of merges against measured merges, and the table of a 405B merge.

    python tests/benchmarks/predict.py
    python tests/benchmarks/predict.py --large

The first makes models of two sizes, calibrates, and runs 20 merges over methods and kinds, each in a process of its own
whose inputs are not in the system's memory. It prints the predicted and the measured processor seconds and times, and
the median errors. Times depend on the load of the machine, which is printed too; processor seconds hardly do. `--large`
predicts merges of three models with the shapes of Llama-3.1-405B from headers of sparse files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from speed import table

NAMES = ("base", "a", "b", "c")
SIZES = {"small": (512, 1408, 8, 8192), "large": (1024, 2816, 16, 32000)}
"""Hidden size, inner size, layers and vocabulary of a model."""

RANK = 16

CASES: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("small", "linear", ("a", "b"), {}),
    ("large", "linear", ("a", "b", "c"), {}),
    ("large", "linear", ("a", "b"), {"dtype": "float32"}),
    ("large", "task_arithmetic", ("a", "b", "c"), {"base": "base"}),
    ("large", "slerp", ("a", "b"), {}),
    ("large", "ties", ("a", "b"), {"base": "base"}),
    ("small", "ties", ("a", "b", "c"), {"base": "base"}),
    ("large", "dare+ties", ("a", "b"), {"base": "base"}),
    ("small", "della+ties", ("a", "b"), {"base": "base"}),
    ("large", "breadcrumbs+task_arithmetic", ("a", "b", "c"), {"base": "base"}),
    ("small", "sce", ("a", "b", "c"), {"base": "base"}),
    ("small", "pcb", ("a", "b"), {"base": "base"}),
    ("large", "magmax", ("a", "b", "c"), {"base": "base"}),
    ("small", "tsv", ("a", "b", "c"), {"base": "base"}),
    ("small", "iso_c", ("a", "b"), {"base": "base"}),
    ("small", "opcm", ("a", "b", "c"), {"base": "base"}),
    ("small", "linear", ("a", "b"), {"base": "base", "kind": "adapter", "rank": 16}),
    ("large", "tsv", ("lora-a", "lora-b", "lora-c"), {}),
    ("large", "lines+task_arithmetic", ("lora-a", "lora-b", "lora-c"), {}),
    ("large", "task_arithmetic", ("lora-a", "lora-b"), {"base": "base", "kind": "model"}),
)
"""Size of the models, method, models and options of each merge."""


def shapes(hidden: int, inner: int, layers: int, vocabulary: int, heads: int = 1) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama; keys and values have the hidden size divided by ``heads``."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", hidden // heads), ("v", hidden // heads)):
            found[f"{place}.self_attn.{name}_proj.weight"] = (rows, hidden)
        found[f"{place}.self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{place}.mlp.gate_proj.weight"] = found[f"{place}.mlp.up_proj.weight"] = (inner, hidden)
        found[f"{place}.mlp.down_proj.weight"] = (hidden, inner)
        found[f"{place}.input_layernorm.weight"] = found[f"{place}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


# ---------------------------------------------------------------- 20 merges


def make_models(folder: Path) -> None:
    """Write the models and adapters of all sizes."""
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    for size, numbers in SIZES.items():
        tensors = shapes(*numbers)
        base = {name: 0.02 * torch.randn(shape, generator=random) for name, shape in tensors.items()}
        for name in NAMES:
            tuned = (
                base
                if name == "base"
                else {key: value + 0.002 * torch.randn(value.shape, generator=random) for key, value in base.items()}
            )
            path = folder / f"{size}-{name}.safetensors"
            save_file({key: value.bfloat16() for key, value in tuned.items()}, path, {"format": "pt"})
        for name in NAMES[1:]:
            factors = {}
            for key, shape in tensors.items():
                if "_proj" in key:
                    module = f"base_model.model.{key.removesuffix('.weight')}"
                    factors[f"{module}.lora_A.weight"] = 0.02 * torch.randn((RANK, shape[1]), generator=random)
                    factors[f"{module}.lora_B.weight"] = 0.02 * torch.randn((shape[0], RANK), generator=random)
            lora = folder / f"{size}-lora-{name}"
            lora.mkdir()
            save_file(factors, lora / "adapter_model.safetensors", {"format": "pt"})
            config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
            (lora / "adapter_config.json").write_text(json.dumps(config))


def forget(folder: Path) -> None:
    """Have the system forget the pages of all files, where it does so on advice."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_case(folder: Path, number: int) -> dict[str, Any]:
    """Predict and run a merge, in a process of its own."""
    import merging
    from merging.api.merge_files import merge_plan

    size, method, models, options = CASES[number]
    options = dict(options)
    if "base" in options:
        options["base"] = path_of(folder, size, options["base"])
    plan = merging.preview([path_of(folder, size, each) for each in models], method=method, **options)
    found = merging.predict(plan)
    forget(folder)
    began, processor = time.perf_counter(), time.process_time()
    kind = ".safetensors" if plan.output == "model" else ""
    merge_plan(plan, folder / f"out{kind}", overwrite=True)
    return {
        "predicted": found.to_dict(),
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
    }


def path_of(folder: Path, size: str, name: str) -> str:
    """The path of a model or an adapter."""
    return str(folder / f"{size}-{name}{'' if name.startswith('lora') else '.safetensors'}")


def measure(folder: Path, calibrated: bool) -> None:
    """Run all merges, and print the table."""
    make_models(folder)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    if calibrated:
        subprocess.run(
            [sys.executable, "-m", "merging", "plan", "--calibrate"], cwd=folder, env=environment, check=True
        )
    rows, work, wall = [], [], []
    loads = [os.getloadavg()[0]]
    for number, (size, method, models, options) in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(number), "--folder", str(folder)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        loads.append(os.getloadavg()[0])
        predicted = found["predicted"]
        work.append(predicted["processor_seconds"] / found["processor_seconds"] - 1)
        wall.append(predicted["seconds"] / found["seconds"] - 1)
        label = f"{method}, {len(models)} {'LoRAs' if 'lora' in models[0] else 'models'}, {size}"
        label += "".join(f", {key} {value}" for key, value in options.items() if key != "base")
        rows.append(
            [
                label,
                f"{predicted['processor_seconds']:.2f}",
                f"{found['processor_seconds']:.2f}",
                f"{100 * work[-1]:+.0f} %",
                f"{predicted['seconds']:.2f}",
                f"{found['seconds']:.2f}",
                f"{100 * wall[-1]:+.0f} %",
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    heads = ["merge", "processor s, predicted", "measured", "error", "time s, predicted", "measured", "error"]
    print(table(heads, rows))
    print(f"median error: {100 * statistics.median(map(abs, work)):.0f} % of processor seconds, ", end="")
    print(f"{100 * statistics.median(map(abs, wall)):.0f} % of time")
    print(f"load {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores")


# ---------------------------------------------------------------- 405B


def make_headers(folder: Path, name: str) -> str:
    """Write a model with the shapes of Llama-3.1-405B as sparse files, which take no room on the disk."""
    place = folder / name
    place.mkdir()
    every = list(shapes(16384, 53248, 126, 128256, heads=16).items())
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for key, shape in every:
        if sum(2 * torch.Size(each).numel() for each in files[-1].values()) > 4e9:
            files.append({})
        files[-1][key] = shape
    index: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        header, end = {}, 0
        for key, shape in tensors.items():
            size = 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
            index[key] = file
        text = json.dumps(header).encode()
        with (place / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    total = sum(2 * torch.Size(shape).numel() for _, shape in every)
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return str(place)


def predict_large(folder: Path) -> None:
    """Print the table of a merge of three 405B models on 1, 8 and 64 nodes."""
    import merging
    from merging.api.predict import format_flops, format_seconds
    from merging.display.tables import format_size

    base, *models = [make_headers(folder, name) for name in ("base", "one", "two", "three")]
    rows = []
    for method in ("linear", "ties", "tsv"):
        began = time.perf_counter()
        plan = merging.preview(models, method=method, **({} if method == "linear" else {"base": base}))
        print(f"{method}: planned in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        for nodes in (1, 8, 64):
            found = merging.predict(plan, cluster=f"nodes={nodes},cores=32,memory=1TB,disk=2GB/s,net=25Gb/s,price=2.5")
            rows.append(
                [
                    method,
                    str(nodes),
                    str(found.sweeps),
                    format_size(found.disk_bytes),
                    format_size(found.write_bytes),
                    f"{found.workers} x {format_size(found.worker_bytes)}",
                    format_flops(found.decomposition_flops),
                    format_seconds(found.seconds),
                    found.bound,
                    f"{found.cost:,.2f}",
                ]
            )
    heads = ["method", "nodes", "sweeps", "read from disks", "written", "workers a node", "decompositions", "time"]
    print(table([*heads, "bounded by", "cost"], rows))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="print the table of a 405B merge")
    parser.add_argument("--default-rates", action="store_true", help="do not calibrate first")
    parser.add_argument("--folder", type=Path, help="where models are made, on a disk with 5 GB  [default: temporary]")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case is not None:
        print(json.dumps(run_case(chosen.folder, chosen.case)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        if chosen.large:
            predict_large(Path(folder))
        else:
            measure(Path(folder), not chosen.default_rates)


if __name__ == "__main__":
    main()
