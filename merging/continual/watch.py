"""Watch a folder, or the Hub, for new models, and add each to a store when it is complete."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from merging.continual.folder import Busy
from merging.continual.inbox import Arrival, Pause, WatchEnded, open_inbox, run_interruptibly
from merging.continual.integrity import Damaged
from merging.continual.manifest import RefusedModel
from merging.display.tables import Displayed
from merging.errors import FormatError, InputError, OptionError, escape_unprintable
from merging.hub.client import Unreachable
from merging.version import former_parameters

if TYPE_CHECKING:
    from merging.continual.store import ContinualStore

__all__ = ["Event", "watch"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SLICE = 0.2
"""Seconds of each wait for another writer."""

_FETCHING = ("again", "allow_different_bases", "on_mismatch")
"""The options of ``add`` that decide whether a model is fetched."""


@dataclass(frozen=True, slots=True, repr=False)
class Event(Displayed):
    """An event of a watch: a model was added, was known already, or was refused; or the Hub did not answer.

    Attributes:
        what: the outcome.
        source: the path, or the name on the Hub with the commit; the query if the Hub did not answer it.
        step: the number of the step of a model that was added.
        reason: why a model was refused, or the Hub did not answer.
    """

    what: Literal["added", "known", "refused", "unreachable"]
    source: Path | str
    step: int | None = None
    reason: str = ""


@former_parameters({"tell": "on_event"})
def watch(
    store: ContinualStore,
    source: str | Path,
    *,
    interval: float = 10.0,
    pause: Pause | None = None,
    on_event: Callable[[Event], None] | None = None,
    once: bool = False,
    **options: Any,
) -> None:
    """Add every new model in a folder or on the Hub, the oldest first.

    In a folder, a model is a weights file, or a folder with a weights file, directly in it. It is complete when nothing
    in it has changed since the look before. Nothing in the folder is ever changed. On the Hub, a model is a result of
    the query, at its present commit. A new revision is a new model, unless it has the weights of an earlier model. A
    model that is refused is noted in the manifest with the reason, and tried again only when it has changed.

    Args:
        store: the store.
        source: a folder, or a query of the Hub as ``"hub:base=ORG/NAME,limit=N"``
            (:class:`~merging.hub.query.Query`).
        interval: the seconds between two looks.
        pause: waits a number of seconds and returns whether to end, as ``threading.Event().wait`` does. A step that is
            under way is finished first; a download is broken off, and continued another time.
        on_event: called with each event. That the Hub does not answer is reported once.
        once: end when all models that are there now were tried.
        options: options of :meth:`ContinualStore.add`.

    Raises:
        MergingError: the store, the folder or the query is wrong; or, with ``once``, the Hub does not answer.
    """
    if not 0 < interval < inf:
        raise OptionError(f"interval = {interval}: a number of seconds above 0 is needed")
    pause = pause or _pause
    watching = _Watch(store, source, pause, on_event, options)
    with suppress(WatchEnded):
        while not pause(0):
            missed = watching.look()
            if once and watching.looks == watching.inbox.looks:
                if missed:
                    raise missed
                return
            if pause(interval):
                return


class _Watch:
    """The state of a watch from one look to the next."""

    def __init__(
        self,
        store: ContinualStore,
        source: str | Path,
        pause: Pause,
        on_event: Callable[[Event], None] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.store = store
        self.source = source
        self.pause = pause
        self._on_event = on_event
        self.options = options
        self.inbox = open_inbox(source)
        self.looks = 0
        self._done: dict[str, str] = {}
        self._lost: set[Path | str] = set()

    def look(self) -> Unreachable | None:
        """Add all new models that are complete; return the last error of a Hub that did not answer."""
        manifest = self.store.manifest()
        refused = {each.source: each.fingerprint for each in manifest.refused}
        missed: list[Unreachable] = []
        self.looks += 1
        try:
            in_a_row = 0
            for arrival in self.inbox.arrivals(manifest, self.pause):
                if self.pause(0):
                    raise WatchEnded("between two models")
                if arrival.mark in (self._done.get(arrival.source), refused.get(arrival.source)):
                    continue
                try:
                    self._take(arrival)
                    in_a_row = 0
                except Unreachable as error:
                    missed.append(self._report_unreachable(arrival.model, error))
                    in_a_row += 1
                    if in_a_row > 1:  # it is the Hub, and no single model
                        break
            self._lost.discard(self.source)
        except Unreachable as error:
            missed.append(self._report_unreachable(self.source, error))
        return missed[-1] if missed else None

    def _report(self, event: Event) -> None:
        _log.info("%s: %r", self.store.path, event)
        if self._on_event:
            self._on_event(event)

    def _report_unreachable(self, source: Path | str, error: Unreachable) -> Unreachable:
        """Report that the Hub does not answer, unless that was reported of the same source before."""
        if source not in self._lost:
            self._report(Event("unreachable", source, reason=escape_unprintable(str(error))))
        self._lost.add(source)
        return error

    def _take(self, arrival: Arrival) -> None:
        """Add a model, or note the reason for refusing it."""
        try:
            if arrival.remote:
                options = {name: self.options[name] for name in _FETCHING if name in self.options}
                run_interruptibly(
                    lambda progress: self.store.fetch(arrival.model, progress=progress, **options), self.pause
                )
            step = self._when_free(lambda wait: self.store.add(arrival.model, **{"wait": wait, **self.options}))
            event = Event("added", arrival.model, step.number) if step else Event("known", arrival.model)
        except (Damaged, Unreachable):  # the store or the Hub is at fault, not the model
            raise
        except (InputError, FormatError) as error:
            reason, now = escape_unprintable(str(error)), datetime.now(timezone.utc).isoformat(timespec="seconds")
            note = RefusedModel(source=arrival.source, fingerprint=arrival.mark, reason=reason, time=now)
            self._when_free(lambda wait: self.store.refuse(note, wait=wait))
            event = Event("refused", arrival.model, reason=reason)
        self._done[arrival.source] = arrival.mark
        self._lost.discard(arrival.model)
        self._report(event)

    def _when_free(self, act: Callable[[float], T]) -> T:
        """Return ``act(seconds)`` as soon as no other process writes; stop waiting when asked to end."""
        while True:
            try:
                return act(_SLICE)
            except Busy:  # noqa: PERF203
                if self.pause(0):
                    raise WatchEnded("while another process was writing") from None


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False
