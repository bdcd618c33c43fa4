"""Merging files into files: from a recipe to an output that is complete, or not there at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path

from typing_extensions import Unpack

from merging.api.arguments import check_entries, check_entry, check_keywords, check_method, check_path, check_report
from merging.api.kept_stages import check_stages, keep_stage
from merging.api.merged import Merged
from merging.api.options import MergeOptions
from merging.api.output_files import check_output, is_file, write_output, write_stage_companions
from merging.api.reporting import Reporter
from merging.api.resuming import prepare_resuming
from merging.cluster import RayCluster, make_cluster
from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.engine.cluster_crew import fit_workers, open_connection, pick_cluster_devices
from merging.engine.devices import main_device
from merging.engine.download import download_plan
from merging.engine.journal import Journal
from merging.engine.probe import PROBE_BYTES
from merging.engine.resources import describe_choice, pick_devices, workers_within
from merging.engine.sanity import unrelated_models
from merging.engine.stages import StageSettings, open_stages
from merging.engine.threads import cores
from merging.errors import OptionError, option
from merging.hub.address import local_path
from merging.maths.lazy_torch import torch
from merging.methods.contract.method import Method
from merging.object_stores.store_path import output_path
from merging.output.model_folder import check_companions, companion_patterns
from merging.plan import PORTABLE_RANKS, Plan, make_plan
from merging.plan.recipe import FIELDS, Entry, Recipe
from merging.plan.recipe_values import make_recipe
from merging.storage.store_output import stage_output
from merging.type_checks import check_types

__all__ = [
    "Merged",
    "check_output",
    "default_destination",
    "merge",
    "merge_plan",
    "merge_recipe",
    "plan_for",
    "preview",
]

_log = logging.getLogger(__name__)


@check_types("models", "method")
def preview(
    models: Sequence[Path | Entry],
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

    Example:
        >>> import merging
        >>> plan = merging.preview(["one", "two"], method="ties", base="base")
        >>> plan.output, len(plan.items)
        ('model', 104)
    """
    destination = None if output is None else output_path(check_path(output, "output"))
    return plan_for(merge_recipe(models, method, options), destination)


@check_types("models", "method", "max_memory", "progress")
def merge(
    models: Sequence[Path | Entry],
    *,
    method: str | Method,
    output: str | Path | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | bool | None = None,
    keep_stages: str | Path | None = None,
    resume: bool | None = None,
    engine: str | RayCluster = "local",
    address: str | None = None,
    report: str | Path | None = None,
    **options: Unpack[MergeOptions],
) -> Merged:
    """Merge models or adapters from files into a file or folder.

    Args:
        models: the models or adapters in the order of their weights: paths, names on the Hub, recipes whose outputs
            are merged (:class:`~merging.Recipe`), and stacks of layers (:class:`~merging.LayerStack`).
        method: a method, or a chain as it is written (``"lines+task_arithmetic"``).
        output: the output. A name ending in ``.safetensors`` is a single file, any other a folder. By default
            ``merged.safetensors`` when all models are bare files, else the folder ``merged``.
        device: ``cpu``, ``cuda`` for all such GPUs, ``cuda:0,1`` for some, ``mps``, ``xpu``, or ``auto``.
        threads: the number of threads of this process; by default one for each processor core, as far as the memory
            allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        overwrite: whether an output that exists is replaced.
        stream: whether models of the Hub and of stores pass through the disk file by file, and are not kept in a cache.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        keep_stages: a folder for the outputs of recipes among the models, each in a folder of its own.
        resume: whether a merge that stopped is gone on with, and this one can be when it stops; by default for outputs
            above 10 GB, and where a merge stopped. False removes the finished work of a merge that stopped.
        engine: ``local`` for threads of this process, ``ray``, or a :class:`~merging.cluster.RayCluster` with settings.
        address: ``HOST:PORT`` of the Ray cluster; by default the cluster that this machine belongs to.
        report: a page to write (``.html``): what the merge changed, each model's part in it, interference, and time.
        **options: the recipe's options (``base``, ``dtype``, ``rank``, ``kind``, ``exclude`` and the other fields of
            :class:`~merging.plan.recipe.Recipe`), and the method's parameters by name (``weights=(1, 1, -1)``).

    Returns:
        The path and the kind of the output, its size, remarks, and numbers that the method reports.

    Raises:
        MergingError: for models that cannot be merged as the options say, values that cannot be merged, and an output
            that cannot be written. Nothing is left behind then, but finished work with ``resume``.

    Example:
        >>> import merging
        >>> merged = merging.merge(["a", "b"], method="task_arithmetic", output="merged", weights=[0.7, 0.3])
        >>> merged.kind, merged.rank
        ('adapter', 16)
    """
    cluster = make_cluster(engine, address)
    recipe = merge_recipe(models, method, options)
    destination = default_destination(recipe) if output is None else output_path(check_path(output, "output"))
    plan = plan_for(recipe, destination)
    return merge_plan(
        plan,
        destination,
        devices=pick_devices(device, plan) if cluster is None else pick_cluster_devices(device),
        threads=threads,
        max_memory=max_memory,
        overwrite=overwrite,
        stream=stream,
        progress=resolve_progress(progress),
        keep_stages=None if keep_stages is None else Path(check_path(keep_stages, "keep_stages")),
        resume=resume,
        cluster=cluster,
        report=check_report(report),
    )


