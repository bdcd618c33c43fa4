"""The gallery of adapter layouts: each is recognised, and merged into its base as its definition says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import merging
from merging.api.inspect import inspect
from merging.errors import InputError
from merging.hub.open_model import open_model
from merging.sources import Adapter
from merging.sources.loose_factors import FOREIGN
from support.adapters import assert_close
from support.gallery.diffusion import DIFFUSION
from support.gallery.language import LANGUAGE
from support.gallery.newer import NEWER
from support.paths import ROOT
from support.peft_types import CASES

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


NO_LORA = {
    "LyCORIS, Stable Diffusion XL, LoHa": "may be a convolution, whose kernel the file does not state",
    "PEFT, Llama, 0.14, all biases": "PEFT's format carries biases only of all adapted modules",
}
"""Layouts that make no LoRA without their base, or none at all."""

FACTORS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", ".default.weight", ".alpha", ".diff")
"""Ends of the names in files of nothing but LoRA, and of norms in full."""


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAYOUTS)
def test_merged_with_itself(tmp_path: Path, name: str) -> None:
    """The mean of an adapter and itself is the same change, under the names of its file where these are of factors."""
    layout = LAYOUTS[name]
    path, base, wanted = layout.write(tmp_path)
    needs: dict[str, Any] = {"base": base, "rank": 8} if layout.needs_base else {}
    out = tmp_path / "merged.safetensors"
    if name in NO_LORA:
        with pytest.raises(InputError, match=NO_LORA[name]):
            merging.merge([path, path], method="linear", output=out, **needs)
        return
    merging.merge([path, path], method="linear", output=out, **needs)
    merging.bake([out], base=base, output=tmp_path / "out.safetensors")
    assert_close(load_file(tmp_path / "out.safetensors"), wanted)
    if layout.dialect in ("ComfyUI", "diffusers", "Kohya"):
        before = load_file(next(path.glob("*.safetensors")) if path.is_dir() else path)
        if all(each.endswith(FACTORS) for each in before):
            assert before.keys() <= load_file(out).keys()


def test_the_page_lists_these_layouts() -> None:
    """And the types of PEFT that have tests of their own, and the programs that are refused."""
    table, types, refused = PAGE.split("\n## ")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) - 1 == len(LAYOUTS) == len(LANGUAGE) + len(DIFFUSION) + len(NEWER)
    assert f"{len(LAYOUTS)} layouts" in table
    for name, (architecture, config, *_) in CASES.items():
        assert f"| {name} | `{config}` | {architecture} |" in types
    for program, instead in FOREIGN.items():
        assert f"| {program} | {instead} |" in refused
