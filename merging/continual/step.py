"""One step of a store: the plan of the next model alone, the parts of the next state, and the step's record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from math import sqrt
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.continual.base_check import check_distance, check_not_base, check_stated_base
from merging.continual.folder import remove_state
from merging.continual.manifest import STATES, Manifest, Part, StepRecord, sha256_of
from merging.continual.state import count_forms, open_state, state_metadata, step_plan
from merging.continual.update_rules import rule_of
from merging.display.progress import Progress
from merging.engine.download import download_plan, missing_files
from merging.engine.resources import workers_within
from merging.engine.run import Done, run
from merging.errors import InputError, OutputError, escape_unprintable
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.sums import safe_ratio
from merging.methods.contract.update_rule import UpdateStep
from merging.methods.task_arithmetic import TaskArithmetic
from merging.output.licences import source_of
from merging.plan import Item, Plan, plan_of
from merging.plan.recipe import Recipe
from merging.sources import Adapter, Checkpoint, check_in_place
from merging.sources.changes import Change
from merging.sources.stored import Stored
from merging.storage.writer import TensorWriter

__all__ = [
    "AddOptions",
    "NewState",
    "StepExecution",
    "content_of",
    "plan_alone",
    "publish_state",
    "step_record",
    "write_state",
]


@dataclass(frozen=True, slots=True)
class AddOptions:
    """The options of adding a model: which models to refuse, and the callback for bytes that are fetched."""

    allow_different_bases: bool
    on_mismatch: str
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class StepExecution:
    """Where and with how much memory a step runs, which changes no byte of its state."""

    devices: Sequence[torch.device]
    threads: int
    max_memory: int | str | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class NewState:
    """The next state: the hashes of its parts by name, the plan and outcome of its first part, and notices."""

    sha256: dict[str, str]
    plan: Plan
    done: Done
    notices: tuple[str, ...]


def plan_alone(
    source: Checkpoint | Adapter,
    base: Checkpoint,
    manifest: Manifest,
    options: AddOptions,
) -> Plan:
    """Fetch a model and return the plan of a merge of it alone; a model of another base is refused."""
    values: dict[str, Any] = {"on_mismatch": options.on_mismatch, "base": str(base.path), "kind": "model"}
    recipe = Recipe(models=(str(source.path),), method=TaskArithmetic(), **values)
    plan, notices = plan_of(recipe, (source,), base), []
    if options.allow_different_bases:
        pass
    elif isinstance(source, Adapter):
        notices = check_stated_base(source, base, manifest)
    else:
        check_not_base(source, base)
    plan = download_plan(plan, (), progress=options.progress)
    if isinstance(source, Checkpoint) and not options.allow_different_bases:
        check_distance(plan)
    return replace(plan, notices=(*plan.notices, *notices))


def write_state(
    manifest: Manifest, store: Path, alone: Plan, content: str, *, folder: Path, execution: StepExecution
) -> NewState:
    """Update each part of the state by the model of ``alone``, and write the next state to a folder, durably."""
    last = manifest.steps[-1] if manifest.steps else None
    shown: list[tuple[Plan, Done]] = []
    digests: dict[str, str] = {}
    for name, update in rule_of(manifest).parts.items():
        held = open_state(store / last.parts[name].file) if last else None
        plan = step_plan(held, alone, UpdateStep(then=update), content, manifest.max_rank)
        workers = workers_within(plan, execution.threads, execution.max_memory)
        writer = TensorWriter(folder, name, plan.outs, state_metadata(plan), None)
        try:
            done = run(
                plan, writer, devices=execution.devices, threads=workers, progress=execution.progress, scratch=folder
            )
            writer.finish()
        except InputError:
            _refuse_odd_values(alone)
            raise
        finally:
            writer.close()
        shown.append((plan, done))
        digests[name] = sha256_of(folder / f"{name}.safetensors")
    plan, done = shown[0]
    return NewState(digests, plan, done, tuple(dict.fromkeys([*alone.notices, *done.notices])))


def _refuse_odd_values(alone: Plan) -> None:
    """Raise an error that names the tensor with values that no store accepts, if there is one."""
    path = alone.models[0].path
    for item in alone.items:
        (given,) = item.inputs
        if given is None or item.form == "copy":
            continue
        value = _values(item, given, item.dtype)
        if not bool(value.isfinite().all()):
            raise InputError(
                f"{path}: {item.site.name} holds NaN or infinite values, which would stay in the merge for good: "
                f"repair or leave out this model"
            )
        if not bool(value.square().sum().isfinite()):
            raise InputError(
                f"{path}: {item.site.name} holds values of up to {float(value.abs().max()):.0e}, whose squares have no "
                f"sum: repair or leave out this model"
            )


def _values(item: Item, given: Stored | Change, dtype: torch.dtype) -> Tensor:
    """Read a model's weights of a tensor, or its change of it."""
    if isinstance(given, Stored):
        return given.read().to(dtype)

    def base() -> Tensor:
        assert item.base is not None
        return item.base.read().to(dtype)

    return given.read(item.site.shape, base, dtype).dense()


