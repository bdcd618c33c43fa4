"""Speed and memory of whole-model merges, against copying the bytes and against mergekit, in one run.

    python tests/benchmarks/speed.py --size 0.5 2 --mergekit-python peer/bin/python
    python tests/benchmarks/speed.py --recipes --mergekit-python peer/bin/python

Each round runs everything once, one after the other, and ratios are taken within a round, so that a machine that gets
slower half-way slows both sides; the table has the medians. Rows: two models averaged, two task vectors added to a
base, two models interpolated. "whole" is the whole process as a user starts it, "merge" the merge without the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

PEER_FOLDER = Path(__file__).resolve().parents[1] / "peer"
sys.path.insert(0, str(PEER_FOLDER))

from mergekit_runner import Measured, measure, private_bytes  # noqa: E402
from speed_recipes import HEADS, recipe_rows, run_recipe  # noqa: E402

SHARD_BYTES = 1_000_000_000
NAMES = ("base", "a", "b")
NOISE = 0.002  # a fine-tune is the base plus this much noise on weights of 0.02

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One merge in our words and in the peer's; ``peer`` is None where the peer has no such merge."""

    method: str
    models: tuple[str, ...]
    parameters: dict[str, Any]
    peer: dict[str, Any] | None = None
    base: str | None = None
    peer_base: str | None = None
    peer_method: str | None = None
    weights: tuple[float, ...] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every checkpoint that is read."""
        return self.models if self.base is None else (self.base, *self.models)

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Keyword arguments of merging.merge, without the output."""
        settings: dict[str, Any] = {"models": [str(folder / name) for name in self.models], "method": self.method}
        if self.base is not None:
            settings["base"] = str(folder / self.base)
        if self.weights is not None:
            settings["weights"] = list(self.weights)
        return settings | self.parameters

    def command(self, folder: Path) -> list[str]:
        """The same on the command line."""
        words = []
        for name, value in self.arguments(folder).items():
            if name == "models":
                words += value
            else:
                words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
        return words

    def config(self, folder: Path) -> dict[str, Any]:
        """The same for mergekit."""
        models: list[dict[str, Any]] = [{"model": str(folder / name)} for name in self.models]
        for model, weight in zip(models, self.weights or (), strict=self.weights is not None):
            model["parameters"] = {"weight": weight}
        method = self.peer_method or self.method
        config = {"merge_method": method, "models": models, "parameters": self.peer, "dtype": "bfloat16"}
        base = self.peer_base or self.base
        return config if base is None else config | {"base_model": str(folder / base)}


CASES = {
    "linear, 2 models": Case("linear", ("a", "b"), {}, {"normalize": True}, weights=(0.5, 0.5)),
    "task arithmetic, 2 + base": Case(
        "task_arithmetic", ("a", "b"), {"scale": 0.7}, {"lambda": 0.7}, base="base", weights=(0.5, 0.5)
    ),
    "slerp, 2 models": Case("slerp", ("a", "b"), {"t": 0.4}, {"t": 0.4}, peer_base="a"),
}


# ---------------------------------------------------------------- checkpoints


def llama(gigabytes: float) -> tuple[dict[str, Any], Shapes]:
    """Config and shapes of a Llama of about that size in bfloat16: 0.5 GB is 16 layers of width 1024."""
    vocabulary = 32_000 if gigabytes >= 0.25 else 4_000
    hidden = 128 * max(2, round(8 * (gigabytes / 0.5) ** (1 / 3)))
    inner, keys = hidden * 11 // 4, hidden // 2
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    rest = gigabytes * 1e9 / 2 - 2 * vocabulary * hidden
    layers = max(1, round(rest / sum(map(count, block.values()))))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return config, shapes


def mixture(tensors: int) -> tuple[dict[str, Any], Shapes]:
    """Config and shapes of a mixture of 128 experts with that many tensors, each of four numbers."""
    parts = [f"experts.{expert}.{name}_proj" for expert in range(128) for name in ("gate", "up", "down")]
    shapes = {f"model.layers.{i // 384}.mlp.{parts[i % 384]}.weight": (2, 2) for i in range(tensors)}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": -(-tensors // 384),
        "num_experts": 128,
        "torch_dtype": "bfloat16",
    }
    return config, shapes


