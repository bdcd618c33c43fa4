"""Bringing what a plan needs of the Hub to this machine, before the first value is merged or shard by shard."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from merging.engine.threads import Progress, share_out
from merging.hub.address import Address
from merging.hub.open_model import open_model
from merging.hub.remote import RemoteFile, Window
from merging.hub.repository import open_repository
from merging.methods.families.dropping import Dropping
from merging.plan import Item, Plan
from merging.plan.checks import check_packed, content_keys
from merging.sources import Adapter, Checkpoint, tensors_of
from merging.sources.adapter import Change
from merging.sources.stored import holders_of

__all__ = ["absent", "arrived", "awaited", "brought"]

_STREAMS = 4
"""Files that are fetched at a time."""


def awaited(plan: Plan) -> list[RemoteFile]:
    """The files that the plan reads and that are not on this machine yet, in the order in which it reads them."""
    found = dict.fromkeys(remote for item in plan.items for remote in _remote(item))
    return [remote for remote in found if not remote.at_hand]


def absent(model: Checkpoint | Adapter) -> list[RemoteFile]:
    """The weights files of a model that are not on this machine yet."""
    return [each for each in holders_of(tensors_of(model)) if isinstance(each, RemoteFile) and not each.at_hand]


def brought(model: Checkpoint | Adapter, progress: Progress | None = None) -> None:
    """Download all weights of a model, so that its files lie where they seem to."""
    files = absent(model)
    if files:
        _fetch(files, progress)


def _remote(item: Item) -> list[RemoteFile]:
    parts = [each for each in (*item.inputs, item.base) if each is not None]
    tensors = [tensor for each in parts for tensor in (each.tensors if isinstance(each, Change) else (each,))]
    return [holder for holder in holders_of(tensors) if isinstance(holder, RemoteFile)]


def arrived(
    plan: Plan, companions: Sequence[str], *, stream: Path | None = None, progress: Progress | None = None
) -> Plan:
    """The plan, when what it reads has come: whole files into the library's cache, checked by their hashes.

    ``companions`` are patterns of the files that are copied beside the output. With ``stream``, a folder, files are
    only fetched when the merge comes to them, and dropped behind it, so that at most two of each model lie there.
    Raises :class:`~merging.errors.InputError` for what the Hub or the disk refuses.
    """
    if plan.reference is not None and plan.reference.origin is not None and plan.output == "model":
        origin = plan.reference.origin
        open_repository(Address(origin.repo, origin.commit)).download_files(companions, origin.folder)
    files = awaited(plan)
    if not files:
        return plan
    if stream is None:
        _fetch(files, progress)
    else:
        windows = {remote.repo: Window(stream) for remote in files}
        for remote in files:
            remote.window = windows[remote.repo]
        plan = replace(plan, items=tuple(sorted(plan.items, key=_files)))
        if not any(isinstance(link, Dropping) for link in plan.recipe.method.links()):
            return plan  # only random masks need the keys of the contents
    _check_base(plan)
    return replace(plan, keys=content_keys(plan.models)[0])


def _check_base(plan: Plan) -> None:
    """Refuse packs beside a base of other content, which could not be told before its values were here."""
    packed = any(isinstance(model, Adapter) and model.base_key for model in plan.models)
    if packed and plan.base is not None and plan.base.origin is not None:
        whole = open_model(str(plan.base.origin), dequantize=plan.recipe.dequantise)
        assert isinstance(whole, Checkpoint)
        check_packed(plan.models, whole, plan.recipe.allow_different_bases)


def _files(item: Item) -> tuple[tuple[str, ...], tuple[str, int]]:
    """The files that an item is read from, and its place, so that items of the same files follow each other."""
    return tuple(remote.name for remote in _remote(item)), item.order()


def _fetch(files: Sequence[RemoteFile], progress: Progress | None) -> None:
    total, done = sum(remote.size for remote in files), dict.fromkeys(files, 0)
    stop = threading.Event()

    def work(worker: None, remote: RemoteFile) -> None:
        def count(file_done: int, _: int) -> None:
            if stop.is_set():  # the part that was downloaded is kept, and continued another time
                raise KeyboardInterrupt
            done[remote] = file_done
            if progress:
                progress(sum(done.values()), total)

        remote.fetch(count)

    share_out(files, lambda: None, work, lambda _: None, threads=_STREAMS, device=torch.device("cpu"), stop=stop)
