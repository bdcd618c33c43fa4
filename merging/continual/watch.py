"""Watching a folder for models that appear, and adding each to a store when it is complete."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from merging.continual.manifest import Refused
from merging.continual.store import ContinualStore
from merging.errors import InputError, MergingError, OutputError

__all__ = ["Event", "watch"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


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
    stop: threading.Event | None = None,
    tell: Callable[[Event], None] | None = None,
    once: bool = False,
    **options: object,
) -> None:
    """Add every model of a folder that is new, the oldest first, and look again every ``interval`` seconds.

    A model is a weights file, or a folder that holds one, directly in ``folder``. It is complete when nothing in it has
    changed since the look before. One that is refused is noted in the manifest with the reason, and tried again only
    when it has changed; nothing in ``folder`` is ever touched. Ends when ``stop`` is set, at the latest after the step
    that is under way; ``once``: after two looks. ``options`` are those of :meth:`ContinualStore.add`. Raises
    :class:`~merging.errors.MergingError` for what is wrong with the store or the folder itself.
    """
    folder, stop = Path(folder), stop or threading.Event()
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder to watch")
    before: dict[Path, str] = {}
    done: dict[Path, str] = {}
    looks = 0
    while not stop.is_set():
        now = {path: _fingerprint(path) for path in _models(folder)}
        refused = {each.source: each.fingerprint for each in store.manifest().refused}
        for path, mark in now.items():
            if stop.is_set():
                return
            settled = mark == before.get(path) and mark == _fingerprint(path)
            if settled and done.get(path) != mark and refused.get(str(path.resolve())) != mark:
                event = _add(store, path, mark, options)
                done[path] = mark
                if tell:
                    tell(event)
        before, looks = now, looks + 1
        if once and looks > 1:
            return
        stop.wait(interval)


def _add(store: ContinualStore, path: Path, mark: str, options: dict[str, object]) -> Event:
    try:
        step = store.add(path, **options)  # type: ignore[arg-type]
    except OutputError:
        raise  # the store cannot be written to: no fault of the model
    except MergingError as error:
        store.refuse(
            Refused(
                source=str(path.resolve()),
                fingerprint=mark,
                reason=str(error),
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
        )
        return Event("refused", path, reason=str(error))
    return Event("added", path, step.number) if step else Event("known", path)


def _models(folder: Path) -> list[Path]:
    """What may be a model, the oldest first; hidden names are not looked at."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    models = [path for path in found if path.suffix in _WEIGHTS or (path.is_dir() and any(_weights(path)))]
    return sorted(models, key=lambda path: (_newest(path), path.name))


def _weights(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix in _WEIGHTS)


def _files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


def _newest(path: Path) -> int:
    return max((file.stat().st_mtime_ns for file in _files(path) if file.exists()), default=0)


def _fingerprint(path: Path) -> str:
    """Names, sizes and times of all files of a model: the same as long as nothing is written."""
    digest = hashlib.sha256()
    for file in _files(path):
        try:
            status = file.stat()
        except OSError:
            continue
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
