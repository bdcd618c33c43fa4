"""Stages: merges whose outputs are models of another merge."""

from __future__ import annotations

import atexit
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from merging.errors import InputError, OutputError
from merging.methods.contract.method import Method
from merging.methods.contract.wrapper import Wrapper
from merging.plan.estimates import working_bytes
from merging.plan.items import TILE, Item
from merging.sources import Adapter, Checkpoint, Model, open_local
from merging.sources.deferred import Deferred, StageValues
from merging.sources.model_config import read_config
from merging.sources.small_files import is_there
from merging.sources.stored import FileContents, Stored
from merging.storage.output_tensor import OutputTensor
from merging.storage.staging import StagedOutput

if TYPE_CHECKING:
    from merging.plan.merge_plan import Plan

__all__ = ["Companions", "Stage", "all_stages", "make_stage"]

_FOLDERS = Path(tempfile.gettempdir(), "merging-stages")
"""The name of folders for configs and tokenizers of stages; a part that no other process has is added."""

Companions = Callable[["Plan", Path], dict[str, str]]
"""Writes the files that go with the weights of a plan's output into a folder, and returns the weights' header."""


@dataclass(slots=True, eq=False)
class Stage:
    """A merge whose output is a model of another merge.

    Attributes:
        name: its place in the outer recipe (``models.1``), which is the name of its folder where it is kept.
        plan: its plan.
        model: its output, whose values can be read while ``values`` has a reader.
        values: the values of its tensors.
        lazy: whether its tensors are computed when they are read, and not set aside before.
    """

    name: str
    plan: Plan
    model: Model
    values: StageValues
    lazy: bool


def all_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return stages and those in them, each once and after those that it needs."""

    def walk(stages: Sequence[Stage]) -> Iterator[Stage]:
        for stage in stages:
            yield from walk(stage.plan.stages)
            yield stage

    return list(dict.fromkeys(walk(stages)))


def make_stage(plan: Plan, name: str, write_companions: Companions) -> Stage:
    """Return the stage of a plan; nothing is computed. Raises :class:`~merging.errors.InputError` for a pipeline."""
    if plan.reference is not None and plan.reference.components and plan.output == "model":
        raise InputError(
            f"{name}: makes a pipeline of several models, which has to be in a folder for another merge: run it by "
            f"itself, and name its folder here"
        )
    identity = hashlib.sha256(plan.recipe.to_yaml().encode()).hexdigest()[:16]
    values = StageValues(f"stage {identity}")
    method = plan.recipe.method
    lazy = plan.output == "model" and _is_lazy(plan.items, method, len(plan.models))
    tensors = {
        out.name: _tensor_of(item, out, values, working_bytes(item, method) if lazy else 0)
        for item in plan.items
        for out in item.outs
    }
    files = tuple(dict.fromkeys(file for leaf in plan.leaves or _models(plan) for file in leaf.files))
    try:
        model = replace(
            _open_output(plan, tensors, write_companions), path=Path(f"{name} ({method.chain})"), files=files
        )
    except OSError as error:
        raise OutputError(
            f"{name}: its config cannot be kept in the system's temporary folder: {error.strerror}"
        ) from None
    return Stage(name, plan, model, values, lazy)


def _open_output(plan: Plan, tensors: dict[str, Stored], write_companions: Companions) -> Model:
    """Open the output of a plan as if its files were there; its config and its tokenizer are."""
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    if plan.output == "adapter":
        return _open_adapter(plan, folder, tensors, write_companions)
    write_companions(plan, folder)
    config = read_config(folder / "config.json") if is_there(folder / "config.json") else {}
    reference = plan.reference
    assert reference is not None
    return Checkpoint(
        folder, tensors, (), config, folder if reference.folder is not None else None, single=reference.single
    )


def _models(plan: Plan) -> list[Model]:
    return [*plan.models, *([plan.base] if plan.base else [])]


@cache
def _folder() -> Path:
    """Return the folder of this process for configs and tokenizers of stages.

    It is removed when the process ends. After a process that was killed, the next one that has stages removes it.
    """
    until_exit = ExitStack()
    atexit.register(until_exit.close)
    return until_exit.enter_context(StagedOutput(_FOLDERS, overwrite=False, file=False)).scratch


def _open_adapter(plan: Plan, folder: Path, tensors: dict[str, Stored], write_companions: Companions) -> Adapter:
    """Open the adapter that a plan makes as if its file were there."""
    for constant in plan.constants:
        raise InputError(f"{constant.out.name}: adapters of this format are not merged on from memory: use format peft")
    metadata = write_companions(plan, folder)
    weights = folder / "adapter_model.safetensors"
    weights.touch()

    def contents(path: Path) -> FileContents:
        return tensors, metadata

    opened = open_local(weights, open_file=contents)
    assert isinstance(opened, Adapter)
    return opened


def _tensor_of(item: Item, out: OutputTensor, values: StageValues, scratch: int) -> Stored:
    """Return a tensor of a stage: one that is copied as it is is read from its own file."""
    if item.form == "copy" and item.base is not None and item.base.dtype_name == out.dtype_name:
        return item.base
    inputs = [part for change in item.changes for part in change.tensors]
    inputs += [each for each in (*item.inputs, item.base) if isinstance(each, Stored)]
    return Deferred(values, out.name, out.dtype_name, out.shape, inputs=tuple(inputs), scratch=scratch)


def _is_lazy(items: Sequence[Item], method: Method, models: int) -> bool:
    """Return whether every piece of the output can be computed by itself, at little more than the cost of reading."""
    if method.result_statistics(models) or any(each.per == "model" for each in method.required_statistics()):
        return False
    if any(isinstance(link, Wrapper) and link.needs_whole for link in method.links()):
        return False
    return all(map(_in_pieces, items, [method.at(item.site) for item in items]))


def _in_pieces(item: Item, method: Method) -> bool:
    if item.cut.way in ("elements", "rows"):
        return True
    if item.cut.way == "whole":
        return item.numel <= TILE and all(link.decomposed_side is None for link in method.links())
    cheap = all(change.low_rank for change in item.changes) and all(
        link.decomposed_side is None for link in method.links()
    )
    return cheap and (item.cut.way == "blocks" or method.factored)
