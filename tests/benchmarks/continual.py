"""What a continual store costs as models arrive, and what it keeps of real tasks.

    python tests/benchmarks/continual.py --stream --width 192
    python tests/benchmarks/continual.py --factored --steps 6 --width 512
    python tests/benchmarks/continual.py --tasks --json continual.json

`--stream` adds full checkpoints, each deleted when it was added: seconds and memory of a step must not grow with their
number. `--factored` adds the same changes twice, as adapters and as checkpoints that they were baked into. `--tasks`
adds the fine-tunes of quality.py in random orders, and tells average accuracy in the end and backward transfer (the
accuracy of each task then, less that right after its own step). Each step of the first two is a process of its own,
measured as in speed.py: without the imports, and with private memory above the level just after them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from speed import Bench, Shapes, count, import_everything, measure, private_bytes, succeeded, table

if TYPE_CHECKING:
    from quality_models import Judge, Models

    from merging import ContinualStore

ROUNDING = 1e-5  # merges whose distance is less than this share of the change are the same
NOISE = 0.002  # a change, on weights of 0.02
SHOWN = 10  # a step of the stream is shown if it is a multiple of this
VOCABULARY = 8_000
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}

Tensors = dict[str, torch.Tensor]


# ---------------------------------------------------------------- models


def shapes_of(parameters: float, width: int) -> Shapes:
    """An embedding, and as many blocks of matrices and a norm as make about that many parameters."""
    block = {f"{name}.weight": (4 * width if "mlp" in name else width, width) for name in MODULES}
    block |= {"mlp.down_proj.weight": (width, 4 * width), "input_layernorm.weight": (width,)}
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, width)}
    blocks = max(1, round((parameters - VOCABULARY * width) / sum(map(count, block.values()))))
    for layer in range(blocks):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] = CONFIG) -> Path:
    """A model's folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def noise(shape: Iterable[int], size: float, generator: torch.Generator) -> torch.Tensor:
    """Random weights in float32."""
    return torch.randn(tuple(shape), generator=generator).mul_(size)


def write_base(folder: Path, shapes: Shapes, dtype: torch.dtype) -> Path:
    """The base of all models."""
    generator = torch.Generator().manual_seed(0)
    return write_model(folder, {name: noise(shape, 0.02, generator).to(dtype) for name, shape in shapes.items()})


def write_tuned(folder: Path, base: Path, seed: int) -> Path:
    """A fine-tune of the base: every tensor changed, by noise of full rank."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        tensors[name] = value.float().add_(noise(value.shape, NOISE, generator)).to(value.dtype)
    return write_model(folder, tensors)


def write_adapter(folder: Path, shapes: Shapes, rank: int, seed: int) -> Path:
    """An adapter of all matrices but the embedding."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if "proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = noise((rank, shape[1]), shape[1] ** -0.5, generator)
            tensors[f"{module}.lora_B.weight"] = noise((shape[0], rank), NOISE, generator)
    targets = sorted({name.split(".")[-2] for name in shapes if "proj" in name})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- one step


@dataclass(frozen=True)
class Cost:
    """What a step took: of the store (``cpu``: seconds of a core), and of the system's own tools for its bytes."""

    seconds: float
    cpu: float
    memory: int
    disk: int
    copy: float
    rank: int


def worker(arguments: str) -> None:
    """In a process of its own: import, then add a model and print what that took."""
    settings = json.loads(arguments)
    merging = import_everything()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    floor = private_bytes()
    found: list[Any] = []

    def work() -> None:
        store = merging.ContinualStore(settings["store"])
        found.append(store.add(settings["model"], threads=settings["threads"]))

    start = time.process_time()
    measured = measure(work, settings["store"], floor)
    cpu = time.process_time() - start
    print(json.dumps({**measured, "cpu": cpu, "rank": found[0].rank if found else 0}))


def weights_of(folder: Path) -> list[Path]:
    """The files of a folder that hold tensors."""
    return sorted(folder.rglob("*.safetensors"))


