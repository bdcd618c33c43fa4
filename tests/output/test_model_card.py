"""Cards: whatever names and licences hold, the YAML and the Markdown of a card stay what they are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from merging.errors import escape_unprintable
from merging.output.licences import Source
from merging.output.markdown import card, code, code_block, prose, sources_listed
from merging.report import Page

HOSTILE = [
    "plain",
    "a`b", "``", "`", "a``` b", " `x` ", "",
    "one\ntwo", "x\n---\nlicense: mit\n---\n# Owned", "---", "...", "x\r\ny", "tab\there",
    "a | b | c", "# head", "- item", "1. item", "> quote", "***", "a_b_c _em_ __strong__", "~~gone~~",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt; &amp; &#x202e;",
    "![x](https://evil.example/x.png)",
    "[click](javascript:alert(1))", "<https://evil.example>", "https://evil.example/x",
    "www.evil.example", "a@evil.example",
    "[ref]: https://evil.example", "\\`x\\`", "\\", "$$x$$",
    "\x1b[31mred\x1b[0m\x07", "\u202eevil\u2066", "\x00", "\x7f", "\x9b31m", "\u2028line", "\ud800half",
    "null", "~", "on", "[1]", "{a: b}",
]  # fmt: skip
"""What may stand in a name, a licence, an owner, a reason or a tag."""


def rendered(text: str) -> list[Any]:
    """The tokens of Markdown as GitHub and the Hub read it: tables, strikethrough, bare addresses."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [each for token in markdown.parse(text) for each in [token, *(token.children or [])]]


def shown(text: str) -> str:
    return "".join(each.content for each in rendered(text) if each.type in ("text", "code_inline", "text_special"))


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_nothing_in_a_card_is_markup(text: str) -> None:
    """The head holds the very values, and the rest has the marks of the program's own and no others."""
    whole = card(
        {"license": text, "tags": ["merge", text]},
        "Merged adapter",
        [
            sources_listed([Source(text, "base", text)]),
            prose(f"Note: {text}."),
            code_block(f"models:\n- {text}", "yaml"),
        ],
    )
    assert all(each.isprintable() for each in whole.split("\n"))
    head = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", whole, re.DOTALL)
    assert head
    assert yaml.safe_load(head[1]) == {"license": escape_unprintable(text), "tags": ["merge", escape_unprintable(text)]}
    marks = [each.type for each in rendered(head[2])]
    expected = card({}, "Merged adapter", [sources_listed([Source("x", "base", "x")]), "Note: x.", "```yaml\nx\n```"])
    plain = [each.type for each in rendered(expected.partition("---\n\n")[2])]
    kept = ("text", "text_special", "softbreak")
    assert [each for each in marks if each not in kept] == [each for each in plain if each not in kept], marks
    assert not re.search(r"(?<!\\)(?:https?:|www\.)", prose(text)), "no bare address"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_reader_sees(text: str) -> None:
    """The text itself, in code and in prose."""
    if text.isprintable() and text.strip():
        assert shown(code(text)).strip() == text.strip()
        assert shown(f"Note: {prose(text)}.") == f"Note: {text}."


@pytest.mark.parametrize("text", [each for each in HOSTILE if each], ids=ascii)
def test_nothing_in_a_page_is_markup(text: str) -> None:
    """As many tags as with a plain text, and no control characters."""

    def page(word: str) -> str:
        made = Page(word, word).section(word, word).section(word).note(word).facts({word: word})
        return made.table([word, "n"], [[word, 1]], word).figure("<svg/>", word).html()

    assert len(re.findall("<", page(text))) == len(re.findall("<", page("plain")))
    assert page(text).replace("\n", "").isprintable()
