"""Stages of a merge that are kept: each is written as a model in a folder of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merging.api.output_files import check_output, write_output
from merging.display.progress import Progress
from merging.engine.stages import StageSettings
from merging.errors import OptionError, option
from merging.object_stores.store_path import StorePath
from merging.plan import Plan
from merging.plan.stages import Stage, all_stages
from merging.sources.opening import open_tensors
from merging.sources.stored import Stored
from merging.storage.staging import StagedOutput

__all__ = ["check_stages", "keep_stage"]


def check_stages(
    plan: Plan,
    keep_stages: Path | None,
    destination: Path,
    *,
    overwrite: bool,
    stream: bool,
    resume: bool | None = None,
) -> None:
    """Refuse options of stages that do not suit a plan. Raises :class:`~merging.errors.MergingError`."""
    if keep_stages is None:
        if plan.stages and stream:
            raise OptionError(
                f"{option('stream', True)} reads each file once, in its order, and recipes among the models may need "
                f"them in another: leave it out"
            )
        return
    if resume:
        raise OptionError(f"{option('resume', True)} does not go with {option('keep_stages')}: leave one of them out")
    if not plan.stages:
        raise OptionError(f"{option('keep_stages')} keeps recipes among the models, and there is none: leave it out")
    output = destination if isinstance(destination, StorePath) else destination.resolve()
    for stage in all_stages(plan.stages):
        folder = keep_stages / stage.name
        if output in (kept := folder.resolve(), *kept.parents) or kept in output.parents:
            raise OptionError(
                f"{option('keep_stages')}: {folder} and the output {destination} would be one in the other: choose a "
                f"folder next to the output"
            )
        check_output(stage.plan, folder, overwrite)


def keep_stage(
    folder: Path, overwrite: bool, settings: StageSettings, stage: Stage, progress: Progress | None
) -> dict[str, Stored]:
    """Write a stage as a model in a folder of its own, and return the tensors in its files."""
    destination = folder / stage.name
    with StagedOutput(destination, overwrite, file=False) as staged:
        write_output(stage.plan, stage.plan, staged, replace(settings, progress=progress))
        staged.commit()
    opened = [open_tensors(file)[0] for file in sorted(destination.glob("*.safetensors"))]
    return {name: stored for tensors in opened for name, stored in tensors.items()}