def take_step(bench: Bench, store: ContinualStore, model: Path, base: Path, copied: bool) -> Cost:
    """Add a model in a process of its own, and forget the state before; ``copied``: time the system's tools too."""
    os.sync()  # what was written before is not this step's to write
    arguments = {"store": str(store.path), "model": str(model), "threads": bench.threads}
    output = bench.run([sys.executable, __file__, "--worker", json.dumps(arguments)])[1]
    measured = json.loads(output)
    succeeded(measured)
    states = weights_of(store.path)
    new = {store.path / part.file for part in store.manifest().steps[-1].parts.values()}
    held = [file for file in states if file not in new]
    seconds = copying(bench, [*weights_of(base), *weights_of(model), *held], sorted(new)) if copied else 0.0
    store.gc(keep=1)
    disk = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    peak = measured["peak_private_bytes"]
    return Cost(measured["seconds"], measured["cpu"], peak, disk, seconds, measured["rank"])


def copying(bench: Bench, read: Sequence[Path], written: Sequence[Path]) -> float:
    """Seconds of the system's own tools for reading what a step reads and copying what it wrote."""
    copy = bench.fresh("copy")
    copy.mkdir()
    start = time.perf_counter()
    with Path(os.devnull).open("wb") as nowhere:
        subprocess.run(["cat", *map(str, read)], stdout=nowhere, check=True)
    subprocess.run(["cp", "--reflink=never", *map(str, written), str(copy)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def conditions(bench: Bench) -> str:
    """Under which the figures are taken."""
    return f"{os.cpu_count()} cores, threads {bench.threads or 'all'}, load {os.getloadavg()[0]:.1f}"


def new_store(path: Path, base: Path, method: str, **parameters: Any) -> ContinualStore:
    """An empty store."""
    store: ContinualStore = import_everything().ContinualStore.create(path, base=base, method=method, **parameters)
    return store


# ---------------------------------------------------------------- a stream of full checkpoints


def stream(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print what steps 2, 10, 20, ... took, with ratios to step 2."""
    if chosen.steps < 2:
        raise SystemExit("--stream compares later steps with the second: at least 2 are needed")
    shapes = shapes_of(chosen.size * 1e9 / 2, chosen.width)
    base = write_base(bench.folder / "base", shapes, torch.bfloat16)
    store = new_store(bench.folder / "store", base, chosen.method)
    size = 2 * sum(map(count, shapes.values()))
    print(f"{chosen.method}: {chosen.steps} full checkpoints of {size / 1e6:.0f} MB in bfloat16, width {chosen.width}")
    print(f"{conditions(bench)}; memory above the imports; copy: reading base, model and held state, copying the new")
    costs: dict[int, Cost] = {}
    start = time.perf_counter()
    for number in range(1, chosen.steps + 1):
        model = write_tuned(bench.folder / f"model-{number}", base, number)
        costs[number] = take_step(bench, store, model, base, copied=number == 2 or number % SHOWN == 0)
        shutil.rmtree(model)  # nothing needs an old model again
        cost = costs[number]
        told = f"{cost.seconds:.2f} s, of a core {cost.cpu:.2f} s, {cost.memory / 1e6:.0f} MB"
        print(f"step {number}: {told}", file=sys.stderr, flush=True)
    first, rows = costs[2], []
    for number, cost in costs.items():
        if cost.copy:
            shown = [f"{number}", f"{cost.seconds:.2f}", f"{cost.seconds / first.seconds:.2f}"]
            shown += [f"{cost.cpu:.2f}", f"{cost.cpu / first.cpu:.2f}"]
            shown += [f"{cost.memory / 1e6:.0f}", f"{cost.memory / first.memory:.2f}", f"{cost.disk / 1e6:.0f}"]
            rows.append([*shown, f"{cost.copy:.2f}", f"{cost.seconds / cost.copy:.1f}"])
    heads = ["step"]
    heads += [text for what in ("seconds", "core seconds", "peak MB") for text in (what, "to step 2")]
    heads += ["store MB", "copy, seconds", "step/copy"]
    print(table(heads, rows))
    early, late = ([costs[n] for n in numbers] for numbers in (list(costs)[1:11], list(costs)[-10:]))
    print("the ten steps from the second, and the last ten, with the ratio:")
    for what, pick, average in (
        ("seconds, median", lambda cost: cost.seconds, statistics.median),
        ("core seconds, median", lambda cost: cost.cpu, statistics.median),
        ("peak MB, highest", lambda cost: cost.memory / 1e6, max),
    ):
        before, after = (average([pick(cost) for cost in part]) for part in (early, late))
        print(f"  {what}: {before:.1f}, {after:.1f}, {after / before:.2f}")
    print(f"in all {time.perf_counter() - start:.0f} s, with writing the models", flush=True)


# ---------------------------------------------------------------- factors against full matrices


def factored(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print what the same changes take as adapters and as checkpoints, step by step."""
    merging = import_everything()
    shapes = shapes_of(chosen.size * 1e9 / 4, chosen.width)
    base = write_base(bench.folder / "base", shapes, torch.float32)
    stores = {kind: new_store(bench.folder / f"store-{kind}", base, chosen.method) for kind in ("adapter", "full")}
    each = 4 * sum(map(count, shapes.values())) / 1e6
    print(f"{chosen.method}: adapters of rank {chosen.rank}, and baked into checkpoints of {each:.0f} MB in float32")
    print(f"width {chosen.width}; {conditions(bench)}; memory above the imports")
    rows = []
    for number in range(1, chosen.steps + 1):
        models = {"adapter": write_adapter(bench.folder / f"adapter-{number}", shapes, chosen.rank, number)}
        models["full"] = bench.folder / f"model-{number}"
        alone = {"method": "task_arithmetic", "base": str(base), "kind": "model", "threads": bench.threads}
        merging.merge([models["adapter"]], output=models["full"], **alone)
        low, full = (take_step(bench, store, models[kind], base, copied=False) for kind, store in stores.items())
        row = [f"{number}", f"{low.rank or '-'}"]
        for pick in (lambda c: c.seconds, lambda c: c.cpu, lambda c: c.memory / 1e6, lambda c: c.disk / 1e6):
            row += [f"{pick(low):.2f}", f"{pick(full):.2f}", f"{pick(full) / pick(low):.1f}x"]
        rows.append(row)
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
        for model in models.values():
            shutil.rmtree(model)
    costs = ("seconds", "core seconds", "peak MB", "store MB")
    print(table(["step", "rank", *(f"{cost} {kind}" for cost in costs for kind in ("factors", "full", "ratio"))], rows))
    exports = [bench.folder / f"{kind}.safetensors" for kind in stores]
    for store, file in zip(stores.values(), exports, strict=True):
        store.export(file, threads=bench.threads)
    gap = apart(*(load_file(file) for file in (*exports, base / "model.safetensors")))
    print(f"the two exports differ by {gap:.1e} of the merged change", flush=True)


# ---------------------------------------------------------------- real tasks


@dataclass(frozen=True)
class Row:
    """A row of the table: a method that a store grows by, or (``joint``) one that sees all models at once."""

    title: str
    method: str
    parameters: Mapping[str, Any]
    joint: bool = False

    @property
    def named(self) -> str:
        """Method and parameters."""
        return f"{self.method} {json.dumps(dict(self.parameters))}"


CHOSEN = {"full": 0.5, "lora": 0.6}  # scales of task arithmetic that quality.py chooses on validation texts
ROWS = (
    Row("opcm", "opcm", {}),
    Row("task arithmetic 0.3", "task_arithmetic", {"scale": 0.3}),
    Row("ties 0.2, scale 1", "ties", {"density": 0.2}),
    Row("joint task arithmetic 0.3", "task_arithmetic", {"scale": 0.3}, joint=True),
    Row("joint task arithmetic, scale chosen", "task_arithmetic", {}, joint=True),
    Row("joint opcm", "opcm", {}, joint=True),
)


@dataclass(frozen=True)
class Kept:
    """What a method kept in one order: accuracies in per cent right after each task's own step, and in the end."""

    own: dict[str, float]
    last: dict[str, float]

    @property
    def average(self) -> float:
        """Average accuracy in the end."""
        return statistics.fmean(self.last.values())

    @property
    def transfer(self) -> float:
        """Backward transfer, over the tasks before the last one as is usual; negative is forgetting."""
        return statistics.fmean(self.last[name] - value for name, value in self.own.items())


def write_real(folder: Path, kind: str, models: Models, judge: Judge, steps: int) -> dict[str, Path]:
    """The base and the models of a kind as files, without the tensors that no fine-tune touches."""
    from quality_models import LORA

    config = {"architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 6}
    write_model(folder / "base", models.base, config)
    paths = {}
    for name, weights in zip(judge.tasks, models.each, strict=True):
        paths[name] = folder / name
        if kind == "full":
            write_model(paths[name], weights, config)
        else:
            paths[name].mkdir()
            found = judge.work / f"{kind}-{steps}" / f"{name}.safetensors"
            shutil.copy(found, paths[name] / "adapter_model.safetensors")
            (paths[name] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **LORA}))
    return paths


def percent(right: Tensors) -> dict[str, float]:
    """Accuracies of answers."""
    return {name: 100 * each.mean().item() for name, each in right.items()}


@dataclass
class Real:
    """The tasks, the models of one kind as files, the orders in which they come, and the merges that came of each."""

    kind: str
    judge: Judge
    folder: Path
    base: Tensors
    models: dict[str, Path]
    orders: list[list[str]]
    asked: list[tuple[Tensors, dict[str, float]]] = field(default_factory=list)

    def accuracies(self, merged: Tensors) -> dict[str, float]:
        """Accuracies on all tasks; what differs from an earlier merge by rounding only is not asked again."""
        for earlier, found in self.asked:
            if apart(earlier, merged, self.base) < ROUNDING:
                return found
        self.asked.append((merged, percent(self.judge.right(merged, "test"))))
        return self.asked[-1][1]

    def kept(self, row: Row, finals: dict[tuple[str, int], Tensors]) -> list[Kept]:
        """What a row keeps in each order; ``finals`` takes the last merges of stores, by method and order."""
        found = []
        for number, order in enumerate(self.orders):
            if not row.joint:
                one, finals[row.named, number] = self.grown(row, order)
                found.append(one)
                continue
            merged = self.joint(row, order)
            found.append(Kept({}, self.accuracies(merged)))
            grew = finals.get((row.named, number))
            if grew is not None:
                gap = apart(grew, merged, self.base)
                print(f"{self.kind} {row.title}, order {number + 1}: the store differs by {gap:.1e} of the change")
            if row.method != "opcm":
                break  # the order does not matter
        return found

    def grown(self, row: Row, order: Sequence[str]) -> tuple[Kept, Tensors]:
        """What a store keeps that takes the models in this order, and its last merge."""
        own: dict[str, float] = {}
        weights: Tensors = {}
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            output = Path(scratch) / "merged.safetensors"
            store = new_store(Path(scratch) / "store", self.folder / "base", row.method, **row.parameters)
            for name in order:
                store.add(self.models[name], threads=1)
                store.gc(keep=1)
                store.export(output, threads=1, overwrite=True)
                weights = load_file(output)
                if name != order[-1]:
                    own |= percent(self.judge.right(weights, "test", [name]))
        return Kept(own, self.accuracies(weights)), weights

    def joint(self, row: Row, order: Sequence[str]) -> Tensors:
        """The merge of all models at once."""
        chosen = row.method == "task_arithmetic" and not row.parameters
        parameters = {"scale": CHOSEN[self.kind]} if chosen else row.parameters
        output = self.folder / "joint.safetensors"
        options = {"base": str(self.folder / "base"), "kind": "model", "threads": 1, "overwrite": True, **parameters}
        import_everything().merge([self.models[name] for name in order], method=row.method, output=output, **options)
        return load_file(output)


def orders_of(names: Iterable[str], number: int) -> list[list[str]]:
    """Random orders, by fixed seeds."""
    found = [list(names) for _ in range(number)]
    for seed, order in enumerate(found, start=1):
        random.Random(seed).shuffle(order)
    return found


def apart(one: Tensors, other: Tensors, base: Tensors) -> float:
    """How far two merges are from each other, as a share of the change."""
    gap, change = (
        sum((a[name].double() - b[name]).square().sum().item() for name in base)
        for a, b in ((one, other), (other, base))
    )
    return float((gap / change) ** 0.5)


def spread(values: Sequence[float], mean: str = "{:.1f}") -> str:
    """Mean and standard deviation over the orders."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return mean.format(statistics.fmean(values)) + deviation


def of_tasks(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print what stores of real models keep, against merges of all of them at once."""
    from quality_models import Judge, Models
    from tasks import DATA

    torch.set_num_threads(1)  # the sums of one thread come out the same on every run
    judge = Judge(chosen.names.split(","), chosen.cache, DATA, 1, chosen.texts)
    orders = orders_of(judge.tasks, chosen.orders)
    print(f"{chosen.names}: {chosen.texts} test texts a task, mean and deviation over {chosen.orders} random orders")
    everything: dict[str, Any] = {"orders": orders}
    for kind in chosen.kind:
        models = Models(kind, judge, chosen.training)
        own = {}
        for name, weights in zip(judge.tasks, models.each, strict=True):
            own |= percent(judge.right(weights, "test", [name]))
        paths = write_real(bench.folder / kind, kind, models, judge, chosen.training)
        real = Real(kind, judge, bench.folder / kind, models.base, paths, orders)
        rows = [["each task's own model", f"{statistics.fmean(own.values()):.1f}", "-"]]
        everything[kind] = {"own": own}
        finals: dict[tuple[str, int], Tensors] = {}
        for row in ROWS:
            start = time.perf_counter()
            kept = real.kept(row, finals)
            transfer = spread([one.transfer for one in kept], "{:+.1f}") if kept[0].own else "-"
            rows.append([row.title, spread([one.average for one in kept]), transfer])
            everything[kind][row.title] = [vars(one) for one in kept]
            print(*rows[-1], f"{time.perf_counter() - start:.0f} s", sep="  ", file=sys.stderr, flush=True)
        print("\n" + table([f"{kind} method", "average accuracy", "backward transfer"], rows), flush=True)
        shutil.rmtree(bench.folder / kind)
    if chosen.json:
        chosen.json.write_text(json.dumps(everything, indent=1))


# ---------------------------------------------------------------- the command line

TABLES = {
    "stream": (stream, "seconds and memory of a step, from the second to the last"),
    "factored": (factored, "adapters against the same changes in full"),
    "tasks": (of_tasks, "what is kept of real tasks"),
}


def main() -> None:
    """Parse the command line and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group(required=True)
    for name, (_, meaning) in TABLES.items():
        kinds.add_argument(f"--{name}", dest="table", action="store_const", const=name, help=meaning)
    kinds.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=50, help="models of --stream or --factored")
    parser.add_argument("--size", type=float, default=0.1, help="gigabytes of each full checkpoint")
    parser.add_argument("--width", type=int, default=256, help="of the matrices: OPCM takes each apart at each step")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters of --factored")
    parser.add_argument("--method", default="opcm", help="how the stores of --stream and --factored grow")
    parser.add_argument("--threads", type=int, default=1, help="of a step")
    parser.add_argument("--work", type=Path, help="folder for models and stores (default: the temporary one)")
    parser.add_argument("--names", default="spam,wordnet,speech,era,tweets", help="of the tasks")
    parser.add_argument("--kind", nargs="+", choices=("full", "lora"), default=["full", "lora"], help="of fine-tunes")
    parser.add_argument("--texts", type=int, default=500, help="test texts a task")
    parser.add_argument("--orders", type=int, default=5, help="random orders of the tasks")
    parser.add_argument("--training", type=int, default=400, help="training steps of the fine-tunes of --tasks")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "merging-quality", help="of quality.py")
    parser.add_argument("--json", type=Path, help="write everything of --tasks there")
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        TABLES[chosen.table][0](Bench(Path(folder), None, chosen.threads), chosen)


if __name__ == "__main__":
    main()
