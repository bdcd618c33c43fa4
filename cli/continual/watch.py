"""``merge continual watch``: grow a store as models appear."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import click

from ..errors import end_signals, handle_errors
from ..options import debug_option, json_option
from ..output import echo, echo_json
from .options import StoreStatus, keep_states_option, leniency_options, resource_options, store_argument

__all__ = ["watch_command"]


@click.command(name="watch", short_help="add models as they appear in a folder or on the Hub")
@store_argument
@click.option("--from", "source", required=True, metavar="FOLDER|hub:QUERY", help="where models appear")
@click.option("--interval", type=float, default=10.0, show_default=True, help="seconds between two looks")
@click.option("--once", is_flag=True, help="add the models that are complete now, and end")
@keep_states_option
@leniency_options
@resource_options
@json_option
@debug_option
def watch_command(
    store: str, source: str, interval: float, once: bool, as_json: bool, debug: bool, **options: Any
) -> None:
    """Add every new model of a folder, or of the Hub, the oldest first, until SIGTERM or Ctrl-C.

    \b
    merge continual watch STORE --from incoming/
    merge continual watch STORE --from hub:base=ORG/NAME,limit=20 --interval 3600

    In a folder, a model is a weights file, or a folder that holds one; it is added when it has stopped growing. A query
    has base= (adapters that name it), author=, tag= or search= (a word of the name), or several of these; the latest
    models are looked at, as many as limit= says (default 100). Each is added at its commit of that moment, and a new
    revision as another model unless its weights are in. The files stay in the Hub's cache. A Hub that does not answer
    is asked again.

    A model that is refused is noted in the store with the reason, and left alone until it changes. A signal ends the
    watch. A step that is under way is finished first; a second signal gives it up, and the store is as before it. A
    download stops, and goes on from there when the watch is started again.
    """
    status = StoreStatus(store)
    with handle_errors(debug, status):
        pause = _wait_for_signals()  # before the imports, which take seconds
        from merging.continual import ContinualStore
        from merging.continual.watch import Event, watch

        def print_event(event: Event) -> None:
            if as_json:
                values = {"what": event.what, "model": str(event.source), "step": event.step, "reason": event.reason}
                echo_json(values, indent=None)
            else:
                more = f" as step {event.step}" if event.step else f": {event.reason}" if event.reason else ""
                echo(f"{event.what}: {event.source}{more}")

        opened = ContinualStore(store)
        status.before = len(opened.manifest().steps)
        watch(opened, source, interval=interval, pause=pause, on_event=print_event, once=once, **options)


def _wait_for_signals() -> Callable[[float], bool]:
    """Note the first signal only; the next interrupts. Return a function that waits, and says whether one came."""
    interrupt = signal.getsignal(signal.SIGTERM)
    signals: list[int] = []

    def finish(number: int, frame: Any) -> None:
        if signals and callable(interrupt):
            interrupt(number, frame)
        signals.append(number)

    for number in end_signals():
        signal.signal(number, finish)

    def pause(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not signals and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        return bool(signals)

    return pause
