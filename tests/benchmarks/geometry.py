"""All-pairs cosines of many adapters through their factors, against the same on full matrices.

    python tests/benchmarks/geometry.py
    python tests/benchmarks/geometry.py --adapters 100

Adapters of rank 16 for a model shaped like one of 7 billion parameters (32 blocks, 4096 wide, 11008 in the MLP), saved
in bfloat16 as PEFT saves them: 84 MB each, 84 GB for a thousand. So each holds three modules only, one of each shape,
which are read, multiplied and timed in full, one after the other in processes of their own; the whole model is the sum
of what its 224 modules would take by that. Peak memory is the highest of these processes, since modules are compared
one after the other, and the headers of 224 modules are added from a process that plans them.

The full matrices are those of one pair of adapters: each module of both is multiplied out and the inner product taken,
for all three shapes, in float32; all pairs are that many times as long.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, LAYERS = 16, 32
MODULES = {"self_attn.q_proj": (4096, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}
COUNTS = {"self_attn.q_proj": 4, "mlp.up_proj": 2, "mlp.down_proj": 1}
"""How many modules of that shape a block has."""

CLOCKS = ("seconds", "used")
"""By the clock, and of all processors: what others do on the machine makes the first longer, hardly the second."""

_MEASURED = """
import json, sys, time
from pathlib import Path
import torch
from merging.geometry import cosines
from merging.geometry.alignment import align
def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
imports, begun, used = resident(), time.perf_counter(), time.process_time()
found = {}
if sys.argv[1] == "plan":
    plan = align(json.loads(sys.argv[2]))
else:
    found["check_closest"] = cosines(json.loads(sys.argv[2]), exclude=sys.argv[1].split(",")).triu(1).max().item()
print(json.dumps(found | {
    "seconds": time.perf_counter() - begun, "used": time.process_time() - used, "threads": torch.get_num_threads(),
    "peak": resident() * 1024, "imports": imports * 1024,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--scratch", type=Path, help="where the adapters are written (1.2 MB each)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        paths = [write(Path(scratch) / f"{i:05}", i) for i in range(arguments.adapters)]
        whole = [write_whole(Path(scratch) / f"whole{i}", i) for i in range(2)]
        compare(paths, whole)


def compare(paths: list[Path], whole: list[Path]) -> None:
    """Measure, and print as it goes; ``whole`` are adapters of all modules."""
    count = len(paths)
    pairs, headers = count * (count + 1) // 2, measured("plan", whole)
    planned = measured("plan", paths)
    above = (headers["peak"] - headers["imports"]) / len(whole) * count
    print(
        f"{count} adapters of rank {RANK}, {planned['threads']} threads; planned in {planned['seconds']:.1f} s",
        flush=True,
    )
    # Planning goes by the number of tensors.
    factored = {clock: planned[clock] * LAYERS * sum(COUNTS.values()) / len(MODULES) for clock in CLOCKS}
    full = dict.fromkeys(CLOCKS, 0.0)
    peak = 0.0
    for name, (out, into) in MODULES.items():
        each = measured(",".join(other for other in MODULES if other != name), paths)
        pair = pair_in_full(out, into)
        for clock in CLOCKS:
            factored[clock] += LAYERS * COUNTS[name] * (each[clock] - planned[clock])
            full[clock] += LAYERS * COUNTS[name] * pair[clock]
        peak = max(peak, each["peak"])
        print(
            f"{name} {out} x {into}: {told(each)}, peak {each['peak'] / 1e6:.0f} MB, of which the imports "
            f"{each['imports'] / 1e6:.0f} MB; one pair on full matrices: {told(pair)}",
            flush=True,
        )
    print(f"headers of {count} whole adapters: {above / 1e6:.0f} MB")
    print(f"whole model, {pairs:,} inner products by factors: {told(factored)}; peak {(peak + above) / 1e6:.0f} MB")
    print(f"one pair on full matrices: {told(full)}; all pairs: {full['seconds'] * pairs / 86400:.1f} days")
    ratios = " and ".join(f"{full[clock] * pairs / factored[clock]:.0f}" for clock in CLOCKS)
    print(f"full matrices / factors: {ratios} times, by the clock and by the processor's")


def factors(seed: int, name: str) -> dict[str, Tensor]:
    """One module's, in bfloat16."""
    out, into = MODULES[name]
    random = torch.Generator().manual_seed(seed)
    down, up = torch.randn(RANK, into, generator=random) / 64, torch.randn(out, RANK, generator=random) / 64
    return {"lora_A": down.bfloat16(), "lora_B": up.bfloat16()}


def write(folder: Path, seed: int) -> Path:
    """An adapter of one module of each shape."""
    return _saved(folder, seed, [(0, name, name) for name in MODULES])


def write_whole(folder: Path, seed: int) -> Path:
    """One of all modules."""
    alike = {name: [name] for name in MODULES}
    alike["self_attn.q_proj"] += ["self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    alike["mlp.up_proj"] += ["mlp.gate_proj"]
    places = [(layer, each, name) for layer in range(LAYERS) for name, others in alike.items() for each in others]
    return _saved(folder, seed, places)


def _saved(folder: Path, seed: int, places: list[tuple[int, str, str]]) -> Path:
    folder.mkdir()
    made = {name: factors(seed, name) for name in MODULES}
    tensors = {
        f"base_model.model.model.layers.{layer}.{name}.{part}.weight": value.clone()
        for layer, name, shape in places
        for part, value in made[shape].items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for _, name, _ in places})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    return folder


def measured(what: str, paths: list[Path]) -> dict[str, float]:
    """Seconds and bytes of a fresh process that plans, or compares the modules that are not excluded."""
    command = [sys.executable, "-c", _MEASURED, what, json.dumps([str(path) for path in paths])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def pair_in_full(out: int, into: int) -> dict[str, float]:
    """The inner product of one pair's changes of one module, multiplied out; the best of three."""
    ups = [torch.randn(out, RANK) for _ in range(2)]
    downs = [torch.randn(RANK, into) for _ in range(2)]
    times = []
    for _ in range(3):
        begun, used = time.perf_counter(), time.process_time()
        one, other = (up @ down for up, down in zip(ups, downs, strict=True))
        torch.dot(one.flatten(), other.flatten())
        times.append((time.perf_counter() - begun, time.process_time() - used))
    return dict(zip(CLOCKS, map(min, zip(*times, strict=True)), strict=True))


def told(times: dict[str, float]) -> str:
    """Both clocks."""
    return f"{times['seconds']:.3g} s ({times['used']:.3g} s of processors)"


if __name__ == "__main__":
    main()
