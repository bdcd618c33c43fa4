"""``merge continual add``: grow a store by models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import handle_errors
from ..options import debug_option, json_option, progress_option
from ..output import echo, echo_json, echo_notices, show_progress
from ..types import MODEL
from .options import StoreStatus, keep_states_option, leniency_options, resource_options, store_argument, wait_option
from .steps import describe_step

__all__ = ["add_command"]


@click.command(name="add", short_help="add models, one step each")
@store_argument
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="MODEL...")
@click.option("--again", is_flag=True, help="add a model even if one of the same content is there")
@keep_states_option
@leniency_options
@wait_option
@resource_options
@progress_option
@json_option
@debug_option
def add_command(
    store: str, models: tuple[str, ...], progress: str | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Add models in the order in which they are given; each is one step, whole or not at all.

    If a model is refused, the models before it stay in the store, and the models after it are not tried.
    """
    status = StoreStatus(store)
    with handle_errors(debug, status):
        from merging.continual import ContinualStore

        opened = ContinualStore(store)
        status.before = len(opened.manifest().steps)
        for count, model in enumerate(models):
            with _count_added(count, len(models)), show_progress(progress) as report:
                step = opened.add(model, progress=report, **options)
            echo_notices(step.notices if step else ())
            if as_json:
                echo_json({"model": model, "step": step.model_dump() if step else None}, indent=None)
            elif step:
                echo(f"step {step.number}: {model}: {describe_step(step)}")
            else:
                echo(f"{model}: a model of the same content was added before: nothing to do (--again adds it)")


@contextmanager
def _count_added(before: int, count: int) -> Iterator[None]:
    """Say in errors how many of several models are in."""
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
