"""Watching a folder for models that appear, and adding each to a store when it is complete."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import Any, Literal

from merging.continual.folder import Busy
from merging.continual.manifest import Refused, StepRecord, printable
from merging.continual.soundness import Damaged
from merging.continual.store import ContinualStore
from merging.errors import FormatError, InputError, OptionError

__all__ = ["Event", "watch"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")

_SLICE = 0.2
"""Seconds that another writer is waited for at a time."""

Pause = Callable[[float], bool]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a model: it was added, was known already, or was refused, and why."""

    what: Literal["added", "known", "refused"]
    source: Path
    step: int | None = None
    reason: str = ""


def watch(
    store: ContinualStore,
    folder: str | Path,
    *,
    interval: float = 10.0,
    pause: Pause | None = None,
    tell: Callable[[Event], None] | None = None,
    once: bool = False,
    **options: Any,
) -> None:
    """Add every model of a folder that is new, the oldest first, and look again every ``interval`` seconds.

    A model is a weights file, or a folder that holds one, directly in ``folder``. It is complete when nothing in it has
    changed since the look before. One that is refused is noted in the manifest with the reason, and tried again only
    when it has changed; nothing in ``folder`` is ever touched. ``pause(seconds)`` waits and tells whether to end, as
    ``threading.Event().wait`` does; a step that is under way is finished first. ``once``: ends after two looks.
    ``options`` are those of :meth:`ContinualStore.add`. Raises :class:`~merging.errors.MergingError` for what is wrong
    with the store or the folder itself.
    """
    if not 0 < interval < inf:
        raise OptionError(f"interval = {interval}: a number of seconds above 0 is needed")
    folder, pause = Path(folder), pause or _pause
    before: dict[Path, str] = {}
    done: dict[Path, str] = {}
    looks = 0
    while not pause(0):
        now = {path: _fingerprint(path) for path in _models(folder)}
        refused = {each.source: each.fingerprint for each in store.manifest().refused}
        for path, mark in now.items():
            if pause(0):
                return
            settled = mark == before.get(path) and mark == _fingerprint(path)
            if settled and done.get(path) != mark and refused.get(_source(path)) != mark:
                event = _add(store, path, mark, pause, options)
                if event is None:
                    return
                done[path] = mark
                if tell:
                    tell(event)
        before, looks = now, looks + 1
        if once and looks > 1:
            return
        if pause(interval):
            return


def _add(store: ContinualStore, path: Path, mark: str, pause: Pause, options: dict[str, Any]) -> Event | None:
    """Add a model, or note why it is refused; None if told to stop while another process was writing."""
    try:
        step = _added(store, path, pause, options)
    except Damaged:  # what is wrong with the store itself is no fault of the model
        raise
    except (InputError, FormatError) as error:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        store.refuse(Refused(source=_source(path), fingerprint=mark, reason=printable(str(error)), time=now))
        return Event("refused", path, reason=printable(str(error)))
    except Busy:
        return None
    return Event("added", path, step.number) if step else Event("known", path)


def _added(store: ContinualStore, path: Path, pause: Pause, options: dict[str, Any]) -> StepRecord | None:
    """Add a model as soon as no other process writes; that one is not waited for when told to stop."""
    while True:
        try:
            return store.add(path, **{"wait": _SLICE, **options})
        except Busy:  # noqa: PERF203
            if pause(0):
                raise


def _source(path: Path) -> str:
    return printable(path.resolve())


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _models(folder: Path) -> list[Path]:
    """What may be a model, the oldest first; hidden names are not looked at."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        raise InputError(f"{folder}: there is no such folder to watch") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be watched: {error.strerror}") from None
    models = [path for path in found if path.suffix in _WEIGHTS or any(_weights(path))]
    return sorted(models, key=lambda path: (_newest(path), path.name))


def _weights(folder: Path) -> list[Path]:
    """Weights files directly in a folder; none of what is no folder, or has just gone."""
    try:
        return [path for path in folder.iterdir() if path.suffix in _WEIGHTS]
    except OSError:
        return []


def _files(path: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        with suppress(OSError):  # it may go at any time
            status = each.stat()
            if stat.S_ISREG(status.st_mode):
                found.append((each, status))
    return found


def _newest(path: Path) -> int:
    return max((status.st_mtime_ns for _, status in _files(path)), default=0)


def _fingerprint(path: Path) -> str:
    """Names, sizes and times of all files of a model: the same as long as nothing is written."""
    digest = hashlib.sha256()
    for file, status in _files(path):
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
