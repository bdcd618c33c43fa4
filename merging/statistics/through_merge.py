"""Statistics of several models for RegMean++: each block sees the examples through the merged blocks before it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from merging.api.arguments import check_path
from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.display.tables import plural
from merging.engine.resources import pick_device
from merging.errors import InputError, OptionError, option
from merging.hub.address import local_path
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import output_path
from merging.plan.checks import key_of
from merging.sources import Adapter, Model
from merging.statistics.blockwise_merger import BlockwiseMerger
from merging.statistics.collect import CollectedStatistics
from merging.statistics.examples import open_statistics_examples
from merging.statistics.gathering import check_limits, encode_examples
from merging.statistics.network import ComputeType, load_runnable
from merging.statistics.writing import write_statistics
from merging.storage.staging import StagedOutput, check_destination
from merging.type_checks import check_types

__all__ = ["collect_merged_statistics"]


@check_types("progress")
def collect_merged_statistics(
    models: Sequence[str | Path],
    data: Sequence[str | Path],
    output: str | Path,
    *,
    base: str | Path | None = None,
    off_diagonal: float = 0.9,
    exclude: str | Sequence[str] | None = None,
    column: str = "text",
    examples: int = 100,
    max_length: int = 512,
    max_tokens: int | None = None,
    directions: int = 512,
    device: str | torch.device = "cpu",
    dtype: ComputeType | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> tuple[CollectedStatistics, ...]:
    """Gather statistics of models that are merged together, block by block through their merge, as RegMean++ does.

    The examples of each model run through the base with the blocks before merged by ``regmean`` already, and the
    model's own block. A merge of the same models by ``regmean`` with the files is RegMean++ then (Nguyen et al. 2025,
    arXiv 2508.03121). The models' changes are read from their files, and one network is in memory. Each block takes one
    run of all examples.

    Args:
        models: the models, full ones or adapters: folders, or names on the Hub.
        data: the examples of each model, in the order of the models: files of JSON lines or texts, or folders of
            images.
        output: the folder to write, with a file for each model.
        base: the base of the models, which is run; of adapters, if it is another one than they state.
        off_diagonal: the share of the Gram matrices' entries off the diagonal that ``regmean`` is to keep.
        exclude: patterns of tensors that are not merged, such as heads.
        column: the field of JSON lines with the text.
        examples: the most examples of a model that are read.
        max_length: the most tokens of an example; longer ones are cut.
        max_tokens: the most tokens of all examples of a model; no limit by default.
        directions: the most directions of a layer that are kept.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, ``xpu`` or ``auto``: where the base runs.
        dtype: the type to compute in; by default float32 on a CPU, and the stored type elsewhere.
        overwrite: whether an output that exists is replaced.
        progress: True for a bar, or a function that receives the runs of an example done and their number.

    Returns:
        What was gathered of each model, in their order.

    Raises:
        MergingError: for models that cannot be merged or run, for data that are no examples, and for an output that
            cannot be written. Nothing is left behind then.

    Example:
        >>> import merging
        >>> from pathlib import Path
        >>> done = Path("texts.txt").write_text("one text a line\\nand another")
        >>> found = merging.collect_merged_statistics(["one", "two"], ["texts.txt"] * 2, "stats", base="base")
        >>> [each.path.name for each in found]
        ['one.safetensors', 'two.safetensors']
    """
    began = time.monotonic()
    check_limits(examples=examples, max_length=max_length, max_tokens=max_tokens, directions=directions)
    destination = output_path(check_path(output, "output"))
    if destination.suffix:
        raise OptionError(f"{output}: statistics of several models are a folder: name it without {destination.suffix}")
    sources = [local_path(str(each)) for each in data]
    _check_data(models, sources)
    show = resolve_progress(progress)
    opened = [open_model(model) for model in models]
    read = [open_statistics_examples(source, examples, column) for source in sources]
    start = _base_of(opened, base)
    paths = [destination / f"{name}.safetensors" for name in _file_names(models)]
    files = [path for model in opened for path in model.files]
    for path in paths:
        check_destination(path, files, 0, overwrite)
    with ExitStack() as until_exit:
        outputs = [until_exit.enter_context(StagedOutput(path, overwrite, True)) for path in paths]
        running = load_runnable(
            start,
            name=start,
            images=sources[0].is_dir(),
            max_length=max_length,
            device=pick_device(str(device)),
            dtype=dtype,
        )
        encoded = [[inputs for _, inputs in encode_examples(running, each, max_tokens)] for each in read]
        options = {"base": start, **({"exclude": exclude} if exclude is not None else {})}
        merger = BlockwiseMerger(running, [str(model) for model in models], options, off_diagonal)
        gathered = merger.gather(encoded, directions, show)
        keys = [key_of(model) for model in opened]
        through = {"models": keys, "off_diagonal": off_diagonal}
        found = []
        for number, (each, staged) in enumerate(zip(gathered, outputs, strict=True)):
            facts = {
                "examples": each.examples,
                "tokens": each.tokens,
                "max_length": max_length,
                "data": sources[number].name,
                "through_merge": through,
            }
            origin = str(opened[number].origin or "")
            identity = {"model": origin or paths[number].stem, "key": keys[number], "origin": origin}
            nbytes = write_statistics(staged, paths[number], each, identity, facts)
            found.append(
                CollectedStatistics(
                    path=paths[number],
                    model=str(models[number]),
                    key=keys[number],
                    layers=len(each.shared) + len(each.grams),
                    examples=each.examples,
                    tokens=each.tokens,
                    fisher=None,
                    bytes=nbytes,
                    seconds=time.monotonic() - began,
                )
            )
        for staged in outputs:
            staged.commit()
    report_notices([notice for staged in outputs for notice in staged.notices])
    return tuple(found)


def _check_data(models: Sequence[str | Path], sources: Sequence[Path]) -> None:
    """Refuse data that are not there, and other numbers of them than of models."""
    if len(models) != len(sources):
        raise OptionError(
            f"{plural(len(sources), 'file')} of examples for {plural(len(models), 'model')}: give one with "
            f"{option('data')} for each model, in their order"
        )
    if len(models) < 2:
        raise OptionError(
            f"{plural(len(models), 'model')}: at least 2 are needed to gather statistics through their merge"
        )
    missing = next((source for source in sources if not source.exists()), None)
    if missing is not None:
        raise InputError(f"{missing}: there is no such file or folder")
    if len({source.is_dir() for source in sources}) > 1:
        raise OptionError("some examples are images and some are texts: give the same kind for all models")


def _base_of(models: Sequence[Model], base: str | Path | None) -> str:
    """Return the base that is given, or the base that an adapter states."""
    stated = [model.base for model in models if isinstance(model, Adapter) and model.base]
    if base is None and not stated:
        raise OptionError(f"the models are merged as changes from their base: give {option('base')}")
    return str(base if base is not None else stated[0])


def _file_names(models: Sequence[str | Path]) -> list[str]:
    """Return a name for each model's file: the last part of its own name, with a number where that is not unique."""
    last = [Path(str(model)).absolute().name.removesuffix(".safetensors") for model in models]
    return [name if last.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(last, 1)]
