"""The command ``merge``: its sub-commands, with merging as the default."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from merging.errors import ResultWarning, command_line_words, nearest
from merging.version import __version__

from .bake import bake_command
from .clean import clean_command
from .compare import compare_command
from .completion import completion_command
from .compress import compress_command
from .continual import continual_command
from .convert import convert_command
from .decompress import decompress_command
from .errors import UnknownCommand, exit_with_message
from .extract import extract_command
from .formats import formats_command
from .help import CONTEXT, SectionedGroup
from .inspect import inspect_command
from .merge import is_method, merge_command
from .methods import methods_command
from .moe import moe_command
from .options import PROGRESS_FORMS
from .output import echo_text
from .plan import plan_command
from .pool import pool_command
from .push import push_command
from .recycle import recycle_command
from .rerun import rerun_command
from .resize import resize_command
from .route import route_command
from .run import run_command
from .search import search_command
from .soup import soup_command
from .stack import stack_command
from .stats import stats_command
from .suggest import suggest_command
from .tokens import tokens_command
from .types import MODEL, paths_that_begin
from .verify import verify_command

__all__ = ["main"]


class DefaultGroup(SectionedGroup):
    """A group with a default command: ``merge a.safetensors b.safetensors --method linear`` works as written."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "merge",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command of these arguments; as a program, print its errors and exit with its code."""
        words = join_progress(list(sys.argv[1:] if args is None else args))
        if not standalone_mode:
            return super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        flags = {str(param.name) for param in run_command.params} if words[:1] == ["run"] else None
        with command_line_words(flags), exit_with_message("--json" in words), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResultWarning)  # the commands print all notices
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        sys.exit(code if isinstance(code, int) else 0)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command first, unless a command or an option of the group is there."""
        if not args and not ctx.resilient_parsing:
            echo_text(ctx.get_help())
            ctx.exit(1)
        if args[:1] == ["help"] and not Path("help").exists():
            words = [word for word in args[1:] if word != "help"]
            args = ["methods", *words] if words and is_method(words[0]) else [*words, "--help"]
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            if not ctx.resilient_parsing:
                self._check_first_word(args)
            args = ["merge", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command, and what the default command takes: an option, or a model."""
        items = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            with merge_command.make_context("merge", [], parent=ctx, resilient_parsing=True) as merging:
                return items + merge_command.shell_complete(merging, incomplete)
        if not items:
            return MODEL.shell_complete(ctx, merge_command.params[0], incomplete)
        return items + [CompletionItem(path) for path in paths_that_begin(incomplete) if incomplete]

    def _check_first_word(self, args: list[str]) -> None:
        """Refuse a first word that can be no model, with no method to merge it by."""
        word = args[0]
        if word.startswith("-") or set("/.") & set(word) or any(each.startswith(("-m", "--method")) for each in args):
            return
        if not Path(word).exists() and not is_method(word):
            near = nearest(word, [*self.commands, "help", "--version"]) or ": see merge --help"
            raise UnknownCommand(f"{word}: there is no such sub-command, file or folder{near}")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands; the text names the options."""
        self.format_commands(ctx, formatter)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the ways to call it."""
        formatter.write_usage(ctx.command_path, "--method METHOD [OPTIONS] MODEL...")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGUMENTS] | --version", prefix="       ")


def join_progress(words: list[str]) -> list[str]:
    """Return the words with the form of ``--progress`` joined to it: any other word after it is a model."""
    if words[:1] in (["recycle"], ["search"]):
        return words
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["--progress"]:
            joined[-1] = f"--progress={word if word in PROGRESS_FORMS else 'bar'}"
            if word in PROGRESS_FORMS:
                continue
        joined.append(word)
    return [*joined[:-1], "--progress=bar"] if joined[-1:] == ["--progress"] else joined


_NEW_OBJECTS = 50_000
"""The new objects after which the garbage collector looks for cycles among them."""

SECTIONS = {
    "Merge": [
        merge_command,
        bake_command,
        run_command,
        stack_command,
        soup_command,
        search_command,
        rerun_command,
        convert_command,
        extract_command,
        resize_command,
        moe_command,
        tokens_command,
        continual_command,
        recycle_command,
    ],
    "Choose": [
        methods_command,
        formats_command,
        inspect_command,
        plan_command,
        compare_command,
        suggest_command,
        verify_command,
        stats_command,
        route_command,
    ],
    "Keep, share and set up": [
        pool_command,
        compress_command,
        decompress_command,
        push_command,
        clean_command,
        completion_command,
    ],
}


@click.command(cls=DefaultGroup, sections=SECTIONS, name="merge", context_settings=CONTEXT)
@click.version_option(__version__, prog_name="merge")
def cli() -> None:
    """Merge fine-tuned models or LoRA adapters into one.

    \b
    merge --method linear a.safetensors b.safetensors
    merge --method ties --base BASE one/ two/ -o merged/
    merge --method lines+tsv --base ORG/BASE ORG/ONE ORG/TWO -o merged/
    Options of merging: merge merge -h, and of a method: merge -m METHOD -h.
    """


def main() -> None:
    """Run the command line."""
    # Imports make objects that all stay. Looking for garbage among them takes a third of the time of small commands.
    gc.set_threshold(_NEW_OBJECTS)
    try:
        cli.main()
    finally:
        gc.freeze()  # so that the interpreter, when it ends, does not look through them again


if __name__ == "__main__":
    main()
