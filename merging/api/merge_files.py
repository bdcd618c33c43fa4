"""Merging files into files: from a recipe to an output that lies whole in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from merging.engine.download import download_plan
from merging.engine.resources import pick_device, workers_within
from merging.engine.run import run
from merging.engine.sanity import unrelated
from merging.engine.threads import Progress, cores
from merging.errors import OptionError, OutputError
from merging.methods.contract.method import Method
from merging.output.lora_header import lora_metadata, lora_stem
from merging.output.model_folder import check_companions, companion_patterns, copy_companions, write_model_companions
from merging.output.peft_config import write_adapter_companions
from merging.plan import PORTABLE_RANKS, Plan, make_plan
from merging.plan.recipe import FIELDS, Recipe, make_recipe
from merging.sources.stored import DTYPES
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.writer import ComponentWriter, TensorWriter
from merging.version import __version__

__all__ = [
    "Merged",
    "check_output",
    "default_destination",
    "merge",
    "merge_plan",
    "plan_for",
    "preview",
]


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge left: where, what it is, and what should be known about it."""

    path: Path
    kind: str
    method: str
    tensors: int
    bytes: int
    seconds: float
    rank: int | None = None
    format: str | None = None
    notices: tuple[str, ...] = ()
    discarded: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path), "notices": list(self.notices)}


def preview(models: Sequence[str | Path], *, method: str | Method, **options: Any) -> Plan:
    """What :func:`merge` would do, from headers alone; takes its options, and nothing is written."""
    destination = options.pop("output", None)
    return plan_for(_recipe(models, method, options), None if destination is None else Path(destination))


