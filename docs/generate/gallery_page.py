"""The gallery of adapters as a page of Markdown: python docs/generate/gallery_page.py > docs/adapters-gallery.md."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from merging.api.inspect import inspect

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


def gallery_page() -> str:
    """Return the page."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.gallery.diffusion import DIFFUSION
    from support.gallery.language import LANGUAGE
    from support.gallery.newer import NEWER

    layouts = (*LANGUAGE, *DIFFUSION, *NEWER)
    lines = [HEAD.format(count=len(layouts))]
    for layout in layouts:
        with TemporaryDirectory() as folder:
            path, _, _ = layout.write(Path(folder))
            lines.append(layout.row(inspect(path)))
    return "\n".join(lines)


if __name__ == "__main__":
    print(gallery_page())
