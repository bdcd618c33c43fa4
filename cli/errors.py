"""One place where refusals become messages: exit code 1, and a traceback only with --debug."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from merging.errors import MergingError

__all__ = ["reported"]


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Run a command's body: refusals are printed as one message, and a kill cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except MergingError as error:
        if debug:
            raise
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("Interrupted: nothing was written.", err=True)
        sys.exit(130)
    except MemoryError:
        raise click.ClickException("there is not enough memory: lower --threads, or set --max-memory") from None


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt
