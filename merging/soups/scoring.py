"""Scores of models by a command of the user's, which prints a number for a folder."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from merging.errors import InputError, OptionError, option, shorten

__all__ = ["ScoreFunction", "make_scorer"]

ScoreFunction: TypeAlias = Callable[[Path], float]
"""Returns a number for the folder or file of a model."""

_PLACE = "{}"
"""The words of a command in which the model's path is put; without one the path is the last word."""

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
        return lambda model: _check_number(score(model), f"score: the function returned {{}} for {model}")
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
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be run: {getattr(error, 'strerror', None) or error}") from None
    try:
        printed, complaints = process.communicate(timeout=timeout if timeout < _LONGEST else None)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{shown} took more than {timeout:g} seconds and was stopped: {option('score_timeout', 'SECONDS')} allows "
            f"more"
        ) from None
    finally:
        _stop(process)
    if process.returncode:
        said = (complaints.strip() or printed.strip()).splitlines()[-3:]
        raise InputError(f"{shown} failed with code {process.returncode}{': ' if said else ''}{' / '.join(said)}")
    last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
    return _check_number(last, f"{shown} should print a number in its last line, and printed {{}}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Kill a command that still runs, with the processes that it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()


def _check_number(value: object, message: str) -> float:
    """Return a score. Raises :class:`~merging.errors.InputError` for anything but a finite number."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(message.format(shorten(repr(value)) if value != "" else "nothing"))
    return number
