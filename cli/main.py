"""The command ``merge``: models without a sub-command are merged, a first word that is a sub-command is that."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from merging.errors import nearest

from .comparing import compare_command
from .compressing import compress_command, decompress_command
from .continual import continual_command
from .errors import Refusal, answered
from .formats import formats_command
from .inspecting import inspect_command
from .listing import methods_command
from .merging import merge_command
from .pool import pool_command
from .pushing import push_command
from .recipes import run_command
from .recycling import recycle_command
from .routing import route_command
from .verifying import verify_command

__all__ = ["main"]

EPILOG = """\b
Sub-commands, as the first word:
  merge run RECIPE       carry out a recipe (YAML)
  merge methods [NAME]   the methods, or one method in full
  merge formats          what is read, and what is refused
  merge inspect PATH     what a model or adapter file holds
  merge compare MODEL... how models agree in what they change
  merge compress MODEL   a pack of it, many times smaller
  merge decompress PACK  what it was made of
  merge verify PATH      what a program would refuse or ignore in it
  merge push FOLDER ...  publish a folder on the Hub
  merge pool ...         adapters that others left, audited
  merge route MODEL...   prototypes to choose among adapters by
  merge recycle POOL ... mix adapters of other tasks for a new one, and hold that against what needs none
  merge continual ...    a store that grows as models arrive
A file of such a name is reached as ./inspect.
"""


class Merge(click.Group):
    """A group whose default command merges: ``merge a.safetensors b.safetensors --method linear`` works as written."""

    def main(self, args: list[str] | None = None, **extra: object) -> object:
        """Hand all arguments to the default command, unless the first word names a sub-command."""
        words = list(sys.argv[1:] if args is None else args)
        extra = {"prog_name": "merge", **extra}
        if extra.pop("standalone_mode", True):
            with answered("--json" in words):
                code = self._run(words, extra)
            sys.exit(code if isinstance(code, int) else 0)
        return self._run(words, extra)

    def _run(self, words: list[str], extra: dict[str, object]) -> object:
        if not words or words[0] not in self.commands:
            self._check_spelling(words)
            return merge_command.main(words, standalone_mode=False, **extra)
        return super().main(words, standalone_mode=False, **extra)

    def _check_spelling(self, words: list[str]) -> None:
        """Refuse a first word that is no file but nearly a sub-command, with no method to merge it by."""
        if not words or {"-m", "--method"} & set(words) or words[0].startswith("-") or Path(words[0]).exists():
            return
        if near := nearest(words[0], self.commands):
            raise Refusal(f"{words[0]}: there is no such sub-command, file or folder{near}", "usage", 2)


merge_command.epilog = EPILOG
_COMMANDS = [
    run_command,
    methods_command,
    formats_command,
    inspect_command,
    compare_command,
    compress_command,
    decompress_command,
    verify_command,
    push_command,
    pool_command,
    route_command,
    recycle_command,
    continual_command,
]
cli = Merge(
    name="merge",
    commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> None:
    """Run the command line."""
    cli.main()


if __name__ == "__main__":
    main()
