"""The files of an output: the weights with their header, and the files that go with them."""

from __future__ import annotations

from pathlib import Path

from merging.engine.run import Done
from merging.maths.lazy_torch import torch
from merging.output.header import header_metadata
from merging.output.lora_header import lora_stem
from merging.output.model_folder import copy_companions, write_model_companions
from merging.output.peft_config import write_adapter_companions
from merging.plan import Plan
from merging.sources.dtypes import DTYPES
from merging.storage.writer import ComponentWriter, TensorWriter

__all__ = ["is_file", "make_writer", "write_companions", "write_constants"]


def is_file(destination: Path) -> bool:
    """Return whether an output of this name is a single file, and not a folder."""
    return destination.suffix == ".safetensors"


def write_constants(plan: Plan, writer: TensorWriter | ComponentWriter) -> None:
    """Write the numbers that a file holds in addition to merged tensors."""
    for constant in plan.constants:
        values = torch.full((constant.count,), constant.value, dtype=DTYPES[constant.out.dtype_name])
        writer.write(constant.out.name, values, constant.start)


def write_companions(plan: Plan, folder: Path, done: Done) -> list[str]:
    """Write the files that go with the weights, and return remarks on them."""
    if plan.output == "model":
        return write_model_companions(plan, folder)
    write_adapter_companions(plan, folder, done.energy_notices)
    copy_companions(plan, folder)
    return []


def make_writer(plan: Plan, folder: Path, destination: Path) -> TensorWriter | ComponentWriter:
    """Return the writer of the output's weights, with the file names that readers look for."""
    metadata = header_metadata(plan)
    if is_file(destination):
        return TensorWriter(folder, destination.stem, plan.outs, metadata, None)
    reference = plan.reference
    if plan.output == "adapter" or reference is None:
        return TensorWriter(folder, lora_stem(plan, destination), plan.outs, metadata, None)
    stems = {name: each.stem for name, each in reference.components.items() if name not in plan.kept}
    if stems:
        return ComponentWriter(folder, stems, plan.outs, metadata, plan.recipe.shard_size)
    return TensorWriter(folder, reference.stem, plan.outs, metadata, plan.recipe.shard_size)
