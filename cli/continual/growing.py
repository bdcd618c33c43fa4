"""The commands that make a store, and have it grow."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import end_signals, reported
from ..merging import written_method
from ..output import echo, echo_json, echo_notices, progress_bar
from .options import Standing, as_json_option, debug_option, lenient, store_argument, wait_option, working
from .telling import told

__all__ = ["add_command", "init_command", "watch_command"]


class InitCommand(click.Command):
    """A command whose options include those of the method that its own arguments choose."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.own = list(self.params)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the method's options in before the rest is read."""

        from ..fields import chain_options

        with reported():
            self.params = [*self.own, *chain_options(written_method(args) or "opcm")]
        return super().parse_args(ctx, args)


@click.command(name="init", cls=InitCommand)
@store_argument
@click.option("--base", required=True, help="the model that all others were trained from")
@click.option("-m", "--method", default="opcm", show_default=True, help="how it grows; its options join these")
@click.option("--max-rank", type=int, help="most rank of what is held as factors  [default: as long as it is worth it]")
@as_json_option
@debug_option
def init_command(
    store: str, base: str, method: str, max_rank: int | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Make an empty store.

    Methods: opcm, task_arithmetic, linear (a running mean), magmax, ties, and lines around a sum or mean. The base is a
    folder, a file, or a name on the Hub. With ties, the density is of the tensors that each model changes: of adapters
    with other targets than each other's it is not that of the union, which a store cannot know.
    """
    with reported(debug, Standing(store)):
        from merging.continual import ContinualStore

        parameters = {name.replace("__", "."): value for name, value in options.items() if value is not None}
        with progress_bar(None) as report:
            made = ContinualStore.create(
                store, base=base, method=method, max_rank=max_rank, progress=report, **parameters
            )
        chain = made.method.chain
    if as_json:
        echo_json({"store": store, "method": chain, "base": base}, indent=None)
    else:
        echo(f"{store}: grows by {chain}")


@click.command(name="add")
@store_argument
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--again", is_flag=True, help="add a model even if one of the same content is there")
@lenient
@wait_option
@working
@click.option("--progress/--quiet", default=None, help="progress bar on stderr  [default: on a terminal]")
@as_json_option
@debug_option
def add_command(
    store: str, models: tuple[str, ...], progress: bool | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Add models in the order in which they are given; each is one step, whole or not at all.

    Where one is refused those before it are in, and those behind it are not tried.
    """
    standing = Standing(store)
    with reported(debug, standing):
        from merging.continual import ContinualStore

        opened = ContinualStore(store)
        standing.before = len(opened.manifest().steps)
        for count, model in enumerate(models):
            with _placed(count, len(models)), progress_bar(progress) as report:
                step = opened.add(model, progress=report, **options)
            echo_notices(step.notices if step else ())
            if as_json:
                echo_json({"model": model, "step": step.model_dump() if step else None}, indent=None)
            elif step:
                echo(f"step {step.number}: {model}: {told(step)}")
            else:
                echo(f"{model}: a model of the same content was added before: nothing to do (--again adds it)")


@contextmanager
def _placed(before: int, count: int) -> Iterator[None]:
    """Errors say how many of several models are in."""
    from merging.continual import Unconfirmed
    from merging.errors import MergingError

    try:
        yield
    except MergingError as error:
        done = before + isinstance(error, Unconfirmed)
        if count > 1:
            raise type(error)(
                f"{error} (of the {count} models {done} are in, {count - before - 1} were not tried)"
            ) from None
        raise


@click.command(name="watch")
@store_argument
@click.option("--from", "source", required=True, metavar="FOLDER|hub:QUERY", help="where models appear")
@click.option("--interval", type=float, default=10.0, show_default=True, help="seconds between two looks")
@click.option("--once", is_flag=True, help="add what is complete now, and end")
@lenient
@working
@as_json_option
@debug_option
def watch_command(
    store: str, source: str, interval: float, once: bool, as_json: bool, debug: bool, **options: Any
) -> None:
    """Add every new model of a folder, or of the Hub, the oldest first, until SIGTERM or Ctrl-C.

    \b
    merge continual watch STORE --from incoming/
    merge continual watch STORE --from hub:base=ORG/NAME,limit=20 --interval 3600

    In a folder, a model is a weights file, or a folder that holds one; it is added when it has stopped growing. A query
    is of base= (adapters that name it), author=, tag= and search= (a word of the name), as wanted; its limit= latest
    models are looked at (default 100). Each is added as the commit that it is then, a new revision as another model
    unless its weights are in. The files stay in the Hub's cache. A Hub that does not answer is asked again.

    What is refused is noted in the store with the reason and left alone until it changes. A signal ends the watch; a
    step that is under way is finished first, or with a second signal given up (the store is then as before it); a
    download is broken off, and goes on where it stopped when the watch is started again.
    """
    standing = Standing(store)
    with reported(debug, standing):
        pause = _until_signalled()  # before the imports, which take seconds
        from merging.continual import ContinualStore
        from merging.continual.watch import Event, watch

        def tell(event: Event) -> None:
            if as_json:
                told = {"what": event.what, "model": str(event.source), "step": event.step, "reason": event.reason}
                echo_json(told, indent=None)
            else:
                more = f" as step {event.step}" if event.step else f": {event.reason}" if event.reason else ""
                echo(f"{event.what}: {event.source}{more}")

        opened = ContinualStore(store)
        standing.before = len(opened.manifest().steps)
        watch(opened, source, interval=interval, pause=pause, tell=tell, once=once, **options)


def _until_signalled() -> Callable[[float], bool]:
    """Have the first signal noted only; a function that waits, and tells whether there was one. The next interrupts."""
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
