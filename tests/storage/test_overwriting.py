"""What --overwrite replaces: the folder of one model, and nothing that lies among its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import OutputError
from merging.storage.staging import StagedOutput
from support.tiny import checkpoint


@pytest.fixture
def tuned(tmp_path: Path) -> list[Path]:
    return checkpoint(tmp_path, layers=1)[1]


def _lora(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}, path)


FOREIGN = {
    "a collection": ([f"{name}.safetensors" for name in "abcde"], "b.saf.* 1 more"),
    "notes": (["model.safetensors", "config.json", "notes.txt"], r"notes\.txt"),
    "a model and a LoRA": (["model.safetensors", "config.json", "style.safetensors"], r"style\.safetensors"),
    "a model and an adapter": (["model.safetensors", "adapter_model.safetensors"], r"adapter_model\.safetensors"),
    "a model's folder": (["model.safetensors", "other/model.safetensors", "other/config.json"], "other/"),
    "models' folders": (["one/model.safetensors", "two/model.safetensors", "config.json"], r"config\.json, one, two"),
    "training": (["adapter_model.safetensors", "adapter_config.json", "optimizer.pt"], r"optimizer\.pt"),
    "a repository": (["model.safetensors", ".git/config"], r"\.git/"),
    "code": (["model.safetensors", "train.py"], r"train\.py"),
    "a config alone": (["config.json", "README.md"], r"config\.json, README\.md|README\.md, config\.json"),
    "shards of two": (["a-00001-of-00002.safetensors", "b-00001-of-00002.safetensors"], "b-00001"),
    "a part that is not listed": (["unet/model.safetensors", "vae/model.safetensors", "model_index.json"], "vae/"),
    "a note in a part": (["unet/model.safetensors", "unet/notes.md", "model_index.json"], r"unet/notes\.md"),
}  # fmt: skip


def _filled(output: Path, names: list[str]) -> None:
    for name in names:
        _lora(output / name)
    if "model_index.json" in names:
        listed = '{"_class_name": "P", "unet": ["diffusers", "U"], "scheduler": ["diffusers", "S"]}'
        (output / "model_index.json").write_text(listed)


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_models_file_is_named_and_stays(tmp_path: Path, tuned: list[Path], case: str) -> None:
    """Before anything is merged, and also what came into the folder meanwhile."""
    names, told = FOREIGN[case]
    output = tmp_path / "out"
    _filled(output, names)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(OutputError, match=rf"not overwritten: it holds .*({told})"):
        merging.merge(tuned, method="linear", output=output, overwrite=True)
    with (
        StagedOutput(output, overwrite=True, file=False) as staged,
        pytest.raises(OutputError, match="not overwritten"),
    ):
        staged.commit()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert not list(tmp_path.glob(".*"))


MODELS = (
    ["model.safetensors", "config.json", "tokenizer.json", "README.md", "LICENSE", "vocab.txt"],
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
    ["model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "modeling_x.py", ".gitattributes"],
    ["adapter_model.safetensors", "adapter_config.json", "recycling.json", "recycling.html"],
    ["pytorch_lora_weights.safetensors", "README.md"],
    ["my style.safetensors", "README.md"],
    ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json", "scheduler/config.json"],
)  # fmt: skip


@pytest.mark.parametrize("names", MODELS)
def test_the_folder_of_one_model_is_replaced(tmp_path: Path, tuned: list[Path], names: list[str]) -> None:
    _filled(tmp_path / "out", names)
    merging.merge(tuned, method="linear", output=tmp_path / "out", overwrite=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_links_in_a_folder_that_is_replaced(tmp_path: Path, tuned: list[Path]) -> None:
    """A link of a model's file goes; its target stays, and a link to a folder is no model's."""
    output = tmp_path / "out"
    _lora(tmp_path / "precious" / "model.safetensors")
    output.mkdir()
    (output / "model.safetensors").symlink_to(tmp_path / "precious" / "model.safetensors")
    merging.merge(tuned, method="linear", output=output, overwrite=True)
    (output / "unet").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="it holds unet/"):
        merging.merge(tuned, method="linear", output=output, overwrite=True)
    assert (tmp_path / "precious" / "model.safetensors").is_file()


def test_output_that_is_a_link_to_itself(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path / "loop", tmp_path / "loop" / "x"):
        with pytest.raises(OutputError, match="is a link to itself"):
            merging.merge([tmp_path / "a.safetensors"], method="linear", output=output)
