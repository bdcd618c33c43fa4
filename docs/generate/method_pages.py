"""A page for each method: its docstring, its paper, its parameters."""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from typing import Any

from click.testing import CliRunner
from marks import cell, escape

from merging.cli.main import cli
from merging.methods import ALIASES, MERGEKIT, METHODS, method_class

MERGES = {
    "weights": "The weights themselves. Adapters whose merge is not linear need their `--base`.",
    "changes": "Changes from a base. Full checkpoints need `--base`; adapters are changes already.",
    "any": "It goes around another method: `{name}+ties`, or `{name}` alone, which is `{name}+task_arithmetic`.",
}
ON_ADAPTERS = {
    "exact": "Exact: low-rank in, low-rank out.",
    "cut": "The merge has full rank. It is cut to `--rank`, or exact with `--as model`.",
    "base": "Weights are merged, so that adapters need `--base`.",
    "inner": "As the method inside.",
}


@cache
def method_pages() -> dict[str, str]:
    """Return the text of each page by its path under docs/."""
    facts = answer("methods")
    return {f"methods/{name}.md": _page(name, facts[name]) for name in METHODS}


def answer(*words: str) -> Any:
    """Return the answer of ``merge`` to these words with ``--json``."""
    done = CliRunner().invoke(cli, [*words, "--json"], standalone_mode=False)
    if done.exception:
        raise done.exception
    return json.loads(done.stdout)


def markdown_of(docstring: str) -> str:
    """Return a docstring as Markdown, with references to other names as code."""
    text = re.sub(r":\w+:`~?([^`]*)`", lambda role: f"`{role[1].rpartition('.')[2]}`", inspect.cleandoc(docstring))
    paragraphs = text.split("\n\n")  # an indented one is shown as it is, as code
    return "\n\n".join(each if each.startswith("    ") else escape(each) for each in paragraphs)


def _page(name: str, facts: dict[str, str]) -> str:
    """Return the page of one method."""
    parts = [f"---\ntitle: {name}\n---\n\n# `{name}`", f"{facts['summary'][0].upper()}{facts['summary'][1:]}."]
    paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", facts["paper"])
    rows = {
        "Paper": paper,
        "Merges": MERGES[facts["merges"]].format(name=name),
        "On adapters": ON_ADAPTERS[facts["adapters"]],
        "Reads": _reads(facts["reads"]),
    }
    parts.append("\n".join(["| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in rows.items() if text)]))
    parts += [f"```bash\n{_example(name, facts)}\n```", markdown_of(method_class(name).__doc__ or "")]
    parts.append("## Parameters\n\n" + _parameters(name))
    if name in MERGEKIT:
        chain, given = MERGEKIT[name]
        values = ", ".join(f"`{key} = {_plain(value)}`" for key, value in given.items())
        parts.append(f"## In mergekit\n\nmergekit's `{name}` has other defaults. It is `{chain}` here with {values}.")
    aliases = [alias for alias, each in ALIASES.items() if name in each.chain.split("+")]
    if aliases:
        parts.append(f"mergekit's names with this method in them: {', '.join(f'`{each}`' for each in aliases)}.")
    return "\n\n".join(parts) + "\n"


def _reads(text: str) -> str:
    times = int(text.partition(" ")[0])
    passes = "The inputs once." if times == 1 else f"The inputs {times} times."
    return passes + (" Full matrices are decomposed (SVD)." if "SVD" in text else "")


def _example(name: str, facts: dict[str, str]) -> str:
    base = " --base base/" if facts["merges"] != "weights" or facts["adapters"] == "base" else ""
    if method_class(name).needs_statistics:
        stats = "--stats one-stats.safetensors --stats two-stats.safetensors"
        return f"merge --method {name}{base} one/ two/ {stats} -o merged/"
    least, most = method_class(name).models
    models = " ".join(["one/", "two/", "three/"][: max(least, min(most or 3, 3))])
    return f"merge --method {name}{base} {models} -o merged/"


def _parameters(name: str) -> str:
    own = answer("methods", name)["parameters"]
    if not own:
        return "None."
    lines = ["| option | in Python | default | what it is |", "|---|---|---|---|"]
    for field, facts in own.items():
        words = cell(facts["help"]) + (f"; {cell(' or '.join(facts['choices']))}" if facts.get("choices") else "")
        lines.append(f"| `--{field.replace('_', '-')}` | `{field}` | `{_plain(facts['default'])}` | {words} |")
    return "\n".join(lines)


def _plain(value: object) -> str:
    """Return a default as it is written."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
