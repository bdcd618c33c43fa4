"""One place where refusals become messages and exit codes: a traceback only with --debug."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import click

from merging.errors import FormatError, InputError, MergingError, OptionError, OutputError, shorten

from .output import echo_json, echo_text

__all__ = [
    "Interruption",
    "OutputStatus",
    "Refusal",
    "UnknownCommand",
    "end_signals",
    "exit_with_message",
    "handle_errors",
]

_NO_MEMORY = re.compile("can't allocate memory|out of memory")
"""Messages of torch when memory is short, in errors of a general kind."""

_KINDS = {FormatError: "format", InputError: "input", OptionError: "option", OutputError: "output"}


class Refusal(click.ClickException):
    """An error with the kind that ``--json`` states."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class UnknownCommand(Refusal):
    """The refusal of a first word that is nearly a command."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message, "usage")


class Interruption(Refusal):
    """The end by a signal."""

    exit_code = 130

    def __init__(self, message: str) -> None:
        super().__init__(message, "interrupted")


@contextmanager
def handle_errors(debug: bool = False, status: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn refusals in a command's body, and calls that fail, into one message; clean up after a kill as after Ctrl-C.

    ``status`` returns the sentence for an interruption, in commands that may have changed something by then; commands
    with an output pass an :class:`OutputStatus`.
    """
    before = {number: signal.signal(number, _interrupt) for number in end_signals()}
    try:
        yield
    except MergingError as error:
        if debug:
            raise
        kind = next((word for cls, word in _KINDS.items() if isinstance(error, cls)), "error")
        raise Refusal(str(error), kind) from None
    except OSError as error:
        if debug or error.errno == errno.ENAMETOOLONG or _is_of_printing(error):
            raise
        where = "the disk" if error.filename is None else shorten(os.fsdecode(error.filename))
        raise Refusal(f"{where}: {error.strerror or error}", "input") from None
    except KeyboardInterrupt:
        raise Interruption(f"{status() if status else 'nothing was written'}.") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        raise Refusal("there is not enough memory: lower --threads, or set --max-memory", "memory") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class OutputStatus:
    """The sentence for an interruption, which says whether a new output is whole and in place on the disk."""

    def __init__(self, *outputs: str | Path | None) -> None:
        self._before: dict[str | Path, object] = {}
        self.publishing: str | None = None
        for output in outputs:
            if output:
                self.expect(output)

    def expect(self, output: str | Path) -> None:
        """Note the file or folder at the place of an output before it is written."""
        self._before[output] = _identity(output)

    def outputs(self) -> list[str]:
        """Return the outputs that are in place."""
        return [str(output) for output, before in self._before.items() if _identity(output) not in (None, before)]

    def __call__(self) -> str:
        said = " and ".join(f"{output} is whole and in place" for output in self.outputs()) or "nothing was written"
        if self.publishing:
            said += f", and whether it was published is not known: look at {self.publishing}"
        return said


def _identity(path: str | Path) -> object:
    """Return the identity of a file or folder, which a later one of the same name does not have."""
    from merging.object_stores.store import open_store
    from merging.object_stores.store_path import StorePath

    if isinstance(path, StorePath):
        with suppress(MergingError):  # the merge itself reports it
            store, place = open_store(str(path))
            return store.state(place)
        return None
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def end_signals() -> list[signal.Signals]:
    """Return the signals that end a command: a kill, Ctrl-C, and a closed terminal, unless nohup ignores it."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    return numbers


def _interrupt(number: int, frame: object) -> None:
    """Stop at the first signal, and ignore others while cleaning up."""
    for each in end_signals():
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def exit_with_message(as_json: bool = False) -> Iterator[None]:
    """Print the error that ends a command, and exit with its code.

    With ``as_json`` it is an object on standard output too: ``{"error": {"kind": ..., "message": ...}}``. A stream that
    takes no more (a full disk) is one message as well.
    """
    try:
        try:
            yield
        except click.Abort:
            raise Interruption("no work was under way.") from None
    except click.ClickException as error:
        code, shown = error.exit_code, error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            too_long = f"{shorten(str(error.filename))}: cannot be a path: {error.strerror}"
            code, shown = 1, Refusal(too_long, "input")
        elif not _is_of_printing(error):
            raise
        else:
            _silence_full_streams()
            code, shown = 1, Refusal(f"the output cannot be printed: {error.strerror}", "print")
    else:
        return
    try:
        echo_text(_text(shown), err=True)
        if as_json:
            echo_json({"error": {"kind": _kind(shown), "message": shown.format_message()}}, indent=None)
    except OSError:
        _silence_full_streams()
    sys.exit(code)


def _is_of_printing(error: OSError) -> bool:
    return any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _kind(error: click.ClickException) -> str:
    return error.kind if isinstance(error, Refusal) else "usage"


def _text(error: click.ClickException) -> str:
    """Return the message as people read it: later lines are indented, so that no name in it looks like a message."""
    if not isinstance(error, Refusal):
        shown = io.StringIO()
        error.show(shown)
        return shown.getvalue().rstrip("\n").replace("\n\t", "\n  ")  # click lists choices behind tabs
    message = re.sub("\n(?! )", "\n  ", error.format_message())
    return f"{'Interrupted' if isinstance(error, Interruption) else 'Error'}: {message}"


def _silence_full_streams() -> None:
    """Discard the rest of a stream that takes no more; the interpreter would fail on it at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _is_full(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_full(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return True
    return False
