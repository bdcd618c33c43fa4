"""One step of a store: the next model by itself on the base, the parts of the next state, and the record of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from merging.continual.kinship import check_place, check_stated, check_values
from merging.continual.manifest import Manifest, Part, StepRecord, sha256_of
from merging.continual.state import held_forms, open_state, state_metadata, step_plan
from merging.continual.update_rules import rule_of
from merging.engine.download import download_plan, missing_files
from merging.engine.resources import workers_within
from merging.engine.run import Done, run
from merging.engine.threads import Progress
from merging.errors import InputError, escape_unprintable
from merging.maths.linalg import safe_ratio
from merging.methods.contract.update_rule import UpdateStep
from merging.methods.task_arithmetic import TaskArithmetic
from merging.output.licences import source_of
from merging.plan import Item, Plan, plan_of
from merging.plan.recipe import Recipe
from merging.sources import Adapter, Checkpoint, check_in_place
from merging.sources.adapter import Change
from merging.sources.stored import Stored
from merging.storage.writer import TensorWriter

__all__ = ["Execution", "Grown", "content_of", "grow", "plan_alone", "record"]


@dataclass(frozen=True, slots=True)
class Execution:
    """Where a step runs; none of it changes a byte."""

    device: torch.device
    threads: int
    max_memory: int | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Grown:
    """The next state's parts as they lie in their folder, by name, and what the first one's step showed."""

    sha256: dict[str, str]
    plan: Plan
    done: Done
    notices: tuple[str, ...]


def plan_alone(
    source: Checkpoint | Adapter,
    base: Checkpoint,
    manifest: Manifest,
    allow_different: bool,
    on_mismatch: str,
    progress: Progress | None,
) -> Plan:
    """The plan of the new model by itself on the base, when its files have come; refuses one of another base."""
    values = {"on_mismatch": on_mismatch, "base": str(base.path), "kind": "model"}
    recipe = Recipe(models=(str(source.path),), method=TaskArithmetic(), **values)
    plan, notices = plan_of(recipe, (source,), base), []
    if allow_different:
        pass
    elif isinstance(source, Adapter):
        notices = check_stated(source, base, manifest)
    else:
        check_place(source, base)
    plan = download_plan(plan, (), progress=progress)
    if isinstance(source, Checkpoint) and not allow_different:
        check_values(plan)
    return replace(plan, notices=(*plan.notices, *notices))


def grow(manifest: Manifest, store: Path, alone: Plan, content: str, folder: Path, execution: Execution) -> Grown:
    """Write the parts of the next state, what is held together with the model of ``alone``, to a folder; durably."""
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
                plan, writer, device=execution.device, threads=workers, progress=execution.progress, scratch=folder
            )
            writer.finish()
        except InputError:
            _name_odd_values(alone)
            raise
        finally:
            writer.close()
        shown.append((plan, done))
        digests[name] = sha256_of(folder / f"{name}.safetensors")
    plan, done = shown[0]
    return Grown(digests, plan, done, tuple(dict.fromkeys([*alone.notices, *done.notices])))


def _name_odd_values(alone: Plan) -> None:
    """Say which values of a model that was refused are at fault, if any are; no option of a store lets them in."""
    path = alone.models[0].path
    for item in alone.items:
        (download_model,) = item.inputs
        if download_model is None or item.form == "copy":
            continue
        value = _values(item, download_model, alone.dtype(item))
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


def _values(item: Item, download_model: Stored | Change, dtype: torch.dtype) -> Tensor:
    """What a model brings to a tensor."""
    if isinstance(download_model, Stored):
        return download_model.read().to(dtype)

    def base() -> Tensor:
        assert item.base is not None
        return item.base.read().to(dtype)

    return download_model.read(item.site.shape, base, dtype).dense()


def record(
    before: Manifest, source: Checkpoint | Adapter, content: str, parts: Mapping[str, Part], grown: Grown
) -> StepRecord:
    """What the manifest says of the next step."""
    plan, done = grown.plan, grown.done
    held, square, with_held, with_next, merged = (
        done.metrics[name] for name in ("held.held", "next.next", "held.merged", "next.merged", "merged.merged")
    )
    added = merged - 2 * with_held + held
    # the sums are of the tensors that the new model touches; what is held of others stays
    merged += max(0.0, before.steps[-1].merged ** 2 - held) if before.steps else 0.0
    rank, factored, full = held_forms(plan)
    notices = grown.notices if square else (*grown.notices, "it changes nothing of the base")
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
        cosine=safe_ratio(with_next, sqrt(square * merged)),
        merged=sqrt(merged),
        rank=rank,
        factored=factored,
        full=full,
        discarded=max(done.discarded.values(), default=0.0),
        notices=notices,
    )


def content_of(source: Checkpoint | Adapter) -> str:
    """A hash of a model's files: their bytes, in the order of their names, and an adapter's config.

    The same for a folder and for the weights file in it. Of what has yet to come from the Hub it must state the hashes.
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
