"""Speed and memory of single merging methods, one table per run.

    python tests/benchmarks/methods.py --peer --mergekit-python peer/bin/python
    python tests/benchmarks/methods.py --ours
    python tests/benchmarks/methods.py --table --mergekit-python peer/bin/python
    python tests/benchmarks/methods.py --memory --size 0.5 2
    python tests/benchmarks/methods.py --adapters
    python tests/benchmarks/methods.py --dense

`--peer` has the methods that mergekit has too, against it; `--ours` every method that merges full checkpoints, against
reading the inputs and copying the output. `--table` is the table of the element-wise methods in the docs: the merge
without imports, in seconds and processor seconds; mergekit's is measured once. `--memory` tells what PCB takes, whose
released code holds every task vector at once. `--adapters` merges LoRA adapters of a 7B model by the methods that work
on factors, and times one step of OPCM on a matrix in full beside them. `--dense` merges one full matrix by TSV, and by
SVDs as its formula stands. Rounds, medians and the words of the columns are those of speed.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from speed import (
    CASES,
    COLUMNS,
    OUR_COLUMNS,
    PEER_FOLDER,
    Bench,
    Case,
    Measured,
    Shapes,
    compare,
    conditions,
    header,
    import_everything,
    measure,
    median_cells,
    memory_available,
    options,
    prepare,
    private_bytes,
    succeeded,
    table,
    tensor_bytes,
)

THREE = ("a", "b", "c")
PLAIN = {"scope": "tensor", "vote": "weighted", "zero": "plus"}
TRIMMED = PLAIN | {"density": 0.5}
PEER = {"weight": 1.0, "density": 0.5, "normalize": True, "lambda": 1.0}

PEER_CASES = {
    "ties": Case("ties", THREE, TRIMMED, PEER, base="base"),
    "dare_ties": Case(
        "dare+ties",
        THREE,
        TRIMMED | {"density": 1, "drop": 0.5, "rescale": "l1"},
        PEER,
        base="base",
        peer_method="dare_ties",
    ),
    "sce": Case("sce", THREE, {"density": 0.5, "select": "deltas"}, {"select_topk": 0.5}, base="base"),
    "della": Case(
        "della+ties",
        THREE,
        PLAIN | {"ties.density": 1, "della.density": 0.5, "rescale": "l1"},
        PEER,
        base="base",
        peer_method="della",
    ),
    "breadcrumbs": Case("breadcrumbs", THREE, {"density": 0.5}, {"weight": 1.0, "density": 0.5}, base="base"),
    "karcher": Case("karcher", THREE, {}, {}),
    "ties, whole model": Case("ties", THREE, {"density": 0.5}, base="base"),
    "pcb": Case("pcb", THREE, {}, base="base"),
}

TABLE_CASES = {
    **CASES,
    "karcher": PEER_CASES["karcher"],
    "multislerp": Case("multislerp", THREE, {}, {"weight": 1.0}),
    "ties": PEER_CASES["ties"],
    "ties, whole model": PEER_CASES["ties, whole model"],
    "sce": PEER_CASES["sce"],
    "magmax": Case("magmax", THREE, {}, base="base"),
    "consensus": Case("consensus", THREE, {}, base="base"),
    "dare": Case("dare", THREE, {}, base="base"),
    **{name: PEER_CASES[name] for name in ("dare_ties", "breadcrumbs", "della", "pcb")},
}
"""The methods that merge elements by themselves, with the statistics of tensors and models that they need."""

NO_CHECKPOINTS = ("orthogonalize",)  # hands full checkpoints on as they are; methods of singular values: --dense

PCB = Case("pcb", THREE, {}, base="base")
RELEASED_SHARE = 12  # the released PCB takes about so many times its task vectors
RELEASED_SIZES = (0.1, 0.2, 0.5, 1.0, 2.0)

ADAPTERS = tuple(f"task{i}" for i in range(8))
RANK, HIDDEN, INNER = 16, 4096, 11008
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
ADAPTER_METHODS: dict[str, dict[str, Any]] = {
    "opcm": {},
    "dop": {},
    "do": {},
    "orthogonalize": {},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {},
    "dc_merge": {},
    "star": {},
    "wudi": {},
    "actmat": {},
    "ace": {},
    "svd": {},
    "knots+ties": {"density": 1.0},
    "core+tsv": {},
    "ctm+ties": {"density": 0.25, "scope": "tensor"},
    "svc+task_arithmetic": {},
    "pico+task_arithmetic": {},
    "varm": {},
    "karcher": {"space": "changes"},
}


# ---------------------------------------------------------------- full checkpoints


def our_cases() -> dict[str, Case]:
    """Every method that merges full checkpoints, with its defaults, on as many models as it takes, at most three."""
    merging = import_everything()
    cases = {}
    for name in merging.METHODS:
        method = merging.chain(name)
        most = min(link.models[1] or len(THREE) for link in method.links())
        base = "base" if method.merge_space == "delta" else None
        alone = name not in NO_CHECKPOINTS and not method.needs_statistics
        if alone and not any(link.decomposed_side for link in method.links()):
            cases[method.chain] = Case(name, THREE[:most], {}, base=base)
    return cases


def chosen_cases(cases: dict[str, Case], names: list[str] | None) -> dict[str, Case]:
    """The cases of these names, all of them by default."""
    unknown = set(names or ()) - cases.keys()
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(map(repr, cases))}")
    return {name: case for name, case in cases.items() if not names or name in names}


def against_peer(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print the table of methods that mergekit has too."""
    if bench.peer is None:
        raise SystemExit("--peer needs --mergekit-python")
    print("3 fine-tunes and a base in bfloat16; target: 8 times mergekit's speed without imports")
    compare(bench, chosen.size, chosen.repeats, chosen_cases(PEER_CASES, chosen.cases))


