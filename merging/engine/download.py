"""Downloading the files of the Hub that a plan reads: before the first value is merged, or shard by shard."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from merging.display.progress import Progress
from merging.engine.threads import share_out
from merging.hub.address import Address
from merging.hub.open_model import open_model
from merging.hub.remote import RemoteFile, Window
from merging.hub.repository import open_repository
from merging.methods.families.dropping import Dropping
from merging.plan import Item, Plan
from merging.plan.checks import check_packed, make_content_keys
from merging.plan.inputs.sentence_folders import modules_model
from merging.plan.stages import all_stages
from merging.sources import Adapter, Checkpoint, Model, tensors_of
from merging.sources.sentence_modules import SENTENCE_FILES
from merging.sources.stored import holders_of

__all__ = ["download_model", "download_plan", "missing_files"]

_STREAMS = 4
"""Files that are downloaded at a time."""


def missing_files(source: Plan | Model) -> list[RemoteFile]:
    """Return the weight files of a plan or a model that are not on this machine yet, in the order of reading."""
    if isinstance(source, Plan):
        plans = [*(stage.plan for stage in all_stages(source.stages)), source]
        tensors = (tensor for plan in plans for item in plan.items for tensor in item.stored)
        return [each for each in holders_of(tensors) if isinstance(each, RemoteFile) and not each.at_hand]
    return [each for each in holders_of(tensors_of(source)) if isinstance(each, RemoteFile) and not each.at_hand]


def download_model(model: Model, progress: Progress | None = None) -> None:
    """Download all weights of a model.

    Args:
        model: the model.
        progress: called with the bytes done and the bytes in all.

    Raises:
        InputError: for what the Hub or the disk refuses.
    """
    files = missing_files(model)
    if files:
        _fetch(files, progress)


def download_plan(
    plan: Plan, companions: Sequence[str], *, stream: Path | None = None, progress: Progress | None = None
) -> Plan:
    """Download the files that a plan reads into the library's cache, checked by their hashes.

    Args:
        plan: the plan.
        companions: patterns of the files that are copied into the output's folder with the weights.
        stream: a folder. With it, files are downloaded when the merge reaches them and deleted after use, so that it
            holds at most two files of each model.
        progress: called with the bytes done and the bytes in all.

    Returns:
        The plan to run: with ``stream`` in the order of the files, and with keys of the models' contents.

    Raises:
        InputError: for what the Hub or the disk refuses, and for packs of a base with another content.
    """
    if plan.reference is not None and plan.reference.origin is not None and plan.output == "model":
        origin = plan.reference.origin
        open_repository(Address(origin.repo, origin.commit)).download_files(companions, origin.folder)
    encoder = modules_model(plan.models, plan.base) if plan.output == "model" else None
    if encoder is not None and encoder is not plan.reference and encoder.origin is not None:
        origin = encoder.origin
        open_repository(Address(origin.repo, origin.commit)).download_files(SENTENCE_FILES, origin.folder)
    files = missing_files(plan)
    if not files:
        return plan
    if stream is None:
        _fetch(files, progress)
    else:
        windows = {remote.repo: Window(stream) for remote in files}
        for remote in files:
            remote.window = windows[remote.repo]
        plan = replace(plan, items=tuple(sorted(plan.items, key=_by_file)))
        if not any(isinstance(link, Dropping) for link in plan.recipe.method.links()):
            return plan  # only random masks need the keys of the contents
    _check_base(plan)
    return replace(plan, keys=make_content_keys(plan.models)[0])


def _remote_files(item: Item) -> list[RemoteFile]:
    return [holder for holder in holders_of(item.stored) if isinstance(holder, RemoteFile)]


def _check_base(plan: Plan) -> None:
    """Refuse packs of a base with another content, which nobody could see before the base's values were here."""
    packed = any(isinstance(model, Adapter) and model.base_key for model in plan.models)
    if packed and plan.base is not None and plan.base.origin is not None:
        whole = open_model(str(plan.base.origin), dequantize=plan.recipe.dequantise)
        assert isinstance(whole, Checkpoint)
        check_packed(plan.models, whole, plan.recipe.allow_different_bases)


def _by_file(item: Item) -> tuple[tuple[str, ...], tuple[str, int]]:
    """Return a key that sorts items of the same files together."""
    return tuple(remote.name for remote in _remote_files(item)), item.order()


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

    share_out(files, lambda _: None, work, lambda _: None, threads=_STREAMS, stop=stop)
