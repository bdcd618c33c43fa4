"""``merge completion``: the script that has a shell complete commands, methods, options and files."""

from __future__ import annotations

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

from .output import echo_text

__all__ = ["completion_command"]


@add_completion_class
class BashCompletion(BashComplete):
    """Completion in bash, which makes three words of ``--method=ties``."""

    def source(self) -> str:
        """Return the script, without asking for the version of the bash on this machine."""
        return ShellComplete.source(self)

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the whole words and the word to complete, without the signs between options and values."""
        words, incomplete = super().get_completion_args()
        return [word for word in words if word != "="], incomplete


class WholeWordCompletion(ShellComplete):
    """Completion in a shell for which ``--method=ti`` is one word, so that its completions begin with the option."""

    option = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the whole words and the word to complete, of ``--method=ti`` the option and the value."""
        words, incomplete = super().get_completion_args()
        name, equals, value = incomplete.partition("=")
        if not equals or not name.startswith("--"):
            return words, incomplete
        self.option = name + equals
        return [*words, name], value

    def format_completion(self, item: CompletionItem) -> str:
        """Return a completion as the shell's script reads it."""
        if item.type == "plain":
            item.value = self.option + item.value
        return super().format_completion(item)


@add_completion_class
class ZshCompletion(WholeWordCompletion, ZshComplete):
    """Completion in zsh."""


@add_completion_class
class FishCompletion(WholeWordCompletion, FishComplete):
    """Completion in fish."""


@click.command(name="completion", short_help="print the script that completes words in a shell")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script by which a SHELL completes commands, methods, chains, options, files and models.

    \b
    echo 'eval "$(merge completion bash)"' >> ~/.bashrc
    echo 'eval "$(merge completion zsh)"' >> ~/.zshrc
    merge completion fish > ~/.config/fish/completions/merge.fish

    It is in effect in shells that start afterwards. Bash has to be 4.4 or later.
    """
    completion = get_completion_class(shell)
    assert completion is not None
    root = context.find_root()
    echo_text(completion(root.command, {}, "merge", "_MERGE_COMPLETE").source().strip("\n"))
