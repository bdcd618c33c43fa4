"""Merging files into files: from a recipe to an output that is complete, or not there at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.api.arguments import check_method, check_path, check_paths
from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.display.tables import Displayed
from merging.engine.download import download_plan
from merging.engine.resources import pick_device, workers_within
from merging.engine.run import Done, run
from merging.engine.sanity import unrelated_models
from merging.engine.threads import cores
from merging.errors import OptionError, OutputError, option
from merging.maths.lazy_torch import torch
from merging.methods.contract.method import Method
from merging.output.lora_header import lora_metadata, lora_stem
from merging.output.model_folder import check_companions, companion_patterns, copy_companions, write_model_companions
from merging.output.peft_config import write_adapter_companions
from merging.plan import PORTABLE_RANKS, Plan, make_plan
from merging.plan.recipe import FIELDS, Recipe, make_recipe
from merging.sources.dtypes import DTYPES
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.writer import ComponentWriter, TensorWriter
from merging.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from merging.api.options import MergeOptions

__all__ = [
    "Merged",
    "check_output",
    "default_destination",
    "merge",
    "merge_plan",
    "plan_for",
    "preview",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, repr=False)
class Merged(Displayed):
    """The result of a merge.

    Attributes:
        path: the file or folder that was written.
        kind: ``adapter`` or ``model``.
        method: the chain as it is written.
        tensors: the number of tensors.
        bytes: the size of the tensors in bytes.
        seconds: the time that merging and writing took.
        rank: the rank of a merged adapter's factors, else None.
        format: the name of the form of a merged adapter's file, else None.
        notices: remarks for people.
        discarded: the share of the change's energy that a lower rank discarded, by tensor.
        facts: numbers that the method reports, by name.
    """

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
        """Return the same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path), "notices": list(self.notices)}


def preview(
    models: Sequence[str | Path],
    *,
    method: str | Method,
    output: str | Path | None = None,
    **options: Unpack[MergeOptions],
) -> Plan:
    """Plan a merge without running it: headers are read, and nothing is written.

    Args:
        models: the models or adapters, as for :func:`merge`.
        method: the method, as for :func:`merge`.
        output: the file or folder that a merge would write.
        **options: the recipe's options and the method's parameters, as for :func:`merge`.

    Returns:
        The plan: its items, sizes in bytes, memory and notices.

    Raises:
        MergingError: for everything that :func:`merge` refuses before it reads values.
    """
    destination = None if output is None else Path(check_path(output, "output"))
    return plan_for(_make_recipe(models, method, options), destination)


def merge(
    models: Sequence[str | Path],
    *,
    method: str | Method,
    output: str | Path | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[MergeOptions],
) -> Merged:
    """Merge models or adapters from files into a file or folder.

    Args:
        models: the models or adapters: paths, or names on the Hub, in the order of their weights.
        method: a method, or a chain as it is written (``"lines+task_arithmetic"``).
        output: the output. A name ending in ``.safetensors`` is a single file, any other a folder. By default
            ``merged.safetensors`` when all models are bare files, else the folder ``merged``.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU if there is one.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        overwrite: whether an output that exists is replaced.
        stream: whether models of the Hub pass through the disk file by file, and are not kept in the library's cache.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        **options: the recipe's options (``base``, ``dtype``, ``rank``, ``kind``, ``exclude`` and the other fields of
            :class:`~merging.plan.recipe.Recipe`), and the method's parameters by name (``weights=(1, 1, -1)``).

    Returns:
        The path and the kind of the output, its size, remarks, and numbers that the method reports.

    Raises:
        MergingError: for models that cannot be merged as the options say, values that cannot be merged, and an output
            that cannot be written. Nothing is left behind then.

    Example:
        >>> import merging
        >>> merged = merging.merge(["a", "b"], method="task_arithmetic", output="merged", weights=[0.7, 0.3])
        >>> merged.kind, merged.rank
        ('adapter', 16)
    """
    progress = resolve_progress(progress)
    recipe = _make_recipe(models, method, options)
    destination = default_destination(recipe) if output is None else Path(check_path(output, "output"))
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


def _make_recipe(models: Sequence[str | Path], method: str | Method, options: Mapping[str, object]) -> Recipe:
    paths = check_paths(models)
    if options.get("base") is not None:
        options = {**options, "base": check_path(options["base"], "base")}
    check_method(method)
    stated = {key: value for key, value in options.items() if key in FIELDS and value is not None}
    parameters = {key: value for key, value in options.items() if key not in FIELDS}
    if isinstance(method, Method) and parameters:
        raise OptionError(f"{next(iter(parameters))!r} is not an option of merge: give it to the method itself")
    values = {"models": [str(path) for path in paths], "method": method, **stated}
    if isinstance(method, str):
        values["parameters"] = parameters
    return make_recipe(values, "merge")


def default_destination(recipe: Recipe) -> Path:
    """Return ``merged.safetensors`` when all inputs are bare files, else the folder ``merged``."""
    return Path("merged.safetensors" if all(Path(path).is_file() for path in recipe.models) else "merged")


def plan_for(recipe: Recipe, destination: Path | None) -> Plan:
    """Plan a merge to a destination: a merged adapter's folder gets a rank that every program serves."""
    return make_plan(recipe, () if destination is not None and _is_file(destination) else PORTABLE_RANKS)