def merge_recipe(models: Sequence[Path | Entry], method: str | Method, options: Mapping[str, object]) -> Recipe:
    """Return the recipe of the arguments of :func:`merge`. Raises :class:`~merging.errors.OptionError`."""
    entries = check_entries(models)
    if options.get("base") is not None:
        options = {**options, "base": check_entry(options["base"], "base")}
    check_method(method)
    stated = {key: value for key, value in options.items() if key in FIELDS and value is not None}
    parameters = {key: value for key, value in options.items() if key not in FIELDS}
    if isinstance(method, Method) and parameters:
        raise OptionError(f"{next(iter(parameters))!r} is not an option of merge: give it to the method itself")
    values = {"models": entries, "method": method, **stated}
    if isinstance(method, str):
        check_keywords(parameters, method, [*Recipe.model_fields, *signature(merge).parameters])
        values["parameters"] = parameters
    return make_recipe(values, "merge")


def default_destination(recipe: Recipe) -> Path:
    """Return ``merged.safetensors`` when all inputs are bare files, else the folder ``merged``."""
    files = all(isinstance(each, str) and local_path(each).is_file() for each in recipe.models)
    return Path("merged.safetensors" if files else "merged")


def plan_for(recipe: Recipe, destination: Path | None) -> Plan:
    """Plan a merge to a destination: a merged adapter's folder gets a rank that every program serves."""
    steps = () if destination is not None and is_file(destination) else PORTABLE_RANKS
    return make_plan(recipe, steps, write_stage_companions)


def merge_plan(
    plan: Plan,
    destination: Path,
    *,
    devices: Sequence[torch.device] = (),
    threads: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | None = None,
    keep_stages: Path | None = None,
    resume: bool | None = None,
    report: Path | None = None,
    shown: Plan | None = None,
    cluster: RayCluster | None = None,
) -> Merged:
    """Run a plan, and put the output in place when it is complete.

    Args:
        plan: the plan.
        destination: the file or folder to write.
        devices: the devices to compute on, of one kind; the CPU by default.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        overwrite: whether an output that exists is replaced.
        stream: whether models of the Hub and of stores are downloaded file by file as the merge reaches them.
        progress: called with the bytes done and the bytes in all.
        keep_stages: a folder for the outputs of recipes among the models, each in a folder of its own.
        resume: whether a merge that stopped is gone on with; None for outputs above 10 GB, and where one stopped.
        report: the page to write of the merge; None for none.
        shown: the plan that the header and the model card describe, where another one describes the output better.
        cluster: the Ray cluster that merges, whose workers take ``max_memory`` each; None for this process.

    Raises:
        MergingError: for values that cannot be merged, and an output that cannot be written.
    """
    if cluster is not None and threads is not None:
        raise OptionError(
            f"{option('threads', threads)} is for the threads of this process: a worker of a cluster has as many as "
            f"processors, which {option('worker_cpus')} sets"
        )
    device, probing = main_device(devices), PROBE_BYTES if report else 0
    fitted = fit_workers(plan, cluster, device, max_memory, probing, destination=destination, stream=stream)
    reporter = Reporter(report, destination, overwrite=overwrite, progress=progress)
    progress = reporter.progress
    most, here = (None, ()) if fitted else (max_memory, devices)
    workers = workers_within(plan, cores() if threads is None else threads, most, probing, devices=here)
    described = shown or plan
    identity, there = None, 0
    if keep_stages is None:
        identity, there = prepare_resuming(plan, described, destination, device, resume)
    check_output(plan, destination, overwrite, there=there)
    check_stages(plan, keep_stages, destination, overwrite=overwrite, stream=stream, resume=resume)
    if not stream:
        plan = download_plan(plan, companion_patterns(plan), progress=progress)
    if not is_file(destination):
        check_companions(plan)
    _log.info("%s: merging %d models by %s", destination, len(plan.models), plan.recipe.method.chain)
    with open_connection(fitted), stage_output(destination, overwrite, is_file(destination), identity) as staged:
        if stream:
            plan = download_plan(plan, companion_patterns(plan), stream=staged.scratch)
            described = shown or plan
        transplant = plan.vocabulary.transplant if plan.vocabulary else None
        if transplant is not None:
            transplant.compute_on(device)
        settings = StageSettings(devices=devices, threads=workers, scratch=staged.scratch, progress=progress)
        settings = replace(settings, make_crew=fitted.make_crew if fitted else None)
        if staged.journal is not None:
            settings = replace(settings, journal=Journal(staged.journal))
        if keep_stages is not None:
            settings = replace(settings, keep=partial(keep_stage, keep_stages, overwrite, settings))
        with open_stages(plan, settings) as (ready, progress, remarks):
            settings = replace(settings, progress=progress)
            notices = [*plan.notices, *describe_choice(devices), *unrelated_models(ready)]
            written = write_output(ready, described, staged, settings, reporter.measures)
            done = written.done
        staged.commit()
    merged = Merged(
        path=destination,
        kind=plan.output,
        method=described.recipe.method.chain,
        tensors=len(written.plan.outs),
        bytes=written.plan.out_bytes,
        seconds=done.seconds,
        rank=written.plan.rank or None,
        ranks=dict(written.plan.ranks) if plan.sized is not None else {},
        format=plan.format if plan.output == "adapter" else None,
        notices=(*notices, *remarks, *written.remarks, *done.notices, *done.energy_notices, *staged.notices),
        discarded=done.discarded,
        facts=done.metrics | (transplant.facts() if transplant else {}),
        quantization_errors=written.errors,
    )
    merged = reporter.finish(merged, plan, described, written.plan)
    report_notices(merged.notices)
    _log.info("%s: written, %s tensors in %.1f s", destination, merged.tensors, merged.seconds)
    return merged
