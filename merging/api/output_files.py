"""The files of an output: the weights with their header, and the files that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merging.api.chosen_ranks import open_decomposed
from merging.display.progress import announce_phase
from merging.engine.devices import main_device
from merging.engine.measures import Measures
from merging.engine.run import Done, Sink, run
from merging.engine.stages import StageSettings
from merging.errors import OutputError, option
from merging.hub.address import Address
from merging.hub.repository import open_repository
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import StorePath
from merging.output.gguf_metadata import gguf_metadata
from merging.output.header import header_metadata
from merging.output.lora_header import lora_stem
from merging.output.model_folder import (
    check_companions,
    companion_patterns,
    copy_companions,
    write_model_companions,
)
from merging.output.peft_config import write_adapter_companions
from merging.plan import Plan
from merging.plan.outputs.quantized import describe_errors
from merging.plan.stages import all_stages
from merging.sources.dtypes import DTYPES
from merging.storage.gguf_writer import GgufWriter
from merging.storage.output_file import CreateFile, LocalFile
from merging.storage.quantizing_writer import ResumableQuantizingWriter
from merging.storage.replacing import FILE_ENDINGS
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.store_destination import check_store_destination
from merging.storage.store_output import StoreOutput, file_creator
from merging.storage.writer import ComponentWriter, TensorWriter

__all__ = [
    "Written",
    "check_output",
    "is_file",
    "make_writer",
    "write_companions",
    "write_constants",
    "write_output",
    "write_stage_companions",
]


def is_file(destination: Path) -> bool:
    """Return whether an output of this name is a single file, and not a folder."""
    return destination.suffix in FILE_ENDINGS


def write_constants(plan: Plan, writer: Sink) -> None:
    """Write the numbers that a file holds in addition to merged tensors."""
    for constant in plan.constants:
        values = torch.full((constant.count,), constant.value, dtype=DTYPES[constant.out.dtype_name])
        writer.write(constant.out.name, values, constant.start)


def check_ending(plan: Plan, destination: Path) -> None:
    """Refuse a file whose ending belongs to another format. Raises :class:`~merging.errors.OutputError`."""
    if destination.suffix == ".gguf" and plan.format != "gguf":
        what = f"add {option('format', 'gguf')}"
        if plan.output == "model":
            what = "name a folder, and convert it with llama.cpp's convert_hf_to_gguf.py"
        raise OutputError(f"{destination}: a merged {plan.output} is not written as a GGUF file here: {what}")
    if destination.suffix == ".safetensors" and plan.format == "gguf":
        raise OutputError(
            f"{destination}: a LoRA in the format of gguf is a GGUF file: name a single file ending in .gguf, or a "
            f"folder"
        )


def write_companions(plan: Plan, folder: Path, done: Done, weights: bool = True) -> list[str]:
    """Write the files that go with the weights, and return remarks on them.

    ``weights`` says whether the weights of components that are not merged are copied too.
    """
    if plan.output == "model":
        return write_model_companions(plan, folder, weights)
    write_adapter_companions(plan, folder, done.energy_notices)
    copy_companions(plan, folder)
    return []


def make_writer(
    plan: Plan,
    folder: Path,
    destination: Path,
    *,
    device: torch.device | None = None,
    resume: bool = False,
    create: CreateFile = LocalFile,
) -> TensorWriter | ComponentWriter | GgufWriter:
    """Return the writer of the output's weights, with the file names that readers look for.

    ``device`` is the device that the merge runs on. With ``resume``, files that are in the folder are written on.
    ``create`` creates files of safetensors.
    """
    metadata = header_metadata(plan, device)
    if plan.format == "gguf":
        name = destination.stem if is_file(destination) else destination.name
        architecture, fields = gguf_metadata(plan)
        return GgufWriter(folder / f"{name}.gguf", architecture, plan.outs, fields | metadata, resume=resume)
    if is_file(destination):
        return TensorWriter(folder, destination.stem, plan.outs, metadata, None, resume=resume, create=create)
    reference = plan.reference
    if plan.output == "adapter" or reference is None:
        stem = lora_stem(plan, destination)
        return TensorWriter(folder, stem, plan.outs, metadata, None, resume=resume, create=create)
    stems = {name: each.stem for name, each in reference.components.items() if name not in plan.kept}
    size = plan.recipe.shard_size
    if stems:
        return ComponentWriter(folder, stems, plan.outs, metadata, size, resume=resume, create=create)
    return TensorWriter(folder, reference.stem, plan.outs, metadata, size, resume=resume, create=create)


def write_stage_companions(plan: Plan, folder: Path) -> dict[str, str]:
    """Write the files that go with a stage's weights, before these are there, and return the weights' header."""
    reference = plan.reference
    if reference is not None and reference.origin is not None and plan.output == "model":
        origin = reference.origin
        open_repository(Address(origin.repo, origin.commit)).download_files(companion_patterns(plan), origin.folder)
    check_companions(plan)
    write_companions(plan, folder, Done(0.0, [], {}, {}))
    return header_metadata(plan)


@dataclass(frozen=True, slots=True)
class Written:
    """An output that is complete: its plan, with the ranks that were chosen; the record of its run; and remarks.

    ``errors`` are the relative errors of tensors that were quantised, by name.
    """

    plan: Plan
    done: Done
    remarks: list[str]
    errors: dict[str, float]


def write_output(
    plan: Plan,
    shown: Plan,
    staged: StagedOutput | StoreOutput,
    settings: StageSettings,
    measures: Measures | None = None,
) -> Written:
    """Run a plan into a staged output, and write the files that go with the weights.

    ``shown`` is the plan that the header and the card describe; ``measures`` receives the measures of merged tensors.
    """
    settings = replace(settings, scratch=staged.scratch)
    with open_decomposed(plan, settings, measures) as (sized, decomposition):
        remarks = []
        if decomposition is not None:
            plan, shown = sized, replace(sized, recipe=shown.recipe, sources=shown.sources)
            remarks = decomposition.describe(plan.ranks)
        journal = settings.journal.of_run("merge") if settings.journal else None
        if journal is None:
            staged.clear()
        writer = make_writer(
            shown,
            staged.folder,
            staged.destination,
            device=main_device(settings.devices),
            resume=journal is not None,
            create=file_creator(staged),
        )
        encodings = plan.quantized.encodings if plan.quantized else {}
        quantizing = ResumableQuantizingWriter(writer, encodings)
        try:
            write_constants(plan, writer)  # first, since a part of a file is uploaded when it is complete
            done = run(
                plan,
                writer if plan.quantized is None else quantizing,
                devices=settings.devices,
                threads=settings.threads,
                progress=settings.progress if decomposition is None else None,
                scratch=staged.scratch,
                decomposition=decomposition,
                journal=journal,
                make_crew=settings.make_crew,
                measures=measures,
            )
            announce_phase(settings.progress, "making it durable")
            writer.finish()
            errors = quantizing.errors()
            if plan.quantized is not None:
                remarks += describe_errors(errors, plan.quantized)
        finally:
            writer.close()
    if not staged.file:
        remarks += write_companions(shown, staged.folder, done)
    return Written(plan, done, remarks, errors)


def check_output(plan: Plan, destination: Path, overwrite: bool, dry: bool = False, there: int = 0) -> str:
    """Refuse a destination that the plan's output cannot or must not take.

    ``there`` are the bytes that a run left which this one goes on with.

    With ``dry`` nothing is touched, and a destination that exists is not refused: a remark on it is returned. Raises
    :class:`~merging.errors.OutputError`.
    """
    plans = [plan, *(stage.plan for stage in all_stages(plan.stages))]
    with_tokenizer = [each.vocabulary.of for each in plans if each.vocabulary]
    models = [model for model in (*plan.leaves, *plan.models, plan.base, *with_tokenizer) if model]
    inputs = [file for model in models for file in (model.path, *model.files)]
    if is_file(destination) and plan.output == "model" and plan.reference and plan.reference.components:
        raise OutputError(
            f"{destination}: what comes out is made of several models, in a folder: choose another {option('output')}"
        )
    check_ending(plan, destination)
    known = 0 if plan.sized is not None else plan.out_bytes  # else its ranks are upper bounds
    nbytes = known + plan.spool_bytes + plan.stage_bytes + plan.kept_bytes_on_disk
    return check_place(destination, inputs, max(0, nbytes - there), overwrite, dry)


def check_place(destination: Path, inputs: Sequence[Path], nbytes: int, overwrite: bool, dry: bool) -> str:
    """Refuse a destination on a disk or in a store, as :func:`~merging.storage.staging.check_destination` does."""
    if isinstance(destination, StorePath):
        return check_store_destination(destination, inputs, overwrite, dry)
    return check_destination(destination, inputs, nbytes, overwrite, dry)
