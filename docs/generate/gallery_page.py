"""The gallery of adapters as a page of Markdown: python docs/generate/gallery_page.py > docs/adapters-gallery.md."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from merging.api.inspect import inspect
from merging.sources.loose_factors import FOREIGN

ROOT = Path(__file__).parents[2]
HEAD = """# Adapters gallery

{count} layouts of adapters: how a program writes them, for a model, in a version or variant. In the tests, each is
written on the spot, recognised, and baked into a base. The result is its definition written out in float64:
`W + scale * B @ A` for a LoRA. Types of PEFT and of LyCORIS are in addition held against these libraries' own merges,
and the names of diffusion models against diffusers' own loaders: [Formats](formats.md),
[LoRAs of diffusion models](tasks/diffusion.md).

Format, family and trainer are as `merge inspect` names them, with the evidence. A trainer is unknown where nothing in
the file shows it. This page is made by `docs/generate/gallery_page.py`.

| trainer | model | version or variant | format | family | trainer as recognised | held |
|---|---|---|---|---|---|---|"""


TYPES = """
## Types of PEFT

Each is baked and merged as PEFT's own `merge_and_unload` does, on a tiny model of the architecture
(`tests/sources/test_peft_types.py`, `test_peft_types_merged.py`).

| case | config of PEFT | architecture |
|---|---|---|"""
REFUSED = """
## Refused by name

| program | instead |
|---|---|"""


def gallery_page() -> str:
    """Return the page."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.gallery.diffusion import DIFFUSION
    from support.gallery.language import LANGUAGE
    from support.gallery.newer import NEWER
    from support.peft_types import CASES

    layouts = (*LANGUAGE, *DIFFUSION, *NEWER)
    lines = [HEAD.format(count=len(layouts))]
    for layout in layouts:
        with TemporaryDirectory() as folder:
            path, _, _ = layout.write(Path(folder))
            lines.append(layout.row(inspect(path)))
    types = [f"| {name} | `{config}` | {architecture} |" for name, (architecture, config, *_) in CASES.items()]
    refused = [f"| {program} | {instead} |" for program, instead in FOREIGN.items()]
    return "\n".join([*lines, TYPES, *types, REFUSED, *refused])


if __name__ == "__main__":
    print(gallery_page())
