"""Hooks of mkdocs: pages made from the code, and links to files of the repository."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from command_line import command_pages
from families_page import families_page
from mergekit_page import mergekit_page
from method_pages import method_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from merging.methods import GROUPS

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":\w+:<code>~?([\w.]+)</code>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation, behind those that are written there."""
    for group, methods in GROUPS.items():
        _section(config, "Methods").append({group: [f"methods/{name}.md" for name in methods]})
    _section(config, "Command line").extend(command_pages())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code, and the changelog."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    single = {"changelog.md": changelog, "mergekit-recipes.md": mergekit_page()}
    single["diffusion-families.md"] = families_page()
    for name, text in {**method_pages(), **command_pages(), **single}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the table of methods to their pages, and files outside docs/ to the repository."""
    if page.file.src_uri == "methods/index.md":
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](\1.md) |", markdown, flags=re.MULTILINE)
    return LINK.sub(lambda match: _link(match, PurePosixPath(page.file.src_uri).parent, config), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show references to other names as code: docstrings write them in the way of Sphinx."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)


def _link(match: re.Match[str], folder: PurePosixPath, config: MkDocsConfig) -> str:
    """Return a link; for a file outside docs/ its address in the repository, or the text alone if that is unknown."""
    image, text, target, anchor = match.groups()
    if "://" in target or image:
        return match[0]
    path = Path(ROOT / "docs" / folder / target).resolve()
    if path.is_relative_to(ROOT / "docs") or not path.exists():
        return match[0]
    address = path.relative_to(ROOT).as_posix()
    if not config.repo_url:
        return text
    return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{address}{anchor or ''})"


def _section(config: MkDocsConfig, title: str) -> list[Any]:
    """Return the pages of one section of the navigation."""
    return next(entry[title] for entry in config.nav or [] if isinstance(entry, dict) and title in entry)
