"""Whole models of Llama's shapes merged by TSV from files: some layers measured, all of them extrapolated.

Each layer is a file of its own, so that one layer is in memory while the models are made.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from predict import shapes
from safetensors.torch import save_file
from spectral_changes import make_changes
from speed import table
from torch import Tensor

from merging.engine.threads import cores
from merging.methods import chain

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.peaks import peak_of

__all__ = ["MODELS", "measure_model"]

NAMES = ("base", "one", "two", "three", "four")
FINE_TUNES = len(NAMES) - 1
DISK = 25e9
"""Most bytes of all files together, with the output."""

SPARE = 1e9
"""Bytes of the disk that stay free."""

CHANGE = 0.002
"""Size of a change's entries; a weight's are ten times as large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a Llama; ``heads`` are the query heads for each head of keys and values."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    heads: int = 1
    tied: bool = False

    def tensors(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors outside layers and in some layers."""
        found = shapes(self.hidden, self.inner, layers, self.vocabulary, self.heads)
        return {name: shape for name, shape in found.items() if not (self.tied and name.startswith("lm_head"))}

    def elements(self, layers: int) -> int:
        """Return the elements of a model with some layers."""
        return sum(map(prod, self.tensors(layers).values()))


MODELS = {"1b": Sizes(hidden=2048, inner=8192, layers=16, vocabulary=128256, heads=4, tied=True)}
LARGER = Sizes(hidden=4096, inner=11008, layers=32, vocabulary=32000)
"""The model of 7 billion parameters that is extrapolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Processor seconds and seconds of a merge, and bytes that it took above its imports and that it promised."""

    processor: float
    seconds: float
    taken: int = 0
    promised: int = 0

    def cells(self) -> list[str]:
        """Return the cells of a table."""
        memory = [f"{self.taken / 1e6:.0f} MB", f"{self.promised / 1e6:.0f} MB"] if self.promised else ["", ""]
        return [f"{self.processor:,.0f} s", f"{self.seconds:,.0f} s", *memory]


def measure_model(name: str, layers: int | None, folder: Path | None) -> str:
    """Merge four fine-tunes of a size, and return a table of seconds; models of which ``layers`` are measured."""
    sizes, threads = MODELS[name], cores()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the files are deleted
    with tempfile.TemporaryDirectory(dir=folder) as place:
        count = _count_layers(sizes, layers or sizes.layers, Path(place))
        make_models(Path(place), sizes, count)
        vocabulary = _merge(Path(place), threads, "vocabulary.safetensors")
        measured = _merge(Path(place), threads)
    layer = Cost(
        processor=(measured.processor - vocabulary.processor) / count,
        seconds=(measured.seconds - vocabulary.seconds) / count,
    )
    whole = Cost(
        processor=vocabulary.processor + sizes.layers * layer.processor,
        seconds=vocabulary.seconds + sizes.layers * layer.seconds,
    )
    rows = [
        ["vocabulary alone, measured", *vocabulary.cells()],
        [f"with {count} layers, measured", *measured.cells()],
        ["a layer", *layer.cells()],
        [f"{name}, {sizes.layers} layers, {'measured' if count == sizes.layers else 'extrapolated'}", *whole.cells()],
        *_extrapolate(vocabulary.processor / sizes.elements(0), threads),
    ]
    heads = [f"tsv of {FINE_TUNES}", "processor", f"by the clock, {threads} threads", "memory", "promised"]
    return table(heads, rows)


def _count_layers(sizes: Sizes, wanted: int, folder: Path) -> int:
    """Return how many layers are measured: those asked for, unless the disk is too short."""
    room = min(DISK, shutil.disk_usage(folder).free - SPARE)
    files = len(NAMES) + 1  # and the output
    fixed = 2 * files * sizes.elements(0)
    count = min(wanted, sizes.layers, int((room - fixed) // (2 * files * (sizes.elements(1) - sizes.elements(0)))))
    if count < 1:
        sys.exit(
            f"{folder}: has room for no layer: choose a --folder with {fixed / 1e9 + 2:.0f} GB, and --layers above 0"
        )
    if count < wanted:
        print(f"{count} of {wanted} layers are measured", file=sys.stderr)
    return count


def make_models(folder: Path, sizes: Sizes, layers: int) -> None:
    """Write a base and its fine-tunes in bfloat16, with a file for the vocabulary and one for each layer."""
    places: dict[str, str] = {}
    for number, (file, tensors) in enumerate(_files(sizes, layers)):
        places |= dict.fromkeys(tensors, file)
        found = {name: _values(shape, 1000 * number + at) for at, (name, shape) in enumerate(tensors.items())}
        for at, model in enumerate(NAMES):
            (folder / model).mkdir(exist_ok=True)
            save_file({key: each[at] for key, each in found.items()}, folder / model / file, {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": sizes.tied}
    index = {"metadata": {"total_size": 2 * sizes.elements(layers)}, "weight_map": places}
    for model in NAMES:
        (folder / model / "config.json").write_text(json.dumps(config))
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(sizes: Sizes, layers: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Yield the name of each file and the shapes of its tensors."""
    found = sizes.tensors(layers)
    for place in ("vocabulary", *(f"layers.{layer}" for layer in range(layers))):
        inside = f"model.{place}."
        own = {
            name: shape
            for name, shape in found.items()
            if name.startswith(inside) or (place == "vocabulary" and not name.startswith("model.layers."))
        }
        yield f"{place}.safetensors", own


def _values(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """Return a base's tensor and those of its fine-tunes, bfloat16; of tables and vectors all changes are noise."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=random).mul_(10 * CHANGE)
    if len(shape) == 2 and max(shape) < 1 << 16:
        changes = make_changes((shape[0], shape[1]), FINE_TUNES, "fine-tune", seed)
        return [base.bfloat16(), *(change.mul_(CHANGE).add_(base).bfloat16() for change in changes)]
    tuned = (torch.randn(shape, generator=random).mul_(CHANGE).add_(base).bfloat16() for _ in range(FINE_TUNES))
    return [base.bfloat16(), *tuned]


def _merge(folder: Path, threads: int, file: str = "") -> Cost:
    """Merge the models, or one of their files, in a process of its own."""
    base, *models = (str(folder / name / file) for name in NAMES)
    output = folder / f"merged{Path(file).suffix}"
    before = _child_seconds()
    peak = peak_of({"models": models, "base": base, "method": "tsv", "output": str(output)}, threads)
    processor = _child_seconds() - before
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink()
    return Cost(processor=processor, seconds=peak.seconds, taken=peak.taken, promised=peak.promised)


def _child_seconds() -> float:
    """Return the processor seconds of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _extrapolate(element: float, threads: int) -> list[list[str]]:
    """Return rows of the larger model's matrices, one of each shape measured, and of all of it.

    ``element`` are the processor seconds to read, average and write an element of all models.
    """
    layer = LARGER.tensors(1).keys() - LARGER.tensors(0).keys()
    matrices = Counter(tuple(sorted(shape)) for name, shape in LARGER.tensors(1).items() if name in layer)
    rows, total = [], element * LARGER.elements(LARGER.layers)
    for shape, count in matrices.items():
        if len(shape) < 2:
            continue
        changes = make_changes((shape[0], shape[1]), FINE_TUNES, "fine-tune")
        start = time.process_time()
        chain("tsv").combine(changes, shape[0])  # type: ignore[attr-defined]
        seconds = time.process_time() - start
        total += LARGER.layers * count * seconds
        rows.append([f"7b, one matrix of {shape[1]} x {shape[0]}, measured", f"{seconds:,.0f} s", "", "", ""])
    cost = Cost(processor=total, seconds=total / threads)
    return [*rows, [f"7b, {LARGER.layers} layers, extrapolated", *cost.cells()]]
