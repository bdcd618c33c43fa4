"""One step of a store: the next model by itself on the base, the parts of the next state, and the record of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from math import sqrt
from pathlib import Path

import torch

from merging.continual import growth
from merging.continual.manifest import Manifest, Part, StepRecord, sha256_of
from merging.continual.state import open_state, state_metadata, step_plan
from merging.errors import InputError
from merging.files import workers_within
from merging.linalg import safe_ratio
from merging.methods import chain
from merging.methods.task_arithmetic import TaskArithmetic
from merging.plan import Plan, plan_of
from merging.plan.checks import same_base
from merging.recipe import Recipe
from merging.run import Done, run
from merging.sources import Adapter, Checkpoint, open_model
from merging.threads import Progress
from merging.vetting import UNRELATED, relative_changes
from merging.writer import TensorWriter

__all__ = ["Execution", "Grown", "content_of", "grow", "open_base", "plan_alone", "record"]


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


def open_base(path: str | Path) -> Checkpoint:
    """The base of a store. Raises :class:`~merging.errors.MergingError`."""
    base = open_model(path)
    if isinstance(base, Adapter):
        raise InputError(f"{path}: is an adapter, and the base of a store is the full model that all were trained from")
    return base


def plan_alone(source: Checkpoint | Adapter, base: Checkpoint, manifest: Manifest, allow_different: bool) -> Plan:
    """The plan of the new model by itself on the base; refuses one that belongs to another."""
    if isinstance(source, Adapter) and source.base and not allow_different:
        stated = (step.stated_base for step in manifest.steps)
        other = next((name for name in stated if name and not same_base(name, source.base)), None)
        if other:
            raise InputError(
                f"{source.path} was trained on {source.base}, and earlier ones on {other}: if they are the same model "
                f"under two names, use --allow-different-bases"
            )
    recipe = Recipe(models=(str(source.path),), method=TaskArithmetic(), base=str(base.path), kind="model")
    plan = plan_of(recipe, (source,), base)
    change = relative_changes(plan)[0]
    if change > UNRELATED and not allow_different:
        raise InputError(
            f"{source.path} differs from the base {base.path} by {change:.0%} of its norm, so it is hardly a fine-tune "
            f"of it: use --allow-different-bases to add it all the same"
        )
    return plan


def grow(manifest: Manifest, store: Path, alone: Plan, content: str, folder: Path, execution: Execution) -> Grown:
    """Write the parts of the next state, what is held together with the model of ``alone``, to a folder; durably."""
    last = manifest.steps[-1] if manifest.steps else None
    shown: list[tuple[Plan, Done]] = []
    digests: dict[str, str] = {}
    for name, update in growth.parts(chain(manifest.method, manifest.parameters)).items():
        held = open_state(store / last.parts[name].file) if last else None
        plan = step_plan(held, alone, growth.Step(then=update), content, manifest.max_rank)
        workers = workers_within(plan, execution.threads, execution.max_memory)
        writer = TensorWriter(folder, name, plan.outs, state_metadata(plan), None)
        try:
            done = run(
                plan, writer, device=execution.device, threads=workers, progress=execution.progress, scratch=folder
            )
            writer.finish()
        finally:
            writer.close()
        shown.append((plan, done))
        digests[name] = sha256_of(folder / f"{name}.safetensors")
    return Grown(digests, *shown[0])


def record(
    before: Manifest, source: Checkpoint | Adapter, content: str, parts: Mapping[str, Part], grown: Grown
) -> StepRecord:
    """What the manifest says of the next step."""
    plan, done = grown.plan, grown.done
    held, square, with_held, with_next, merged = (
        done.facts[name] for name in ("held.held", "next.next", "held.merged", "next.merged", "merged.merged")
    )
    added = merged - 2 * with_held + held
    # the sums are of the tensors that the new model touches; what is held of others stays
    merged += max(0.0, before.steps[-1].merged ** 2 - held) if before.steps else 0.0
    forms = [item.form for item in plan.items if item.form != "copy"]
    return StepRecord(
        number=len(before.steps) + 1,
        source=str(source.path.resolve()),
        sha256=content,
        kind="adapter" if isinstance(source, Adapter) else "model",
        stated_base=source.base if isinstance(source, Adapter) else None,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parts=dict(parts),
        norm=sqrt(square),
        kept=safe_ratio(sqrt(max(0.0, added)), sqrt(square)),
        cosine=safe_ratio(with_next, sqrt(square * merged)),
        merged=sqrt(merged),
        rank=plan.rank,
        factored=forms.count("factors"),
        full=forms.count("delta"),
        discarded=max(done.discarded.values(), default=0.0),
    )


def content_of(source: Checkpoint | Adapter) -> str:
    """A hash of a model's files: their bytes, in the order of their names, and an adapter's config."""
    digest = hashlib.sha256()
    files = {*source.files, *([source.path / "adapter_config.json"] if isinstance(source, Adapter) else [])}
    for file in sorted(file for file in files if file.is_file()):
        digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()
