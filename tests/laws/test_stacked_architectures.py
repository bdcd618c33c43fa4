"""Blocks of every architecture can be stacked: the result loads in transformers, and computes; else it is refused."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import merging
from merging.errors import InputError
from support.architectures import ARCHITECTURES, build

RANGES = {
    "bart": ("decoder=0:2", "decoder=1:2"),
    "deepseek-v3": ("0:1", "1:2", "1:2"),
    "hubert": ("encoder=0:2", "encoder=0:1"),
    "jamba": ("0:2", "0:4"),
    "modernbert": ("0:1", "1:2", "1:2"),
    "qwen3-next": ("0:4", "3:4"),
    "t5": ("decoder=1:2", "decoder=0:1"),  # transformers itself generates with no decoder deeper than its encoder
    "t5-gated": ("encoder=0:2", "encoder=0:2"),
    "wav2vec2": ("encoder=1:2",),
    "whisper": ("encoder=1:2", "encoder=0:2"),
}
"""The ranges to stack, where they are other than all blocks and the last one again."""

REFUSED = {
    "albert": "has no blocks that are numbered in one row",
    "convnext": "has no blocks that are numbered in one row",
    "resnet": "has no blocks that are numbered in one row",
    "segformer": "has no blocks that are numbered in one row",
    "swin": "has no blocks that are numbered in one row",
}

EVERYDAY = ("gemma2", "gpt2", "llama-tied", "qwen3-moe", "t5", "albert")
"""One of each kind; the others are run in the exhaustive tests."""


def stack(source: Path, output: Path, *ranges: str) -> Path:
    parts = [{"model": str(source), "layers": each} for each in ranges]
    merging.merge([merging.LayerStack.model_validate({"stack": parts})], method="passthrough", output=output)
    return output


def forward(model: PreTrainedModel) -> torch.Tensor:
    """An output of a model for some input of the kind that it takes."""
    tokens = torch.tensor([[1, 5, 7, 9]])
    wanted = inspect.signature(model.forward).parameters
    config = model.config
    given: dict[str, torch.Tensor] = {}
    if "input_values" in wanted:
        given["input_values"] = torch.linspace(-1, 1, 400)[None]
    elif "input_features" in wanted:
        given["input_features"] = torch.linspace(-1, 1, 8 * 32).view(1, 8, 32)
    elif "pixel_values" in wanted and "input_ids" not in wanted:
        given["pixel_values"] = torch.linspace(-1, 1, 3 * config.image_size**2).view(1, 3, config.image_size, -1)
    else:
        given["input_ids"] = tokens
    if type(model).__name__ in ("CLIPModel", "SiglipModel"):
        size = config.vision_config.image_size
        given["pixel_values"] = torch.linspace(-1, 1, 3 * size**2).view(1, 3, size, size)
    if "decoder_input_ids" in wanted:
        given["decoder_input_ids"] = tokens
    with torch.no_grad():
        return next(value for value in model(**given).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    "name", [each if each in EVERYDAY else pytest.param(each, marks=pytest.mark.exhaustive) for each in ARCHITECTURES]
)
def test_stacks_load_and_compute(name: str, tmp_path: Path) -> None:
    model = build(name, 1)
    model.save_pretrained(tmp_path / "model")
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            stack(tmp_path / "model", tmp_path / "out", "0:1")
        return
    ranges = RANGES.get(name, ("0:2", "1:2"))
    out = stack(tmp_path / "model", tmp_path / "out", *ranges)
    loaded, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not {kind: keys for kind, keys in report.items() if keys}
    assert bool(forward(loaded.eval()).isfinite().all())
    if hasattr(model, "generate") and model.can_generate() and name not in ("whisper", "llava", "qwen2-vl"):
        made = loaded.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=3, do_sample=False, min_new_tokens=3)
        assert made.shape[1] >= 4


@pytest.mark.parametrize(
    "name", [each if each in EVERYDAY else pytest.param(each, marks=pytest.mark.exhaustive) for each in ARCHITECTURES]
)
def test_all_blocks_once_are_the_model_itself(name: str, tmp_path: Path) -> None:
    if name in REFUSED:
        return
    model = build(name, 1)
    model.save_pretrained(tmp_path / "model")
    total = 4 if name in ("jamba", "qwen3-next") else 2
    word = RANGES.get(name, ("",))[0].rpartition("=")[0]
    out = stack(tmp_path / "model", tmp_path / "out", f"{word}={0}:{total}" if word else f"0:{total}")
    one, again = (type(model).from_pretrained(folder).eval() for folder in (tmp_path / "model", out))
    weights = one.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    torch.testing.assert_close(forward(again), forward(one))  # sums are not rounded alike at each run
    stated, got = (each.config.to_dict() | {"_name_or_path": ""} for each in (one, again))
    assert got == stated
