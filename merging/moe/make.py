"""Making mixtures of experts: from a recipe to a folder that is complete, or not there at all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.display.tables import Displayed
from merging.engine.devices import supply_operations
from merging.engine.download import download_model
from merging.engine.process_memory import available_memory
from merging.engine.resources import pick_device
from merging.engine.threads import cores, share_out
from merging.errors import OptionError, OutputError, option
from merging.hub.address import Address
from merging.hub.repository import open_repository
from merging.maths.lazy_torch import torch
from merging.moe.card import moe_card
from merging.moe.parts import CopiedTensor, GivenTensor, OutputPart
from merging.moe.plan import MoePlan, plan_moe
from merging.moe.recipe import MoeRecipe, read_moe_recipe
from merging.moe.routers import make_routers
from merging.moe.smile_plan import plan_smile
from merging.output.header import SOURCES_KEY, VERSION_KEYS
from merging.output.model_folder import companion_files
from merging.sources.checkpoint import content_key
from merging.sources.model_files import COMPANIONS
from merging.sources.small_files import copy_file
from merging.sources.tokenizers import TOKENIZER_FILES
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.writer import TensorWriter
from merging.type_checks import check_types
from merging.version import __version__

__all__ = ["MOE_RECIPE_KEY", "MixtureOfExperts", "check_moe_output", "make_moe", "make_planned_moe", "preview_moe"]

MOE_RECIPE_KEY = "merging_moe_recipe"
"""The entry of the recipe in the header of a mixture's weights."""

_SHARD = 5_000_000_000
"""The most bytes in one file."""


@dataclass(frozen=True, slots=True, repr=False)
class MixtureOfExperts(Displayed):
    """A mixture of experts that was written.

    Attributes:
        path: the folder.
        architecture: the name of its type.
        experts: the number of experts that the router chooses from.
        tensors: the number of tensors.
        bytes: the size of the tensors in bytes.
        seconds: the time that it took.
        notices: remarks for people.
    """

    path: Path
    architecture: str
    experts: int
    tensors: int
    bytes: int
    seconds: float
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path), "notices": list(self.notices)}


@check_types()
def preview_moe(recipe: str | Path | Mapping[str, Any] | MoeRecipe, *, lenient: bool = False) -> MoePlan:
    """Plan a mixture of experts without making it: headers are read, and nothing is written.

    Args:
        recipe: the recipe, as for :func:`make_moe`.
        lenient: as for :func:`make_moe`.

    Returns:
        The plan: its tensors, sizes in bytes, config and notices.

    Raises:
        MergingError: for everything that :func:`make_moe` refuses before it reads values.
    """
    loaded, notices = read_moe_recipe(recipe, lenient=lenient)
    plan = plan_smile(loaded) if loaded.gate_mode == "smile" else plan_moe(loaded)
    return replace(plan, notices=(*notices, *plan.notices))


