"""Scores of models by a command of the user's, which prints a number for a folder."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, TypeAlias

from merging.errors import InputError, OptionError, option, shorten

__all__ = ["ScoreFunction", "make_scorer"]

ScoreFunction: TypeAlias = Callable[[Path], float]
"""Returns a number for the folder or file of a model."""

_PLACE = "{}"
"""The words of a command in which the model's path is put; without one the path is the last word."""

_KEPT = 1 << 16
"""Bytes of a command's output that are kept: its end."""

_LONGEST = 2e6
"""Seconds from which a time counts as unlimited: the system counts milliseconds in 32 bits."""


def make_scorer(score: str | ScoreFunction, timeout: float) -> ScoreFunction:
    """Return a function that scores a model by a command, or by a function of the user's.

    Args:
        score: a command, whose words are split as a shell does and run without one, or a function.
        timeout: the most seconds that the command may take for a model.

    Raises:
        OptionError: for an empty command, or a timeout that is no time.
    """
    if not timeout > 0:
        raise OptionError(f"{option('score_timeout', timeout)}: should be a number of seconds above 0")
    if callable(score):
        return lambda model: _check_number(score(model), f"score: for {model} the function returned")
    try:
        words = shlex.split(score)
    except ValueError as error:
        raise OptionError(f"{option('score', score)}: is no command: {error}") from None
    if not words:
        raise OptionError(f"{option('score', 'COMMAND')}: the command is empty")
    return lambda model: _run(words, model, timeout)


def _run(words: list[str], model: Path, timeout: float) -> float:
    """Return the number that a command prints last. Raises :class:`~merging.errors.InputError`."""
    filled = [word.replace(_PLACE, str(model)) for word in words]
    command = filled if filled != words else [*words, str(model)]
    shown = f"the scoring command `{shlex.join(command)}`"
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be run: {getattr(error, 'strerror', None) or error}") from None
    printed, complaints = _Tail(process.stdout), _Tail(process.stderr)
    try:
        process.wait(timeout if timeout < _LONGEST else None)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{shown} took more than {timeout:g} seconds and was stopped: {option('score_timeout', 'SECONDS')} allows "
            f"more"
        ) from None
    finally:
        _stop(process)
    if process.returncode:
        said = (complaints.lines() or printed.lines())[-3:]
        raise InputError(f"{shown} failed with code {process.returncode}{': ' if said else ''}{' / '.join(said)}")
    last = printed.lines()[-1:]
    return _check_number(last[0] if last else "", f"{shown} should print a number in its last line, and printed")


class _Tail(Thread):
    """The end of a command's output. The rest is read and forgotten, since a command may print without end."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        super().__init__(daemon=True)
        assert stream is not None
        self._stream, self._kept = stream, b""
        self.start()

    def run(self) -> None:
        with self._stream as stream:
            while chunk := os.read(stream.fileno(), 1 << 16):
                self._kept = (self._kept + chunk)[-_KEPT:]

    def lines(self) -> list[str]:
        """Return the last lines that are not empty, once the command has ended."""
        self.join(1)  # a process that left the command's group may hold the stream open
        lines = self._kept.decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that still runs, and the processes that it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _check_number(value: object, message: str) -> float:
    """Return a score. Raises :class:`~merging.errors.InputError`, which ends in the value, unless it is finite."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{message} {shorten(repr(value)) if value != '' else 'nothing'}")
    return number
