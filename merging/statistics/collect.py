"""Gathering statistics of a model's layers on examples, into a file that methods read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
from merging.sources.stored import Stored
from merging.statistics.examples import open_statistics_examples
from merging.statistics.fisher_information import FisherAccumulator, FisherOutputs
from merging.statistics.gathering import check_limits, gather_layers
from merging.statistics.naming import name_as_stored
from merging.statistics.network import ComputeType, load_runnable
from merging.statistics.writing import write_statistics
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
    dtype: ComputeType | None = None,
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
    check_limits(examples=examples, max_length=max_length, max_tokens=max_tokens, directions=directions)
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
    read = open_statistics_examples(source, examples, column, label_column if fisher == "labels" else None)
    check_destination(destination, opened.files, 0, overwrite)
    with StagedOutput(destination, overwrite, True) as staged:
        full = _as_folder(opened, str(model), base, staged.scratch)
        running = load_runnable(
            full,
            name=str(model),
            images=source.is_dir(),
            max_length=max_length,
            device=pick_device(str(device)),
            dtype=dtype,
        )
        gathered = gather_layers(
            running,
            read,
            most=max_tokens,
            directions=directions,
            fisher=FisherAccumulator(running, fisher, seed) if fisher else None,
            progress=show,
            expected=examples,
        )
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
        shapes = {name: stored.shape for name, stored in _tensors_of(full).items()}
        named = name_as_stored(gathered, running.network, shapes)
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


def _tensors_of(model: str) -> Mapping[str, Stored]:
    opened = open_model(model)
    assert not isinstance(opened, Adapter)
    return opened.tensors
