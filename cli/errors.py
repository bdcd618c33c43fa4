"""One place where refusals become messages: exit code 1, and a traceback only with --debug."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from merging.errors import MergingError

__all__ = ["reported"]

_NO_MEMORY = re.compile("can't allocate memory|out of memory")
"""What torch says, in errors of no kind of their own."""


@contextmanager
def reported(debug: bool = False, standing: Callable[[], str] | None = None) -> Iterator[None]:
    """Run a command's body: refusals are printed as one message, and a kill cleans up as Ctrl-C does.

    ``standing`` says what is true after an interruption, of commands of which something may be done by then.
    """
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except MergingError as error:
        if debug:
            raise
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {standing() if standing else 'nothing was written'}.", err=True)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        raise click.ClickException("there is not enough memory: lower --threads, or set --max-memory") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    """Stop at the first signal, and let no further one stop the cleaning up."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
