"""The command ``merge``, run in this process."""

from __future__ import annotations

from typing import Any

import click
from click.testing import CliRunner, Result

from merging.cli.main import cli

__all__ = ["merge", "ok", "refused"]


def merge(*words: object) -> Result:
    """Run ``merge`` with these words."""

    class Runnable(click.Command):
        def main(self, args: Any = None, **extra: Any) -> Any:
            return cli.main(list(args), **{**extra, "prog_name": "merge"})

    return CliRunner().invoke(Runnable("merge"), [str(word) for word in words])


def ok(*words: object) -> Result:
    done = merge(*words)
    assert done.exit_code == 0, done.output
    return done


def refused(*words: object, code: int = 1) -> str:
    """What is printed on stderr by words that are refused, as one message."""
    done = merge(*words)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert isinstance(done.exception, SystemExit)
    return done.stderr
