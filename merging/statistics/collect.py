"""Gathering statistics of a model's layers on examples, into a file that methods read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from merging.api.arguments import check_path
from merging.api.bake import bake
from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.display.tables import Displayed
from merging.engine.resources import pick_device
from merging.errors import InputError, OptionError, option
from merging.hub.address import local_path
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import output_path
from merging.plan.checks import key_of
from merging.sources import Adapter, Model
from merging.sources.name_ends import find_by_end, index_ends
from merging.statistics.examples import StatisticsExample, read_statistics_examples
from merging.statistics.fisher_information import FisherAccumulator, FisherOutputs
from merging.statistics.gram_accumulator import GramAccumulator
from merging.statistics.layers import HookedLayer, find_layers, group_by_input, hook_inputs
from merging.statistics.network import RunnableModel, load_runnable
from merging.statistics.writing import GatheredLayers, write_statistics
from merging.storage.staging import StagedOutput, check_destination
from merging.type_checks import check_types

__all__ = ["CollectedStatistics", "collect_statistics"]


@dataclass(frozen=True, slots=True, repr=False)
class CollectedStatistics(Displayed):
    """A file with statistics that was written.

    Attributes:
        path: the file.
        model: the name of the model.
        key: the key of the model's content, by which a merge finds the file.
        layers: the number of layers whose inputs were gathered.
        examples: the number of examples.
        tokens: the number of tokens of all texts, or of images.
        fisher: the outputs of the Fisher information, ``sampled`` or ``labels``; None without it.
        bytes: the size of the file's tensors in bytes.
        seconds: the time that it took.
        notices: remarks for people.

    Example:
        >>> import merging
        >>> from pathlib import Path
        >>> done = Path("texts.txt").write_text("one text a line\\nand another")
        >>> merging.collect_statistics("one", "texts.txt", "one-stats.safetensors").to_dict()["tokens"]
        10
    """

    path: Path
    model: str
    key: str
    layers: int
    examples: int
    tokens: int
    fisher: FisherOutputs | None
    bytes: int
    seconds: float
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path), "notices": list(self.notices)}


@check_types("progress")
def collect_statistics(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    column: str = "text",
    label_column: str = "label",
    examples: int = 100,
    max_length: int = 512,
    max_tokens: int | None = None,
    directions: int = 512,
    fisher: FisherOutputs | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> CollectedStatistics:
    """Run examples through a model, and write statistics of its layers to a file.

    The file holds the Gram matrix of the inputs of each linear layer in half precision: its leading directions and the
    rest of its diagonal. With ``fisher`` it also holds the diagonal of the Fisher information of all parameters.
    Methods such as ``regmean``, ``esm`` and ``fisher`` read it (``stats``); it names the model by a key of its content.

    Args:
        model: a model of transformers, or an adapter: a folder, or a name on the Hub. An adapter is
            run in its base.
        data: the examples: a file of JSON lines, a text file with an example a line, or a folder of images.
        output: the file to write, which ends in ``.safetensors``.
        base: the base of an adapter, if it is another one than the adapter states.
        column: the field of JSON lines with the text.
        label_column: the field with the label, for ``fisher="labels"``.
        examples: the most examples that are read.
        max_length: the most tokens of an example; longer ones are cut.
        max_tokens: the most tokens of all examples; no limit by default.
        directions: the most directions of a layer that are kept.
        fisher: ``sampled`` for outputs drawn from the model's own predictions, ``labels`` for the labels of the data,
            or the next tokens of a text.
        seed: the seed of outputs that are drawn.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, ``xpu`` or ``auto``: where the model runs.
        dtype: the type to compute in; by default float32 on a CPU, and the stored type elsewhere.
        overwrite: whether an output that exists is replaced.
        progress: True for a bar, or a function that receives the examples done and their number.

    Returns:
        The path, the key of the model, and the numbers of layers, examples and tokens.

    Raises:
        MergingError: for a model that cannot run, for data that are no examples, and for an output that cannot be
            written. Nothing is left behind then.

    Example:
        >>> import merging
        >>> from pathlib import Path
        >>> done = Path("texts.txt").write_text("one text a line\\nand another")
        >>> found = merging.collect_statistics("one", "texts.txt", "one-stats.safetensors")
        >>> found.layers, found.examples
        (37, 2)
    """
    began = time.monotonic()
    for name, value in (("examples", examples), ("max_length", max_length), ("directions", directions)):
        if value < 1:
            raise OptionError(f"{option(name, value)}: should be at least 1")
    if fisher not in (None, "sampled", "labels"):
        raise OptionError(f"{option('fisher', fisher)}: sampled or labels")
    destination = output_path(check_path(output, "output"))
    if destination.suffix != ".safetensors":
        raise OptionError(f"{output}: statistics are one file: name it .safetensors")
    source = local_path(str(data))
    if not source.exists():
        raise InputError(f"{data}: there is no such file or folder")
    show = resolve_progress(progress)
    opened = open_model(model)
    read = read_statistics_examples(source, column, label_column if fisher == "labels" else None)
    check_destination(destination, opened.files, 0, overwrite)
    with StagedOutput(destination, overwrite, True) as staged:
        running = load_runnable(
            _as_folder(opened, str(model), base, staged.scratch),
            name=str(model),
            images=source.is_dir(),
            max_length=max_length,
            device=pick_device(str(device)),
            dtype=dtype,
        )
        gathered = _gather(
            running,
            islice(read, examples),
            most=max_tokens,
            directions=directions,
            fisher=FisherAccumulator(running, fisher, seed) if fisher else None,
            progress=show,
            expected=examples,
        )
        if not gathered.examples:
            raise InputError(f"{data}: holds no examples")
        key = key_of(opened)
        facts = {
            "examples": gathered.examples,
            "tokens": gathered.tokens,
            "max_length": max_length,
            "data": source.name,
            "fisher": fisher,
            **({"seed": seed} if fisher == "sampled" else {}),
        }
        public_name = str(opened.origin or Path(model).absolute().name)  # no folders of this machine
        identity = {"model": public_name, "key": key, "origin": str(opened.origin or "")}
        named = name_layers(gathered, opened, base)
        nbytes = write_statistics(staged, destination, named, identity, facts)
        staged.commit()
    report_notices(staged.notices)
    return CollectedStatistics(
        path=destination,
        model=str(model),
        key=key,
        layers=len(named.shared) + len(named.grams),
        examples=gathered.examples,
        tokens=gathered.tokens,
        fisher=fisher,
        bytes=nbytes,
        seconds=time.monotonic() - began,
        notices=tuple(staged.notices),
    )


def _as_folder(opened: Model, name: str, base: str | Path | None, scratch: Path) -> str:
    """Return the name of a full model; an adapter is baked into its base in a folder below ``scratch``.

    Raises :class:`~merging.errors.MergingError` for an adapter that cannot be baked.
    """
    if not isinstance(opened, Adapter):
        if base is not None:
            raise OptionError(f"{name}: is a full model, which needs no base: leave {option('base')} out")
        return name
    baked = scratch / "baked"
    if base is None:
        bake([name], output=baked, resume=False)
    else:
        bake([name], output=baked, resume=False, base=base)
    return str(baked)


def _gather(
    running: RunnableModel,
    examples: Iterator[StatisticsExample],
    *,
    most: int | None,
    directions: int,
    fisher: FisherAccumulator | None,
    progress: Progress | None,
    expected: int,
) -> GatheredLayers:
    """Run examples one by one, and return the statistics of the layers by their names in the running model."""
    layers = find_layers(running.network)
    leaders: dict[str, str] = {}
    grams: dict[str, GramAccumulator] = {}
    count = tokens = 0

    def add(layer: HookedLayer, inputs: Any) -> None:
        if not bool(inputs.isfinite().all()):
            raise InputError(f"{running.name}: the inputs of {layer.name} are not finite on the examples")
        if layer.name not in grams:
            grams[layer.name] = GramAccumulator(layer.width, directions, inputs.device)
        grams[layer.name].add(inputs.reshape(-1, layer.width))

    for example in examples:
        left = None if most is None else most - tokens
        least = 2 if count and fisher is not None and fisher.outputs == "labels" else 1  # a token, and the next one
        if left is not None and left < least:
            break
        inputs = running.encode(example, left)
        with torch.set_grad_enabled(fisher is not None):
            if not leaders:
                with torch.no_grad():
                    leaders = dict(group_by_input(layers, partial(running.run, inputs)))
            with hook_inputs([layer for layer in layers if leaders[layer.name] == layer.name], add):
                output = running.run(inputs)
            if fisher is not None:
                fisher.add(example, inputs, output)
        count += 1
        tokens += inputs["input_ids"].numel() if "input_ids" in inputs else 0
        if progress:
            progress(count, expected)
    if progress and count and count < expected:
        progress(count, count)
    importance, size = fisher.result() if fisher is not None and count else ({}, 0.0)
    found = {name: gram.result() for name, gram in grams.items()}
    shared = {name: leader for name, leader in leaders.items() if leader != name and leader in found}
    return GatheredLayers(found, shared, importance, size, count, tokens)


def name_layers(gathered: GatheredLayers, opened: Model, base: str | Path | None) -> GatheredLayers:
    """Return the statistics by the names of tensors in the model's file; of an adapter, in its base's file."""
    if isinstance(opened, Adapter):
        stated = base if base is not None else opened.base
        try:
            names = set(opened.changes) | (set(_tensors_of(stated)) if stated else set())
        except InputError:
            names = set(opened.changes)
    else:
        names = set(opened.tensors)
    index = index_ends(names)

    def rename(name: str) -> str:
        return find_by_end(name, names, index) or name

    return replace(
        gathered,
        grams={rename(name): gram for name, gram in gathered.grams.items()},
        shared={rename(name): rename(other) for name, other in gathered.shared.items()},
        fisher={rename(name): each for name, each in gathered.fisher.items()},
    )


def _tensors_of(name: str | Path) -> list[str]:
    opened = open_model(name)
    return [] if isinstance(opened, Adapter) else list(opened.tensors)