def merge(
    models: Sequence[str | Path],
    *,
    method: str | Method,
    output: str | Path | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Merged:
    """Merge models or adapters from files into a file or folder.

    ``method`` is a method or a chain as it is written (``"lines+task_arithmetic"``). ``options`` are the recipe's
    (``base``, ``dtype``, ``rank``, ``kind``, ``exclude`` and the others of :class:`~merging.plan.recipe.Recipe`) and
    the method's parameters by name (``weights=(1, 1, -1)``). ``output`` ending in ``.safetensors`` is a single file,
    any other a folder; without it the output is ``merged.safetensors`` or the folder ``merged``. ``max_memory`` is in
    bytes, above the memory of the imports. ``stream`` says that models of the Hub pass through the disk file by file
    instead of staying in the library's cache. ``progress`` is called with the bytes done and in all.

    Raises :class:`~merging.errors.MergingError`, and leaves nothing behind then.
    """
    recipe = _recipe(models, method, options)
    destination = Path(output) if output is not None else default_destination(recipe)
    return merge_plan(
        plan_for(recipe, destination),
        destination,
        device=pick_device(str(device)),
        threads=threads,
        max_memory=max_memory,
        overwrite=overwrite,
        stream=stream,
        progress=progress,
    )


def _recipe(models: Sequence[str | Path], method: str | Method, options: dict[str, Any]) -> Recipe:
    if isinstance(models, (str, Path)):
        raise OptionError(f"models should be a list of paths, and is {str(models)!r}")
    stated = {key: value for key, value in options.items() if key in FIELDS and value is not None}
    parameters = {key: value for key, value in options.items() if key not in FIELDS}
    if isinstance(method, Method) and parameters:
        raise OptionError(f"{next(iter(parameters))!r} is no option of merge: give it to the method itself")
    values = {"models": [str(path) for path in models], "method": method, **stated}
    if isinstance(method, str):
        values["parameters"] = parameters
    return make_recipe(values, "merge")


def default_destination(recipe: Recipe) -> Path:
    """``merged.safetensors`` when all inputs are bare files, else the folder ``merged``."""
    return Path("merged.safetensors" if all(Path(path).is_file() for path in recipe.models) else "merged")


def plan_for(recipe: Recipe, destination: Path | None) -> Plan:
    """The plan of a merge to a destination: a merged adapter's folder has a rank that every program serves."""
    single = destination is not None and destination.suffix == ".safetensors"
    return make_plan(recipe, () if single else PORTABLE_RANKS)


def merge_plan(
    plan: Plan,
    destination: Path,
    *,
    device: torch.device | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | None = None,
    shown: Plan | None = None,
) -> Merged:
    """Carry out a plan, and put the output in place when it is whole.

    What lies on the Hub comes first, or with ``stream`` file by file as the merge comes to it. ``shown`` is the plan
    that header and card tell of, where the same output is better known by another one.
    """
    workers = workers_within(plan, cores() if threads is None else threads, max_memory)
    check_output(plan, destination, overwrite)
    single = destination.suffix == ".safetensors"
    if not stream:
        plan = download_plan(plan, companion_patterns(plan), progress=progress)
    if not single:
        check_companions(plan)
    with StagedOutput(destination, overwrite, single) as staged:
        if stream:
            plan = download_plan(plan, companion_patterns(plan), stream=staged.scratch)
        notices = [*plan.notices, *unrelated(plan)]
        told = shown or plan
        writer = _writer(told, staged.folder, destination)
        try:
            done = run(plan, writer, device=device, threads=workers, progress=progress, scratch=staged.scratch)
            cut = [done.energy_notice] if done.energy_notice else []
            for constant in plan.constants:
                values = torch.full((constant.count,), constant.value, dtype=DTYPES[constant.out.dtype_name])
                writer.write(constant.out.name, values, constant.start)
            writer.finish()
        finally:
            writer.close()
        if not single and plan.output == "adapter":
            write_adapter_companions(told, staged.folder, cut)
            copy_companions(told, staged.folder)
        elif not single:
            notices += write_model_companions(told, staged.folder)
        staged.commit()
    return Merged(
        path=destination,
        kind=plan.output,
        method=told.recipe.method.chain,
        tensors=len(plan.outs),
        bytes=plan.out_bytes,
        seconds=done.seconds,
        rank=plan.rank or None,
        format=plan.format if plan.output == "adapter" else None,
        notices=(*notices, *done.notices, *cut, *staged.notices),
        discarded=done.discarded,
        facts=done.metrics,
    )


def _writer(plan: Plan, folder: Path, destination: Path) -> TensorWriter | ComponentWriter:
    """What writes the weights of the output into a folder, by the names that its readers look for."""
    metadata = _metadata(plan)
    if destination.suffix == ".safetensors":
        return TensorWriter(folder, destination.stem, plan.outs, metadata, None)
    reference = plan.reference
    if plan.output == "adapter" or reference is None:
        return TensorWriter(folder, lora_stem(plan, destination), plan.outs, metadata, None)
    stems = {name: each.stem for name, each in reference.components.items() if name not in plan.kept}
    if stems:
        return ComponentWriter(folder, stems, plan.outs, metadata, plan.recipe.shard_size)
    return TensorWriter(folder, reference.stem, plan.outs, metadata, plan.recipe.shard_size)


def check_output(plan: Plan, destination: Path, overwrite: bool, dry: bool = False) -> None:
    """Refuse a destination that the plan's output cannot or must not take; with ``dry`` nothing is touched."""
    inputs = [file for model in [*plan.models, plan.base] if model for file in (model.path, *model.files)]
    if destination.suffix == ".safetensors" and plan.output == "model" and plan.reference and plan.reference.components:
        raise OutputError(f"{destination}: what comes out is made of several models, in a folder: choose another -o")
    nbytes = plan.out_bytes + plan.spool_bytes + plan.kept_bytes_on_disk
    check_destination(destination, inputs, nbytes, overwrite, dry)


def _metadata(plan: Plan) -> dict[str, str]:
    """What goes into the header of every output file: the recipe, what made it, and a bare adapter's whole config."""
    metadata = {
        "merging_recipe": json.dumps(plan.recipe.to_dict(), ensure_ascii=False),
        "merging_version": __version__,
        "torch_version": torch.__version__,
    }
    return metadata | lora_metadata(plan) if plan.output == "adapter" else metadata
