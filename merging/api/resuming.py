"""Merges that go on where a run stopped: when they do, and what must be the same."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

from merging.errors import OptionError, OutputError, option
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import StorePath
from merging.output.header import RECIPE_KEY, SOURCES_KEY, header_metadata
from merging.plan import Plan
from merging.plan.provenance import etags_of
from merging.sources import Model
from merging.storage.leftovers import Identity, Leftover, find_abandoned, find_unfinished

__all__ = ["prepare_resuming", "states_of"]

_LARGE = 10_000_000_000
"""Bytes of an output from which on a merge that stopped is gone on with by default."""


def prepare_resuming(
    plan: Plan, shown: Plan, destination: Path, device: torch.device | None, resume: bool | None
) -> tuple[Identity | None, int]:
    """Decide whether a merge can be gone on with when it stops, and whether it goes on with one that stopped.

    Args:
        plan: the plan.
        shown: the plan that the output's header describes.
        destination: the file or folder to write.
        device: the device of the merge.
        resume: True or False as the user stated; None for outputs above 10 GB, and where a merge stopped that can be
            gone on with.

    Returns:
        The identity of the run, None without resuming; and the bytes that a run left which this one goes on with.

    Raises:
        OptionError: for ``resume`` with an output in an object store.
        OutputError: if a merge of something else stopped at this destination, with the first difference.
    """
    if isinstance(destination, StorePath):
        if resume:
            raise OptionError(
                f"{destination}: {option('resume', True)} goes on with outputs on a local disk alone: leave it out, or "
                f"merge to a local disk and copy the output"
            )
        return None, 0
    left = [found for lock in find_abandoned(destination) if (found := find_unfinished(lock.folder)) is not None]
    if resume is False:
        for each in left:
            Leftover(each.folder, destination).remove()
        return None, 0
    if resume is None and not left and plan.out_bytes < _LARGE:
        return None, 0
    identity = _identity_of(plan, shown, device)
    differences = [each.difference(identity) for each in left]
    if left and None not in differences:
        raise OutputError(
            f"{destination}: another merge to it stopped, and {differences[0]}: repeat the same merge, or "
            f"remove its finished work ({left[0].folder}) with {option('resume', False)}"
        )
    return identity, next((each.bytes for each, other in zip(left, differences, strict=True) if other is None), 0)


def _identity_of(plan: Plan, shown: Plan, device: torch.device | None) -> Identity:
    """Return all that decides the bytes of an output, by a name for messages."""
    header = header_metadata(shown)
    recipe = json.loads(header.pop(RECIPE_KEY))
    header.pop(SOURCES_KEY, None)  # the state of the files says more
    identity = {"merging": header.pop("merging_version"), "torch": header.pop("torch_version")}
    identity["the device"] = "cpu" if device is None else device.type
    identity["the kernels of the processor"] = torch.backends.cpu.get_cpu_capability()
    recipe |= recipe.pop("parameters", {})
    identity |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in recipe.items()}
    identity |= header
    donor = plan.vocabulary.of if plan.vocabulary else None
    for model in (*plan.leaves, *plan.models, plan.base, donor):
        identity |= {} if model is None else states_of(model)
    return identity


def states_of(model: Model) -> dict[str, str]:
    """Return the state of a model's files; commits and ETags state them, also where they are not downloaded yet."""
    etags = etags_of(model)
    if model.origin is not None and etags:
        return {f"{model.origin.repo}/{name}": f"the ETag {etag}" for name, etag in etags.items()}
    if model.origin is not None:
        return {str(model.origin): "an input"}
    return {str(file): _state_of(file) for file in model.files}


def _state_of(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return "not on the disk"
    when = datetime.fromtimestamp(status.st_mtime_ns // 10**9, timezone.utc)
    return f"{status.st_size} bytes, changed at {when:%Y-%m-%d %H:%M:%S}.{status.st_mtime_ns % 10**9:09}"
