"""RegMean++: statistics that are gathered block by block through the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import merging
from merging.errors import InputError, MergingError
from support import references
from support.adapters import quiet, train
from support.example_statistics import save_runnable, write_texts
from support.tiny import load

BLOCKS = {
    "llama": ["model.layers.0", "model.layers.1", "lm_head"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1", "cls.predictions.transform.dense"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
}


def network(folder: Path) -> Any:
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    with quiet():
        return cls.from_pretrained(folder).eval()


def encoded(model: Path, data: Path) -> list[dict[str, Any]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    return [{"input_ids": torch.tensor([tokenizer(line)["input_ids"]])} for line in lines]


def run(model: Any, inputs: dict[str, Any]) -> Any:
    if model.config.is_encoder_decoder:
        start = torch.zeros(1, 1, dtype=torch.long)
        inputs = {**inputs, "decoder_input_ids": torch.cat([start, inputs["input_ids"][:, :-1]], 1)}
    return model(**inputs)


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("bert", "t5"))]
)
def test_it_is_the_reference(architecture: str, tmp_path: Path) -> None:
    base, tuned = save_runnable(tmp_path, architecture)
    data = [write_texts(tmp_path / f"{number}.jsonl", seed=number) for number in range(2)]
    found = merging.collect_merged_statistics(tuned, data, tmp_path / "stats", base=base)
    options: Any = {"method": "regmean", "base": base}
    merging.merge(tuned, output=tmp_path / "out", stats=[each.path for each in found], **options)
    texts = [encoded(base, each) for each in data]
    wanted = references.regmean_plus_plus(network(base), [*map(network, tuned)], BLOCKS[architecture], texts, run)
    got = load(tmp_path / "out")
    assert got.keys() <= wanted.keys()
    for name, value in got.items():
        assert torch.allclose(value.double(), wanted[name], atol=2e-4), name
    alone = []
    for number, (model, texts_of) in enumerate(zip(tuned, data, strict=True)):
        alone.append(tmp_path / f"alone{number}.safetensors")
        merging.collect_statistics(model, texts_of, alone[-1])
    merging.merge(tuned, output=tmp_path / "plain", stats=alone, **options)
    plain = load(tmp_path / "plain")
    assert max(float((value.double() - wanted[name]).abs().max()) for name, value in plain.items()) > 2e-3


def test_statistics_of_another_merge_are_refused(tmp_path: Path) -> None:
    base, tuned = save_runnable(tmp_path, "llama", tuned=3)
    data = [write_texts(tmp_path / f"{number}.jsonl", seed=number) for number in range(3)]
    found = merging.collect_merged_statistics(tuned[:2], data[:2], tmp_path / "stats", base=base)
    third = merging.collect_statistics(tuned[2], data[2], tmp_path / "third.safetensors")
    with pytest.raises(InputError, match=r"tuned1\.safetensors: holds statistics through a merge of 2 models"):
        merging.merge(tuned, method="regmean", base=base, stats=[*(each.path for each in found), third.path])
    options: Any = {"output": tmp_path / "out", "base": base}
    for models, texts, others, message in (
        (tuned[:2], data[:1], {}, r"1 file of examples for 2 models: give one with data="),
        (tuned[:1], data[:1], {}, "1 model: at least 2 are needed to gather statistics"),
        (tuned[:2], [data[0], tmp_path], {}, "give the same kind for all models"),
        (tuned[:2], [data[0], tmp_path / "no.jsonl"], {}, r"no\.jsonl: there is no such file"),
        (tuned[:2], data[:2], {"base": None}, "give base="),
        (tuned[:2], data[:2], {"output": tmp_path / "out.safetensors"}, "name it without .safetensors"),
        (tuned[:2], data[:2], {"output": tmp_path / "stats"}, "exists already"),
        (tuned[:2], data[:2], {"examples": 0}, "examples=0"),
    ):
        with pytest.raises(MergingError, match=message):
            merging.collect_merged_statistics(models, texts, **{**options, **others})
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_adapters_through_their_merge(tmp_path: Path) -> None:
    """As their baked models do; also under a name that both have, and with modules that are left out."""
    base, _ = save_runnable(tmp_path, "llama", tuned=0)
    loras, data = [], []
    with quiet():
        for seed in range(2):
            loras.append(tmp_path / str(seed) / "lora")
            train(loras[-1], base, seed, ["q_proj", "up_proj"], r=2, lora_alpha=8)
            data.append(write_texts(tmp_path / f"{seed}.jsonl", seed=seed))
            merging.bake([loras[-1]], base=base, output=tmp_path / f"baked{seed}")
    found = merging.collect_merged_statistics(loras, data, tmp_path / "stats", base=base)
    assert [each.path.name for each in found] == ["lora-1.safetensors", "lora-2.safetensors"]
    again = merging.collect_merged_statistics(loras, data, tmp_path / "stats", base=base, overwrite=True)
    assert [each.layers for each in again] == [4, 4]
    files = [each.path for each in again]
    merging.merge(loras, method="regmean", base=base, kind="model", stats=files, output=tmp_path / "low")
    models = [tmp_path / "baked0", tmp_path / "baked1"]
    full = merging.collect_merged_statistics(models, data, tmp_path / "full", base=base, exclude="*norm*")
    merging.merge(models, method="regmean", base=base, stats=[each.path for each in full], output=tmp_path / "out")
    got, wanted = load(tmp_path / "low"), load(tmp_path / "out")
    assert all(torch.allclose(got[name], wanted[name], atol=1e-5) for name in wanted)