def count(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    return int(torch.Size(shape).numel())


def shards(shapes: Shapes) -> Iterator[Shapes]:
    """The tensors of each file, in order."""
    part: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        if part and size + 2 * count(shape) > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = shape
        size += 2 * count(shape)
    yield part


def header(shapes: Shapes) -> bytes:
    """The head of a safetensors file of bfloat16 tensors that lie one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + 2 * count(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_models(folder: Path, config: dict[str, Any], shapes: Shapes, names: tuple[str, ...] = NAMES) -> None:
    """A base and fine-tunes of it, written side by side: one tensor is in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    parts = list(shards(shapes))
    files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = files if len(parts) > 1 else ["model.safetensors"]
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))
        if len(parts) > 1:
            places = {tensor: file for file, part in zip(files, parts, strict=True) for tensor in part}
            index = {"metadata": {"total_size": 2 * sum(map(count, shapes.values()))}, "weight_map": places}
            (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in zip(files, parts, strict=True):
        for name in names:
            (folder / name / file).write_bytes(header(part))
        for shape in part.values():
            base = torch.randn(shape, generator=generator).mul_(0.02)
            for name in names:
                noise = 0.0 if name == "base" else torch.randn(shape, generator=generator).mul_(NOISE)
                with (folder / name / file).open("ab") as stream:
                    stream.write((base + noise).bfloat16().view(torch.int16).numpy().data)


def tensor_bytes(folder: Path) -> int:
    """Bytes of tensors in a folder's files, without their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            total += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    return total


# ---------------------------------------------------------------- one round


@dataclass
class Bench:
    """Where things are, and how the programs are started."""

    folder: Path
    peer: str | None
    threads: int | None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # mergekit chooses between inputs by hash order, and neither program has anything to ask the Hub
        self.environment = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
        if self.threads:
            self.environment["OMP_NUM_THREADS"] = str(self.threads)

    def run(self, command: list[str]) -> tuple[float, str]:
        """Seconds and standard output of a process."""
        start = time.perf_counter()
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed with {done.returncode}:\n{done.stderr[-4000:]}")
        return seconds, done.stdout

    def fresh(self, name: str) -> Path:
        """A place for an output; what earlier runs left to be written to disk is written first."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        os.sync()
        return path

    def read_and_copy(self, case: Case) -> tuple[float, float]:
        """Seconds, and processor seconds, of the system's tools for reading the inputs and copying the last output."""
        copy = self.fresh("copy")
        copy.mkdir()
        inputs = [str(file) for name in case.inputs for file in sorted((self.folder / name).glob("*.safetensors"))]
        output = [str(file) for file in (self.folder / "ours").glob("*.safetensors")]
        start, processor = time.perf_counter(), children_seconds()
        with Path(os.devnull).open("wb") as nowhere:
            subprocess.run(["cat", *inputs], stdout=nowhere, check=True)
        # some file systems would share the blocks and copy nothing
        subprocess.run(["cp", "--reflink=never", *output, str(copy)], check=True)
        return time.perf_counter() - start, children_seconds() - processor

    def our_command(self) -> list[str]:
        """The console command beside this Python, or the module where it is not installed."""
        script = Path(sys.executable).parent / "merge"
        return [str(script)] if script.exists() else [sys.executable, "-m", "merging"]

    def compile(self, case: Case) -> None:
        """Merge once with all kernels unless the user switched them off, so that their compiled code is on the disk."""
        chosen = self.environment
        if chosen.get("MERGING_KERNELS") not in ("off", "0"):
            self.environment = chosen | {"MERGING_KERNELS": "on"}
            self.ours_alone(case)
            self.environment = chosen

    def ours_whole(self, case: Case) -> float:
        """Seconds of the whole process."""
        threads = ["--threads", str(self.threads)] if self.threads else []
        output = ["-o", str(self.fresh("ours"))]
        return self.run([*self.our_command(), *case.command(self.folder), *threads, *output])[0]

    def ours_alone(self, case: Case) -> Measured:
        """The merge without the imports."""
        output = {"output": str(self.fresh("ours")), "threads": self.threads}
        arguments = json.dumps(case.arguments(self.folder) | output)
        return succeeded(json.loads(self.run([sys.executable, __file__, "--worker", arguments])[1]))

    def peer_whole(self, case: Case) -> float:
        """Seconds of mergekit's whole process."""
        script = Path(str(self.peer)).parent / "mergekit-yaml"
        options = ["--quiet", "--no-copy-tokenizer"]
        return self.run([str(script), str(self.peer_config(case)), str(self.fresh("theirs")), *options])[0]

    def peer_alone(self, case: Case) -> Measured:
        """Mergekit's run_merge without the imports."""
        runner = [str(self.peer), str(PEER_FOLDER / "mergekit_runner.py")]
        return succeeded(json.loads(self.run([*runner, str(self.peer_config(case)), str(self.fresh("theirs"))])[1])[0])

    def peer_config(self, case: Case) -> Path:
        """The configuration file; JSON is YAML."""
        path = self.folder / "mergekit.yaml"
        path.write_text(json.dumps(case.config(self.folder)))
        return path

    def round_alone(self, case: Case, against_peer: bool = True) -> dict[str, float]:
        """The merge without the imports here, by the system's tools, and by mergekit, with the ratios."""
        ours = self.ours_alone(case)
        copied, copied_processor = self.read_and_copy(case)
        found = {
            "merge ours": ours["seconds"],
            "processor ours": ours["processor"],
            "read+copy": copied,
            "ours/copy": ours["seconds"] / copied,
            "processor ours/copy": ours["processor"] / copied_processor,
            "MB ours": ours["peak_private_bytes"] / 1e6,
        }
        if self.peer is None or case.peer is None or not against_peer:
            return found
        theirs = self.peer_alone(case)
        return found | {
            "merge peer": theirs["seconds"],
            "merge peer/ours": theirs["seconds"] / ours["seconds"],
            "processor peer/ours": theirs["processor"] / ours["processor"],
            "MB peer": theirs["peak_private_bytes"] / 1e6,
        }

    def round(self, case: Case) -> dict[str, float]:
        """Everything once, in a fixed order, with the ratios of this round."""
        ours_whole = self.ours_whole(case)
        found = {"whole ours": ours_whole} | self.round_alone(case)
        if self.peer is None or case.peer is None:
            return found
        peer_whole = self.peer_whole(case)
        sizes = [tensor_bytes(self.folder / name) for name in ("ours", "theirs")]
        if sizes[0] != sizes[1]:
            raise SystemExit(f"the outputs differ in size, so the times compare nothing: {sizes} bytes of tensors")
        return found | {
            "whole peer": peer_whole,
            "whole peer/ours": peer_whole / ours_whole,
        }


def children_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def succeeded(measured: Measured) -> Measured:
    """What was measured, unless the merge failed."""
    if measured["error"]:
        raise SystemExit(f"the merge into {measured['output']} failed: {measured['error']}")
    return measured


def import_everything() -> Any:
    """Our package with every public name looked up, as it imports its parts when they are asked for."""
    import merging

    for name in merging.__all__:
        getattr(merging, name)
    return merging


def worker(arguments: str) -> None:
    """In a process of its own: import, then merge and print what that took."""
    settings = json.loads(arguments)
    merging = import_everything()
    merge = partial(run_recipe, merging) if "recipe" in settings else merging.merge
    floor = private_bytes()
    print(json.dumps(measure(lambda: merge(**settings), settings["output"], floor)))


# ---------------------------------------------------------------- tables

COLUMNS = (
    ("whole ours", "{:.2f} s"),
    ("whole peer", "{:.2f} s"),
    ("whole peer/ours", "{:.1f}x"),
    ("merge ours", "{:.2f} s"),
    ("merge peer", "{:.2f} s"),
    ("merge peer/ours", "{:.1f}x"),
    ("read+copy", "{:.2f} s"),
    ("ours/copy", "{:.2f}x"),
    ("processor ours", "{:.2f} s"),
    ("processor ours/copy", "{:.2f}x"),
    ("processor peer/ours", "{:.1f}x"),
    ("MB ours", "{:.0f}"),
    ("MB peer", "{:.0f}"),
)
OUR_COLUMNS = tuple((key, text) for key, text in COLUMNS if "peer" not in key)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown, in columns that also read well as text."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def memory_available() -> int:
    """Bytes that the system could still give out, page cache included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def warm(bench: Bench, names: tuple[str, ...] = NAMES) -> str:
    """Read every checkpoint and start every program once; say what that leaves in the page cache."""
    files = [file for name in names for file in (bench.folder / name).glob("*.safetensors")]
    with Path(os.devnull).open("wb") as nowhere:
        subprocess.run(["cat", *map(str, files)], stdout=nowhere, check=True)
    bench.run([*bench.our_command(), "--help"])
    if bench.peer:
        bench.run([str(Path(bench.peer).parent / "mergekit-yaml"), "--help"])
    # two outputs and a copy are written beside the inputs
    needed = sum(file.stat().st_size for file in files) * 2
    if needed < memory_available():
        return "warm: every input was read, and every program started, once before the first round"
    return "NOT warm: inputs and outputs do not fit into memory together"


def conditions(repeats: int, threads: int | None) -> str:
    """Under which the figures are taken."""
    return (
        f"{os.cpu_count()} cores, threads {threads or 'as each program chooses'}, load {os.getloadavg()[0]:.1f}\n"
        f"medians of {repeats} rounds; peak private memory above the level just after the imports"
    )


def prepare(bench: Bench, gigabytes: float, names: tuple[str, ...] = NAMES) -> int:
    """Write checkpoints of about that size and read them once; say so, and return the parameters of each."""
    config, shapes = llama(gigabytes)
    write_models(bench.folder, config, shapes, names)
    parameters = sum(map(count, shapes.values()))
    print(f"{2 * parameters / 1e9:.2f} GB each, {len(shapes)} tensors; page cache: {warm(bench, names)}", flush=True)
    return parameters


def median_cells(rounds: list[dict[str, float]], columns: tuple[tuple[str, str], ...]) -> list[str]:
    """A row's cells: the medians of the rounds, and a dash for what was not measured."""
    medians = {key: statistics.median(found[key] for found in rounds if key in found) for key in rounds[0]}
    return [text.format(medians[key]) if key in medians else "-" for key, text in columns]


def compare(bench: Bench, sizes: list[float], repeats: int, cases: dict[str, Case]) -> None:
    """Print the table of merges; every size has a folder of its own in the bench's."""
    print(conditions(repeats, bench.threads))
    names = tuple(sorted({name for case in cases.values() for name in case.inputs}))
    columns = COLUMNS if bench.peer else OUR_COLUMNS
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            here = replace(bench, folder=Path(folder))
            each = 2 * prepare(here, size, names) / 1e9
            for name, case in cases.items():
                here.compile(case)
                rounds = [here.round(case) for _ in range(repeats)]
                rows.append([f"{name}, {each:.2f} GB", *median_cells(rounds, columns)])
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # not lost if the run is stopped
    print(table(["case", *(key for key, _ in columns)], rows))


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark of merges can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, nargs="+", default=[0.5], help="gigabytes of each checkpoint")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, help="threads of every program (default: as each chooses)")
    parser.add_argument("--mergekit-python", default=os.environ.get("MERGEKIT_PYTHON"), help="the peer's Python")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: the temporary one)")
    return parser


def main() -> None:
    """Parse the command line and print one table."""
    parser = options(__doc__)
    parser.add_argument("--recipes", action="store_true", help="time recipes and stages instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker)
    else:
        with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
            bench = Bench(Path(folder), chosen.mergekit_python, chosen.threads)
            if chosen.recipes:
                prepare(bench, chosen.size[0])
                print(conditions(chosen.repeats, bench.threads))
                print(table(HEADS, recipe_rows(bench, CASES, chosen.repeats, __file__)))
                return
            compare(bench, chosen.size, chosen.repeats, CASES)


if __name__ == "__main__":
    main()