def _is_file(destination: Path) -> bool:
    """Return whether an output of this name is a single file, and not a folder."""
    return destination.suffix == ".safetensors"


def merge_plan(
    plan: Plan,
    destination: Path,
    *,
    device: torch.device | None = None,
    threads: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | None = None,
    shown: Plan | None = None,
) -> Merged:
    """Run a plan, and put the output in place when it is complete.

    Args:
        plan: the plan.
        destination: the file or folder to write.
        device: the device to compute on; the CPU by default.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        overwrite: whether an output that exists is replaced.
        stream: whether models of the Hub are downloaded file by file as the merge reaches them, and not before it.
        progress: called with the bytes done and the bytes in all.
        shown: the plan that the header and the model card describe, where another one describes the output better.

    Raises:
        MergingError: for values that cannot be merged, and an output that cannot be written.
    """
    workers = workers_within(plan, cores() if threads is None else threads, max_memory)
    check_output(plan, destination, overwrite)
    described = shown or plan
    if not stream:
        plan = download_plan(plan, companion_patterns(plan), progress=progress)
    if not _is_file(destination):
        check_companions(plan)
    _log.info("%s: merging %d models by %s", destination, len(plan.models), plan.recipe.method.chain)
    with StagedOutput(destination, overwrite, _is_file(destination)) as staged:
        if stream:
            plan = download_plan(plan, companion_patterns(plan), stream=staged.scratch)
            described = shown or plan
        notices = [*plan.notices, *unrelated_models(plan)]
        writer = _make_writer(described, staged.folder, destination)
        try:
            done = run(plan, writer, device=device, threads=workers, progress=progress, scratch=staged.scratch)
            _write_constants(plan, writer)
            writer.finish()
        finally:
            writer.close()
        if not _is_file(destination):
            notices += _write_companions(described, staged.folder, done)
        staged.commit()
    energy = [done.energy_notice] if done.energy_notice else []
    merged = Merged(
        path=destination,
        kind=plan.output,
        method=described.recipe.method.chain,
        tensors=len(plan.outs),
        bytes=plan.out_bytes,
        seconds=done.seconds,
        rank=plan.rank or None,
        format=plan.format if plan.output == "adapter" else None,
        notices=(*notices, *done.notices, *energy, *staged.notices),
        discarded=done.discarded,
        facts=done.metrics,
    )
    report_notices(merged.notices)
    _log.info("%s: written, %s tensors in %.1f s", destination, merged.tensors, merged.seconds)
    return merged


def _write_constants(plan: Plan, writer: TensorWriter | ComponentWriter) -> None:
    for constant in plan.constants:
        values = torch.full((constant.count,), constant.value, dtype=DTYPES[constant.out.dtype_name])
        writer.write(constant.out.name, values, constant.start)


def _write_companions(plan: Plan, folder: Path, done: Done) -> list[str]:
    """Write the files that go with the weights, and return remarks on them."""
    if plan.output == "model":
        return write_model_companions(plan, folder)
    write_adapter_companions(plan, folder, [done.energy_notice] if done.energy_notice else [])
    copy_companions(plan, folder)
    return []


def _make_writer(plan: Plan, folder: Path, destination: Path) -> TensorWriter | ComponentWriter:
    """Return the writer of the output's weights, with the file names that readers look for."""
    metadata = _metadata(plan)
    if _is_file(destination):
        return TensorWriter(folder, destination.stem, plan.outs, metadata, None)
    reference = plan.reference
    if plan.output == "adapter" or reference is None:
        return TensorWriter(folder, lora_stem(plan, destination), plan.outs, metadata, None)
    stems = {name: each.stem for name, each in reference.components.items() if name not in plan.kept}
    if stems:
        return ComponentWriter(folder, stems, plan.outs, metadata, plan.recipe.shard_size)
    return TensorWriter(folder, reference.stem, plan.outs, metadata, plan.recipe.shard_size)


def check_output(plan: Plan, destination: Path, overwrite: bool, dry: bool = False) -> str:
    """Refuse a destination that the plan's output cannot or must not take.

    With ``dry`` nothing is touched, and a destination that exists is not refused: a remark on it is returned. Raises
    :class:`~merging.errors.OutputError`.
    """
    inputs = [file for model in [*plan.models, plan.base] if model for file in (model.path, *model.files)]
    if _is_file(destination) and plan.output == "model" and plan.reference and plan.reference.components:
        raise OutputError(
            f"{destination}: what comes out is made of several models, in a folder: choose another {option('output')}"
        )
    nbytes = plan.out_bytes + plan.spool_bytes + plan.kept_bytes_on_disk
    return check_destination(destination, inputs, nbytes, overwrite, dry)


def _metadata(plan: Plan) -> dict[str, str]:
    """Return the header entries of every output file: the recipe, the versions, and a bare adapter's whole config."""
    metadata = {
        "merging_recipe": json.dumps(plan.recipe.to_dict(), ensure_ascii=False),
        "merging_version": __version__,
        "torch_version": torch.__version__,
    }
    return metadata | lora_metadata(plan) if plan.output == "adapter" else metadata
