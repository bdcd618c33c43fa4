"""The gallery of adapter layouts: each is recognised, and merged into its base as its definition says."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import merging
from merging.api.inspect import inspect
from merging.hub.open_model import open_model
from merging.sources import Adapter
from support.adapters import assert_close
from support.gallery.diffusion import DIFFUSION
from support.gallery.language import LANGUAGE
from support.gallery.newer import NEWER
from support.paths import ROOT

PAGE = (ROOT / "docs" / "adapters-gallery.md").read_text(encoding="utf-8")
LAYOUTS = {layout.name: layout for layout in (*LANGUAGE, *DIFFUSION, *NEWER)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    path, base, wanted = layout.write(tmp_path)
    adapter = open_model(path)
    assert isinstance(adapter, Adapter)
    assert adapter.dialect == layout.dialect
    facts = inspect(path)
    assert (facts["family"], facts["trainer"]) == (layout.family, layout.shown)
    assert bool(facts["needs_base"]) == layout.needs_base
    assert layout.row(facts) in PAGE
    merging.bake([path], base=base, output=tmp_path / "out.safetensors")
    assert_close(load_file(tmp_path / "out.safetensors"), wanted)


def test_the_page_lists_these_layouts() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) - 1 == len(LAYOUTS) == len(LANGUAGE) + len(DIFFUSION) + len(NEWER)
    assert f"{len(LAYOUTS)} layouts" in PAGE