@check_types()
def make_moe(
    recipe: str | Path | Mapping[str, Any] | MoeRecipe,
    output: str | Path,
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    lenient: bool = False,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> MixtureOfExperts:
    """Make a mixture of experts of dense models or adapters, without training.

    Args:
        recipe: the recipe in mergekit's schema for mixtures: the path of a YAML file, YAML itself, its values, or a
            recipe. ``gate_mode: smile`` makes a mixture of low-rank experts that needs no prompts.
        output: the folder to write.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: where prompts run, and changes are decomposed.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        lenient: whether unknown keys, which mergekit ignores, are ignored with a notice.
        overwrite: whether an output that exists is replaced.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.

    Returns:
        The path, the type and the size of the mixture, and remarks.

    Raises:
        MergingError: for recipes and models that make no mixture, and an output that cannot be written. Nothing is
            left behind then.

    Example:
        >>> import merging
        >>> experts = [{"source_model": "code", "positive_prompts": ["def main():"]},
        ...            {"source_model": "law", "positive_prompts": ["The plaintiff"]}]
        >>> made = merging.make_moe({"base_model": "base", "experts": experts}, "mixture")
        >>> made.architecture, made.experts
        ('Mixtral', 2)
    """
    plan = preview_moe(recipe, lenient=lenient)
    return make_planned_moe(
        plan,
        Path(output),
        device=pick_device(str(device)),
        threads=threads,
        overwrite=overwrite,
        progress=resolve_progress(progress, "mixing"),
    )


def check_moe_output(plan: MoePlan, destination: Path, overwrite: bool, dry: bool = False) -> str:
    """Refuse a destination that a mixture cannot take; with ``dry`` return a remark if it exists.

    Raises :class:`~merging.errors.OutputError`.
    """
    if destination.suffix == ".safetensors":
        raise OutputError(f"{destination}: a mixture is a folder, with its config: choose another {option('output')}")
    inputs = [path for source in plan.sources for path in source.files]
    return check_destination(destination, inputs, plan.out_bytes, overwrite, dry)


def make_planned_moe(
    plan: MoePlan,
    destination: Path,
    *,
    device: torch.device,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MixtureOfExperts:
    """Make the mixture of a plan; the other arguments are as for :func:`make_moe`."""
    begun = time.perf_counter()
    workers = _count_workers(plan, threads)
    check_moe_output(plan, destination, overwrite)
    _download(plan, progress)
    companions = _companions(plan)
    card = moe_card(plan)
    with supply_operations(device):
        parts = [*_seed_noise(plan), *_routers(plan, device, progress)]
    with StagedOutput(destination, overwrite, False) as staged:
        writer = TensorWriter(
            staged.folder, "model", [out for part in parts for out in part.outs], _metadata(plan), _SHARD
        )
        try:
            _write(parts, writer, workers, device, progress)
            writer.finish()
        finally:
            writer.close()
        for name, source in companions.items():
            (staged.folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, staged.folder / name, source.parents[name.count("/")])
        text = json.dumps(plan.config, indent=2) + "\n"
        for name, content in {"config.json": text, "README.md": card, **plan.code}.items():
            (staged.folder / name).write_text(content, encoding="utf-8")
        staged.commit()
    made = MixtureOfExperts(
        path=destination,
        architecture=plan.architecture,
        experts=len(plan.recipe.experts),
        tensors=len(plan.outs),
        bytes=plan.out_bytes,
        seconds=time.perf_counter() - begun,
        notices=(*plan.notices, *staged.notices),
    )
    report_notices(made.notices)
    return made


def _count_workers(plan: MoePlan, threads: int | None) -> int:
    """Return the number of workers, as far as half of the memory that is available allows; by default one a core.

    Raises :class:`~merging.errors.OptionError` for less than one.
    """
    wanted = cores() if threads is None else threads
    if wanted < 1:
        raise OptionError(f"threads = {wanted!r}: at least one is needed")
    available, each = available_memory(), max(part.memory for part in plan.parts)
    return wanted if available is None else max(1, min(wanted, available // 2 // each))


def _write(
    parts: list[OutputPart], writer: TensorWriter, workers: int, device: torch.device, progress: Progress | None
) -> None:
    total, done = sum(out.nbytes for part in parts for out in part.outs), 0

    def count(part: OutputPart) -> None:
        nonlocal done
        done += sum(out.nbytes for out in part.outs)
        if progress:
            progress(done, total)

    share_out(
        parts,
        lambda device: device,
        lambda device, part: part.write(writer, device),
        count,
        threads=workers,
        devices=[device],
    )


def _seed_noise(plan: MoePlan) -> list[OutputPart]:
    """Return the plan's parts; noise depends on the content of the base too."""
    key = content_key(plan.base.checkpoint.tensors) if any(each.noise_scale for each in plan.recipe.experts) else ""
    return [
        replace(part, place=(*part.place, key)) if isinstance(part, CopiedTensor) and part.noise else part
        for part in plan.parts
    ]


def _routers(plan: MoePlan, device: torch.device, progress: Progress | None) -> list[GivenTensor]:
    if not plan.routers:
        return []
    made = make_routers(
        plan.recipe,
        plan.base,
        layers=len(plan.routers),
        shared=bool(plan.shared_routers),
        key="" if plan.recipe.prompted else content_key(plan.base.checkpoint.tensors),
        device=device,
        progress=progress,
    )
    found = [GivenTensor(out=out, values=rows) for out, rows in zip(plan.routers, made.experts, strict=True)]
    if made.shared is not None:
        found += [GivenTensor(out=out, values=rows) for out, rows in zip(plan.shared_routers, made.shared, strict=True)]
    return found


def _download(plan: MoePlan, progress: Progress | None) -> None:
    """Download the files of the Hub that are read: of experts the files with tensors of MLPs alone."""
    patterns = (*TOKENIZER_FILES, *COMPANIONS)
    origin = plan.base.checkpoint.origin
    if origin is not None:
        open_repository(Address(origin.repo, origin.commit)).download_files(patterns, origin.folder)
    for source in plan.sources:
        wanted = source.checkpoint
        if source is not plan.base and plan.routers:
            mlps = {name: each for name, each in wanted.tensors.items() if ".mlp." in name}
            wanted = replace(wanted, tensors=mlps)
        for model in (wanted, source.adapter):
            if model is not None:
                download_model(model, progress)


def _companions(plan: MoePlan) -> dict[str, Path]:
    """Return the files that are copied from the base, by their names in the output. Each is checked first."""
    folder = plan.base.checkpoint.folder
    return {} if folder is None else companion_files(folder, (*TOKENIZER_FILES, *COMPANIONS))


def _metadata(plan: MoePlan) -> dict[str, str]:
    records = plan.record_sources() if plan.records is None else plan.records
    return {
        MOE_RECIPE_KEY: json.dumps(plan.recipe.to_dict(), ensure_ascii=False),
        SOURCES_KEY: json.dumps([each.to_dict() for each in records], ensure_ascii=False),
        **dict(zip(VERSION_KEYS, (__version__, torch.__version__), strict=True)),
    }