def against_copying(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print the table of all methods."""
    bench.peer = None
    print(
        "each method with its defaults, on 3 fine-tunes in bfloat16, slerp on 2; all but linear and slerp need a base"
    )
    compare(bench, chosen.size, chosen.repeats, chosen_cases(our_cases(), chosen.cases))


def for_the_docs(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print the table of element-wise methods."""
    print(conditions(chosen.repeats, bench.threads))
    cases = chosen_cases(TABLE_CASES, chosen.cases)
    columns = tuple(each for each in COLUMNS if not each[0].startswith("whole"))
    rows = []
    for size in chosen.size:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            here = Bench(Path(folder), bench.peer, bench.threads)
            prepare(here, size, ("a", "b", "base", "c"))
            for name, case in cases.items():
                here.compile(case)
                rounds = [here.round_alone(case, against_peer=number == 0) for number in range(chosen.repeats)]
                rows.append([f"{name}, {size:g} GB", *median_cells(rounds, columns)])
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(table(["case", *(key for key, _ in columns)], rows))


# ---------------------------------------------------------------- PCB's memory


def memory_of_pcb(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print what PCB takes, and what its released procedure takes where that fits into memory."""
    print("peak private memory above the imports; vectors: the changes of 3 fine-tunes in float32")
    print(f"{memory_available() / 1e9:.0f} GB of memory are available")
    released = [size for size in RELEASED_SIZES if fits(size)]
    rows = []
    for size in sorted({*chosen.size, *released[-2:]}):
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            here = Bench(Path(folder), None, bench.threads)
            parameters = prepare(here, size, PCB.inputs)
            label = f"{2 * parameters / 1e9:.2f} GB each"
            rows.append(memory_row(f"ours, {label}", here.ours_alone(PCB), parameters))
            if size in released[-2:]:
                rows.append(memory_row(f"released procedure, {label}", released_alone(here), parameters))
    print(table(["case", "seconds", "peak MB", "vectors MB", "peak/vectors"], rows))
    print("the released procedure sorts all vectors whole; it is left out where that would not fit into memory")


def fits(gigabytes: float) -> bool:
    """Whether the released procedure has room for checkpoints of this size in bfloat16."""
    vectors = len(THREE) * 4 * gigabytes * 1e9 / 2
    return RELEASED_SHARE * vectors < memory_available()


def memory_row(name: str, measured: Measured, parameters: int) -> list[str]:
    """A row of the table of PCB."""
    peak, vectors = measured["peak_private_bytes"] / 1e6, len(THREE) * 4 * parameters / 1e6
    return [name, f"{measured['seconds']:.1f}", f"{peak:.0f}", f"{vectors:.0f}", f"{peak / vectors:.3f}"]


def released_alone(bench: Bench) -> Measured:
    """The released procedure in a process of its own."""
    return succeeded(json.loads(bench.run([sys.executable, __file__, "--released", str(bench.folder)])[1]))


def released(folder: Path) -> None:
    """In a process of its own: PCB on flat task vectors, as its code does it, written down for the tests."""
    sys.path.insert(0, str(PEER_FOLDER.parent))
    from support.references import pcb

    floor = private_bytes()
    print(json.dumps(measure(lambda: pcb(task_vectors(folder)), str(folder), floor)))


def task_vectors(folder: Path) -> torch.Tensor:
    """The changes of the fine-tunes ``[n, parameters]`` in float32, held once."""
    base = flat(folder / "base")
    changes = torch.empty(len(THREE), len(base))
    for change, name in zip(changes, THREE, strict=True):
        change.copy_(flat(folder / name)).sub_(base)
    return changes


def flat(folder: Path) -> torch.Tensor:
    """A checkpoint's parameters one after the other, in float32."""
    from safetensors.torch import load_file

    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return torch.cat([value.flatten() for part in parts for value in part.values()]).float()


# ---------------------------------------------------------------- adapters


def adapter_shapes(layers: int) -> Shapes:
    """The factors of an adapter, as PEFT names them."""
    shapes: Shapes = {}
    for layer in range(layers):
        for module, (out, into) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes |= {f"{name}.lora_A.weight": (RANK, into), f"{name}.lora_B.weight": (out, RANK)}
    return shapes


def write_adapters(folder: Path, layers: int) -> None:
    """Adapters of a model of 7 billion parameters (with 32 layers), bfloat16, filled with noise."""
    shapes = adapter_shapes(layers)
    targets = sorted(module.rpartition(".")[2] for module in MODULES)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    generator = torch.Generator().manual_seed(0)
    for name in ADAPTERS:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        with (folder / name / "adapter_model.safetensors").open("wb") as stream:
            stream.write(header(shapes))
            for shape in shapes.values():
                values = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
                stream.write(values.view(torch.int16).numpy().data)


def of_adapters(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print the table of methods that merge factors, and what the same takes on full matrices."""
    print(conditions(chosen.repeats, bench.threads))
    write_adapters(bench.folder, chosen.layers)
    each = tensor_bytes(bench.folder / ADAPTERS[0]) / 1e6
    print(
        f"{len(ADAPTERS)} adapters of rank {RANK}, {chosen.layers} layers, {each:.0f} MB each; target with 32 layers: a"
    )
    print("minute on 2 cores", flush=True)
    rows, seconds = [], 0.0
    wanted = set(chosen.cases or ADAPTER_METHODS)
    for name, parameters in ADAPTER_METHODS.items():
        if name not in wanted:
            continue
        rounds = [bench.round(Case(name, ADAPTERS, parameters)) for _ in range(chosen.repeats)]
        rows.append([name, *median_cells(rounds, OUR_COLUMNS)])
        if name == "opcm":
            seconds = statistics.median(found["merge ours"] for found in rounds)
    print(table(["case", *(key for key, _ in OUR_COLUMNS)], rows))
    if seconds:
        dense_steps(seconds, chosen.layers)


def dense_steps(factored: float, layers: int) -> None:
    """Print what OPCM's steps would take on full matrices, from one of the smallest."""
    step = dense_step(HIDDEN, HIDDEN)
    steps = len(MODULES) * layers * (len(ADAPTERS) - 1)
    print(
        f"in full, one step on one matrix of {HIDDEN} x {HIDDEN}: {step:.1f} s; as many for each of the {steps} steps "
        f"(more than half of the matrices are this small): {step * steps / 3600:.1f} h, {step * steps / factored:.0f} "
        f"times as long as on factors"
    )


def dense_step(rows: int, columns: int) -> float:
    """Seconds to project one full change off another, both of full rank, so that the faster decomposition serves."""
    from merging.methods.opcm import project

    generator = torch.Generator().manual_seed(0)
    delta, previous = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    start = time.perf_counter()
    project(delta, previous, 0.5)
    return time.perf_counter() - start


# ---------------------------------------------------------------- full matrices


def of_full_matrices(bench: Bench, chosen: argparse.Namespace) -> None:
    """Print what TSV of one full matrix takes, and what its formula does by plain SVDs."""
    from merging.methods.tsv import Tsv

    torch.set_num_threads(bench.threads or torch.get_num_threads())
    print(
        f"TSV of one matrix of {HIDDEN} x {HIDDEN}, {len(ADAPTERS)} changes of full rank; {torch.get_num_threads()} "
        f"threads"
    )
    generator = torch.Generator().manual_seed(0)
    changes = list(torch.randn(len(ADAPTERS), HIDDEN, HIDDEN, generator=generator))
    seconds, merged = {}, {}
    for name, work in {
        "ours": lambda: Tsv().combine(changes, HIDDEN),
        "plain SVDs, float32": lambda: tsv_by_svd(changes),
        "plain SVDs, float64": lambda: tsv_by_svd([change.double() for change in changes]),
    }.items():
        start = time.perf_counter()
        merged[name] = work().double()
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    ours = merged["ours"]
    heads = ["case", "seconds", "times ours", "relative difference from ours"]
    apart = {name: float((each - ours).norm() / ours.norm()) for name, each in merged.items()}
    print(table(heads, [[n, f"{s:.1f}", f"{s / seconds['ours']:.1f}", f"{apart[n]:.1e}"] for n, s in seconds.items()]))


def tsv_by_svd(changes: list[torch.Tensor]) -> torch.Tensor:
    """The formula as it is published."""
    kept = HIDDEN // len(changes)
    parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
    left = torch.linalg.svd(torch.cat([u[:, :kept] for u, _, _ in parts], 1), full_matrices=False)
    right = torch.linalg.svd(torch.cat([vh[:kept] for _, _, vh in parts]), full_matrices=False)
    values = torch.cat([s[:kept] for _, s, _ in parts])
    merged: torch.Tensor = (left[0] @ left[2]) * values @ (right[0] @ right[2])
    return merged


# ---------------------------------------------------------------- the command line

TABLES = {
    "--table": (for_the_docs, "element-wise methods, without imports, in seconds and processor seconds"),
    "--peer": (against_peer, "against mergekit"),
    "--ours": (against_copying, "all methods on full checkpoints, against copying"),
    "--memory": (memory_of_pcb, "of PCB, against its released procedure"),
    "--adapters": (of_adapters, "methods that merge factors, on adapters of a 7B model"),
    "--dense": (of_full_matrices, "TSV of a full matrix, against plain SVDs"),
}


def main() -> None:
    """Parse the command line and print one table."""
    parser = options(__doc__)
    kinds = parser.add_mutually_exclusive_group(required=True)
    for name, (_, meaning) in TABLES.items():
        kinds.add_argument(name, dest="table", action="store_const", const=name, help=meaning)
    kinds.add_argument("--released", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", help="these rows of --peer, --ours or --adapters alone")
    parser.add_argument("--layers", type=int, default=32, help="layers of the adapters' model")
    chosen = parser.parse_args()
    if chosen.released:
        released(chosen.released)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        TABLES[chosen.table][0](Bench(Path(folder), chosen.mergekit_python, chosen.threads), chosen)


if __name__ == "__main__":
    main()
