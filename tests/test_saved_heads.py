"""Modules saved in full that their base lacks, or has in another size: heads of classifiers, vocabularies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import QUIRKS, State, assert_close, deep_base, quiet
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification, PreTrainedModel

import merging
from merging.errors import InputError

pytestmark = QUIRKS


def classifier(base: Path, labels: int, seed: int) -> PreTrainedModel:
    """A base with a head that is drawn for it, as every training begins with."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification.from_pretrained(base, num_labels=labels).eval()


def train_classifier(folder: Path, base: Path, seed: int, labels: int = 3) -> Path:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS")
    model = get_peft_model(classifier(base, labels, seed), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape))
    model.save_pretrained(folder)
    return folder


def state(base: Path, adapter: Path, labels: int = 3) -> State:
    """What PEFT makes of an adapter on the base, the head among it."""
    model = PeftModel.from_pretrained(classifier(base, labels, 99), adapter).merge_and_unload()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A language model, and two classifiers' adapters of it, and one for other labels. None is changed by a test."""
    root = tmp_path_factory.mktemp("classifiers")
    with quiet():
        deep_base(root / "base", 2)
        train_classifier(root / "one", root / "base", 1)
        train_classifier(root / "two", root / "base", 2)
        train_classifier(root / "other", root / "base", 3, labels=2)
    yield root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
def test_classifiers_merge_with_their_heads(classifiers: Path, tmp_path: Path, with_base: bool) -> None:
    """The mean of both, head and all, is what PEFT loads; the base is a language model, and has no such head."""
    one, two, base = (classifiers / name for name in ("one", "two", "base"))
    options = {"base": base} if with_base else {}
    done = merging.merge([one, two], method="linear", weights=(0.75, 0.25), output=tmp_path / "out", **options)
    assert any("score.weight: saved in full and in no base here" in notice for notice in done.notices)
    first, second = state(base, one), state(base, two)
    assert_close(state(base, tmp_path / "out"), {name: 0.75 * first[name] + 0.25 * second[name] for name in first})


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_comes_out_as_a_model(classifiers: Path, tmp_path: Path) -> None:
    one, two, base = (classifiers / name for name in ("one", "two", "base"))
    merging.merge([one, two], method="linear", base=base, kind="model", output=tmp_path / "out")
    found = classifier(tmp_path / "out", 3, 5).state_dict()
    first, second = state(base, one), state(base, two)
    assert_close(found, {name: (first[name] + second[name]) / 2 for name in first})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
def test_heads_for_other_labels_are_left_out_as_the_refusal_says(
    classifiers: Path, tmp_path: Path, with_base: bool
) -> None:
    one, other = classifiers / "one", classifiers / "other"
    options = {"base": classifiers / "base"} if with_base else {}
    with pytest.raises(InputError, match="for different labels: leave them out with --exclude score"):
        merging.merge([one, other], method="linear", output=tmp_path / "out", **options)
    merging.merge([one, other], method="linear", exclude="score", output=tmp_path / "out", **options)
    assert not any("score" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert not json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
