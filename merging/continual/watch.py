"""Watching a folder, or the Hub, for models that appear, and adding each to a store when it is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from merging.continual.folder import Busy
from merging.continual.incoming import Arrival, Ended, Pause, attended, incoming
from merging.continual.manifest import Refused
from merging.continual.soundness import Damaged
from merging.errors import FormatError, InputError, OptionError, escape_unprintable
from merging.hub.client import Unreachable

if TYPE_CHECKING:
    from merging.continual.store import ContinualStore

__all__ = ["Event", "watch"]

T = TypeVar("T")

_SLICE = 0.2
"""Seconds that another writer is waited for at a time."""

_FETCHING = ("again", "allow_different_bases", "on_mismatch")
"""The options of adding that decide what is fetched."""


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a model: it was added, was known already, or was refused, and why; or the Hub does not answer.

    ``source`` is the path, or the name on the Hub with the commit; the query itself if that has no answer.
    """

    what: Literal["added", "known", "refused", "unreachable"]
    source: Path | str
    step: int | None = None
    reason: str = ""


def watch(
    store: ContinualStore,
    source: str | Path,
    *,
    interval: float = 10.0,
    pause: Pause | None = None,
    tell: Callable[[Event], None] | None = None,
    once: bool = False,
    **options: Any,
) -> None:
    """Add every model that is new in a folder or on the Hub, the oldest first; look again every ``interval`` seconds.

    In a folder a model is a weights file, or a folder that holds one, directly in it. It is complete when nothing in it
    has changed since the look before; nothing in the folder is ever touched. ``hub:base=ORG/NAME,limit=N`` and its like
    (:class:`~merging.hub.query.Query`) are what the Hub finds, each as the commit that it is at that look: a new
    revision is a new model, unless its weights are those of one that is in. One that is refused is noted in the
    manifest with the reason, and tried again only when it has changed. A Hub that does not answer is told of once, and
    asked again at the next look.

    ``pause(seconds)`` waits and tells whether to end, as ``threading.Event().wait`` does; a step that is under way is
    finished first, a download is broken off, and gone on with another time. ``once``: ends when all that is there now
    was tried. ``options`` are those of :meth:`ContinualStore.add`. Raises :class:`~merging.errors.MergingError` for
    what is wrong with the store, the folder or the query, and with ``once`` if the Hub does not answer.
    """
    if not 0 < interval < inf:
        raise OptionError(f"interval = {interval}: a number of seconds above 0 is needed")
    pause = pause or _pause
    watching = _Watch(store, source, pause, tell or (lambda event: None), options)
    with suppress(Ended):
        while not pause(0):
            missed = watching.look()
            if once and watching.looks == watching.incoming.looks:
                if missed:
                    raise missed
                return
            if pause(interval):
                return


class _Watch:
    """What is known from one look to the next."""

    def __init__(
        self,
        store: ContinualStore,
        source: str | Path,
        pause: Pause,
        tell: Callable[[Event], None],
        options: Mapping[str, Any],
    ) -> None:
        self.store, self.source, self.pause, self.tell, self.options = store, source, pause, tell, options
        self.incoming = incoming(source)
        self.looks = 0
        self._done: dict[str, str] = {}
        self._lost: set[Path | str] = set()

    def look(self) -> Unreachable | None:
        """Add what is new and complete; what the Hub did not give, if anything, is left for the next look."""
        manifest = self.store.manifest()
        refused = {each.source: each.fingerprint for each in manifest.refused}
        missed: list[Unreachable] = []
        self.looks += 1
        try:
            in_a_row = 0
            for arrival in self.incoming.arrivals(manifest, self.pause):
                if self.pause(0):
                    raise Ended("between two models")
                if arrival.mark in (self._done.get(arrival.source), refused.get(arrival.source)):
                    continue
                try:
                    self._take(arrival)
                    in_a_row = 0
                except Unreachable as error:
                    missed.append(self._missed(arrival.model, error))
                    in_a_row += 1
                    if in_a_row > 1:  # it is the Hub, and no single model
                        break
            self._lost.discard(self.source)
        except Unreachable as error:
            missed.append(self._missed(self.source, error))
        return missed[-1] if missed else None

    def _missed(self, source: Path | str, error: Unreachable) -> Unreachable:
        """Tell that the Hub does not answer, unless that was told of the same before."""
        if source not in self._lost:
            self.tell(Event("unreachable", source, reason=escape_unprintable(str(error))))
        self._lost.add(source)
        return error

    def _take(self, arrival: Arrival) -> None:
        """Add a model, or note why it is refused."""
        try:
            if arrival.remote:
                options = {name: self.options[name] for name in _FETCHING if name in self.options}
                attended(lambda told: self.store.fetch(arrival.model, progress=told, **options), self.pause)
            step = self._when_free(lambda wait: self.store.add(arrival.model, **{"wait": wait, **self.options}))
            event = Event("added", arrival.model, step.number) if step else Event("known", arrival.model)
        except (Damaged, Unreachable):  # what is wrong with the store itself, or the Hub, is no fault of the model
            raise
        except (InputError, FormatError) as error:
            reason, now = escape_unprintable(str(error)), datetime.now(timezone.utc).isoformat(timespec="seconds")
            note = Refused(source=arrival.source, fingerprint=arrival.mark, reason=reason, time=now)
            self._when_free(lambda wait: self.store.refuse(note, wait=wait))
            event = Event("refused", arrival.model, reason=reason)
        self._done[arrival.source] = arrival.mark
        self._lost.discard(arrival.model)
        self.tell(event)

    def _when_free(self, act: Callable[[float], T]) -> T:
        """Do what needs the store as soon as no other process writes; that one is not waited for when told to end."""
        while True:
            try:
                return act(_SLICE)
            except Busy:  # noqa: PERF203
                if self.pause(0):
                    raise Ended("while another process was writing") from None


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False