def step_record(
    before: Manifest, source: Checkpoint | Adapter, content: str, parts: Mapping[str, Part], new: NewState
) -> StepRecord:
    """Return the record of the next step."""
    plan, done = new.plan, new.done
    products = done.metrics
    held, square, merged = products["held.held"], products["next.next"], products["merged.merged"]
    added = merged - 2 * products["held.merged"] + held
    # the sums are of the tensors that the new model touches; what is held of others stays
    merged += max(0.0, before.steps[-1].merged ** 2 - held) if before.steps else 0.0
    rank, factored, full = count_forms(plan)
    notices = new.notices if square else (*new.notices, "it changes nothing of the base")
    return StepRecord(
        number=len(before.steps) + 1,
        source=escape_unprintable(str(source.path if source.origin else source.path.resolve())),
        sha256=content,
        kind="adapter" if isinstance(source, Adapter) else "model",
        stated_base=source.base if isinstance(source, Adapter) else None,
        licence=source_of(source).licence,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parts=dict(parts),
        norm=sqrt(square),
        kept=safe_ratio(sqrt(max(0.0, added)), sqrt(square)),
        cosine=safe_ratio(products["next.merged"], sqrt(square * merged)),
        merged=sqrt(merged),
        rank=rank,
        factored=factored,
        full=full,
        discarded=max(done.discarded.values(), default=0.0),
        notices=notices,
    )


def content_of(source: Checkpoint | Adapter) -> str:
    """Return a hash of a model's files: their bytes, in the order of their names, and an adapter's config.

    It is the same for a folder and for the weights file in it. The Hub must state the hashes of files that have yet to
    be fetched.
    """
    stated = {remote.path: remote.sha256 for remote in missing_files(source)}
    digest = hashlib.sha256()
    files = set(source.files)
    if isinstance(source, Adapter):
        files |= {file.with_name("adapter_config.json") for file in source.files if file.stem == "adapter_model"}
    for file in sorted(file for file in files if file.is_file()):
        digest.update(bytes.fromhex(stated.get(file) or sha256_of(file)))
    check_in_place(source)
    return digest.hexdigest()


def publish_state(store: Path, folder: Path, number: int, new: NewState) -> dict[str, Part]:
    """Give a finished state its final name, durably."""
    digest = hashlib.sha256("".join(new.sha256.values()).encode()).hexdigest()[:12]
    final = store / STATES / f"{number:06}-{digest}"
    try:
        os_calls.sync_folder(folder)
        os_calls.set_mode(folder, 0o777 & ~os_calls.umask())
        folder.rename(final)
        os_calls.sync_folder(final.parent)
    except OSError as error:
        remove_state(final)
        raise OutputError(f"{final}: cannot be put in place: {error.strerror}") from None
    files = {name: final / f"{name}.safetensors" for name in new.sha256}
    return {
        name: Part(file=file.relative_to(store).as_posix(), sha256=new.sha256[name], bytes=file.stat().st_size)
        for name, file in files.items()
    }
