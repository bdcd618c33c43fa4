"""The site builds without a warning, has a page for each method and command, and asks no other host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from merging.cli.main import cli
from merging.methods import METHODS
from support.paths import ROOT

pytestmark = pytest.mark.exhaustive

LOADED = re.compile(r'<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)="(?:https?:)?//[^"]*"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, which ``MERGING_SITE`` names where .ci/run has built it."""
    if "MERGING_SITE" in os.environ:
        return Path(os.environ["MERGING_SITE"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_each_method_and_each_command_has_a_page(site: Path) -> None:
    for name in METHODS:
        page = (site / "methods" / name / "index.html").read_text(encoding="utf-8")
        assert ">Parameters<" in page
    for name in ("merge", *cli.commands):
        assert (site / "cli" / name / "index.html").is_file()


def test_no_mark_is_left(site: Path) -> None:
    """Of Markdown or of docstrings, in the pages that are made from the code."""
    for page in [*site.glob("methods/*/*.html"), *site.glob("cli/*/*.html"), *site.glob("api/*/*.html")]:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"\\[_*|\[<]|:\w+:<code>|``", text), page


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    assert not [(page.name, each) for page in pages for each in LOADED.findall(page.read_text(encoding="utf-8"))]
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not [each for text in styles for each in re.findall(r"(?:@import|url\()\s*['\"]?https?://[^)]*", text)]
