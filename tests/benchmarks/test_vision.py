"""The image benchmark from its folder of tasks to its tables, on a tiny CLIP and drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPModel

import merging
from support.image_tasks import SIZE, TASKS, save_image_tasks


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import vision

    return vision


def test_protocols_name_a_model_and_a_dataset_for_each_task(vision: ModuleType) -> None:
    base, models, tasks = vision.from_hub("full", 20)
    assert base == "openai/clip-vit-base-patch32"
    assert len({task.name for task in tasks}) == len(models) == 20
    assert models["sun397"] == "tanganke/clip-vit-base-patch32_sun397"
    assert all(template.format("cat") != template for task in tasks for template in task.templates)
    assert [len(tasks[place].templates) for place in (2, 7, 13)] == [18, 8, 18]  # resisc45, dtd, cifar100
    _, adapters, few = vision.from_hub("lora", 8)
    assert adapters["stanford-cars"] == "hoffman-lab/KnOTS-ViT-B-32_lora_R16_stanford_cars"
    assert list(adapters) == [task.name for task in few]


def test_images_are_cut_in_the_middle_at_the_size_of_the_encoder(vision: ModuleType) -> None:
    image = Image.new("L", (90, 30))
    image.paste(255, (30, 0, 60, 30))
    pixels = vision.to_pixels(image, 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels[:, :, 2:-2].min() > 250  # the white middle, whose edges bicubic interpolation blurs


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_whole_protocol_on_a_tiny_clip(vision: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_image_tasks(tmp_path, vision)
    common = ["--local", str(tmp_path), "--valid", "60", "--device", "cpu", "--work", str(tmp_path / "work")]
    for kind, methods in (("full", ["average", "ties", "tsv", "opcm 0.5"]), ("lora", ["ties", "knots+ties"])):
        arguments = [*common, "--kind", kind, "--methods", *methods, "--json", str(tmp_path / f"{kind}.json")]
        found = vision.main(arguments)
        rows = {row["method"]: row for row in found["rows"]}
        assert set(rows) == {"base", "individual", "task arithmetic", *methods}
        assert rows["individual"]["accuracy"] > rows["base"]["accuracy"] + 20
        merges = [rows[title]["accuracy"] for title in ("task arithmetic", *methods)]
        assert min(merges) > rows["base"]["accuracy"]
        assert rows["individual"]["normalised"] == pytest.approx(100)
        assert all(row["error"] > 0 for title, row in rows.items() if title != "task arithmetic")
        shown = capsys.readouterr().out
        assert all(f"| {name}" in shown for name in (*TASKS, *rows))
        written = json.loads((tmp_path / f"{kind}.json").read_text())["rows"]
        assert [(row["method"], row["tasks"]) for row in written] == [
            (row["method"], row["tasks"]) for row in found["rows"]
        ]

        kept = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "work").rglob("*.safetensors"))
        again = vision.main(arguments)
        assert kept == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "work").rglob("*.safetensors"))
        assert _without_seconds(again) == _without_seconds(found)  # it went on from the answers that are kept

    fixed = vision.main([*common, "--methods", "average", "--fixed", "0.3"])
    assert [row.get("value") for row in fixed["rows"]] == [None] * 4
    _compare_with_written_merge(vision, tmp_path)


def _without_seconds(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found["rows"]]


def _compare_with_written_merge(vision: ModuleType, folder: Path) -> None:
    """The network holds the very weights of a merge that is written and loaded."""
    base, models, _ = vision.from_folder(folder, "lora")
    network = CLIPModel.from_pretrained(base)
    merges = vision.HubModels("lora", models, base, network)
    from hub_merges import ENTRIES

    entry = next(each for each in ENTRIES if each.title == "ties")
    assert len(list(merges.merges(entry, 1.4, []))) == 1
    options: dict[str, Any] = {"kind": "model", **entry.settings(1.4)}
    merging.merge(list(models.values()), base=base, output=folder / "written", **options)
    written = CLIPModel.from_pretrained(folder / "written")
    assert network.vision_model.encoder.layers[0].self_attn.q_proj.weight.shape == (32, 32)
    for name, value in written.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, atol=1e-6), name
    assert network.config.vision_config.image_size == SIZE
