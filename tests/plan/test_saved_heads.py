"""Modules saved in full that their base lacks, or has in another size: heads of classifiers, vocabularies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import merging
from merging.errors import InputError, OptionError
from merging.serving import verify
from support.adapters import QUIRKS, State, assert_close, deep_base, quiet
from support.small_adapter import FACTORS, small_adapter

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
    with pytest.raises(InputError, match='for different labels: leave them out with exclude="score"'):
        merging.merge([one, other], method="linear", output=tmp_path / "out", **options)
    merging.merge([one, other], method="linear", exclude="score", output=tmp_path / "out", **options)
    assert not any("score" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert not json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    state(classifiers / "base", tmp_path / "out")  # PEFT looks for no head


# ---- classifiers whose base has its tensors under shorter names


def bert_classifier(base: Path, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return BertForSequenceClassification.from_pretrained(base, num_labels=3).eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An encoder saved plain (``encoder.*``) and in a language model (``bert.*``), and two classifiers' adapters."""
    root = tmp_path_factory.mktemp("encoders")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with quiet():
        torch.manual_seed(0)
        encoder = BertModel(BertConfig(**sizes, vocab_size=32), add_pooling_layer=False)
        encoder.save_pretrained(root / "plain")
        language = BertForMaskedLM(encoder.config)
        language.bert = encoder
        language.save_pretrained(root / "language")
        for seed, name in enumerate(("one", "two")):
            config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
            tuned = get_peft_model(bert_classifier(root / "plain", seed), config)
            with torch.no_grad():
                for value in tuned.parameters():
                    if value.requires_grad:
                        value.add_(0.1 * torch.randn(value.shape))
            tuned.save_pretrained(root / name)
    yield root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("base", ["plain", "language"])
def test_heads_keep_their_names_on_a_base_of_other_prefixes(
    encoders: Path, tmp_path: Path, base: str, kind: str
) -> None:
    """Adapters name ``bert.encoder.*`` and ``classifier.*``; what comes out, PEFT or transformers loads whole."""
    adapters = [encoders / "one", encoders / "two"]
    merging.merge(adapters, method="linear", base=encoders / base, kind=kind, output=tmp_path / "out")

    def state_with(adapter: Path) -> State:
        model = PeftModel.from_pretrained(bert_classifier(encoders / base, 9), adapter).merge_and_unload()
        return {name: value.clone() for name, value in model.state_dict().items() if "pooler" not in name}

    out = tmp_path / "out"
    found = state_with(out) if kind == "adapter" else bert_classifier(out, 9).state_dict()
    one, two = map(state_with, adapters)
    assert_close({name: found[name] for name in one}, {name: (one[name] + two[name]) / 2 for name in one})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", ["peft", "transformers"])
@pytest.mark.parametrize("base", ["plain", "language", "classifier"])
def test_classifiers_are_verified_on_the_class_of_their_task(
    encoders: Path, tmp_path: Path, base: str, program: str
) -> None:
    """PEFT notes both names that a head may have, ``classifier`` and ``score``; the base need have no head."""
    merging.merge([encoders / "one", encoders / "two"], method="linear", output=tmp_path / "out")
    if base == "classifier":
        bert_classifier(encoders / "plain", 1).save_pretrained(tmp_path / "classifier")
    where = tmp_path / base if base == "classifier" else encoders / base
    for adapter in (encoders / "one", tmp_path / "out"):
        stated = json.loads((adapter / "adapter_config.json").read_text())
        assert set(stated["modules_to_save"]) == {"classifier", "score"}
        found = verify(str(adapter), [program], base=str(where), load=True).findings
        assert [(each.severity, each.what) for each in found] == [
            ("ok", "nothing is refused or ignored"),
            ("ok", "it was loaded, with no tensor missing or unexpected"),
        ]


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_not_in_the_file_is_refused(encoders: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(encoders / "one", tmp_path / "a")
    kept = {n: v for n, v in load_file(adapter / "adapter_model.safetensors").items() if ".classifier." not in n}
    save_file(kept, adapter / "adapter_model.safetensors")
    (finding,) = [each for each in verify(str(adapter), ["peft"]).findings if each.program == "peft"]
    assert (finding.severity, finding.where) == ("refuses", ("modules_to_save: classifier", "modules_to_save: score"))


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_no_class_is_for_is_said(encoders: Path, tmp_path: Path) -> None:
    deep_base(tmp_path / "base", 2)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(OptionError, match="transformers has no SequenceClassification of type mamba"):
        verify(str(encoders / "one"), ["peft"], base=str(tmp_path / "base"), load=True)


# ---- vocabularies that were resized in training


ROWS = 96
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
WAYS = {"saved along": {}, "in full": {"modules_to_save": ["embed_tokens", "lm_head"]}, "targeted": {}}


def train_resized(folder: Path, base: Path, seed: int, rows: int, way: str) -> Path:
    """An adapter trained on a base whose embedding and head were resized, with rows of its own."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    targets = ["q_proj", *(["embed_tokens", "lm_head"] if way == "targeted" else [])]
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, **WAYS[way]))
    with torch.no_grad():
        for value in tuned.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape))
        if way == "saved along":
            tuned.get_input_embeddings().weight.add_(0.1 * torch.randn(rows, 32))
    tuned.save_pretrained(folder, save_embedding_layers=way != "in full")
    (folder / "vocab.txt").write_text("\n".join(f"t{row}" for row in range(rows)))
    return folder


def resized_state(base: Path, adapter: Path, rows: int) -> State:
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and adapters of it with two and three tokens more. None is changed by a test."""
    root = tmp_path_factory.mktemp("resized")
    with quiet():
        deep_base(root / "base", 2)
        for way in WAYS:
            for number, rows in ((1, ROWS + 2), (2, ROWS + 3)):
                train_resized(root / f"{way} {number}", root / "base", number, rows, way)
    return root


def merged_rows(first: State, second: State) -> State:
    """The mean of two models, in their first rows; rows that only one has are its own."""
    found = {}
    for name, value in first.items():
        other = second[name]
        rows = len(value) if name in TABLES else None
        found[name] = (value + other[:rows]) / 2 if rows else (value + other) / 2
        if rows:
            found[name] = torch.cat([found[name], other[rows:]])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_resized_vocabularies_merge_into_a_model(resized: Path, tmp_path: Path, way: str) -> None:
    """Rows of new tokens match by index; transformers loads what comes out with all of them."""
    one, two = (resized / f"{way} {number}" for number in (1, 2))
    options = {"method": "linear", "base": resized / "base", "kind": "model"}
    with pytest.raises(InputError, match=r'vocabularies of different sizes .* vocabulary="largest"'):
        merging.merge([one, two], output=tmp_path / "out", **options)
    merging.merge([one, two], vocabulary="largest", output=tmp_path / "out", **options)
    wanted = merged_rows(resized_state(resized / "base", one, ROWS + 2), resized_state(resized / "base", two, ROWS + 3))
    assert_close(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), wanted)
    assert len((tmp_path / "out" / "vocab.txt").read_text().split()) == ROWS + 3
    merging.merge([one, two], vocabulary="base", output=tmp_path / "base rows", **options)
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "base rows").state_dict()
    assert_close(kept, {name: value[:ROWS] if name in TABLES else value for name, value in wanted.items()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_resized_vocabularies_merge_into_an_adapter(resized: Path, tmp_path: Path, way: str) -> None:
    """As PEFT reads it on a base with that many rows; the tokenizer comes along."""
    one, two = (resized / f"{way} {number}" for number in (1, 2))
    merging.merge([one, two], method="linear", base=resized / "base", vocabulary="largest", output=tmp_path / "out")
    wanted = merged_rows(resized_state(resized / "base", one, ROWS + 2), resized_state(resized / "base", two, ROWS + 3))
    assert_close(resized_state(resized / "base", tmp_path / "out", ROWS + 3), wanted)
    assert len((tmp_path / "out" / "vocab.txt").read_text().split()) == ROWS + 3


@pytest.mark.filterwarnings("ignore")
def test_embeddings_saved_along_are_read_where_sizes_agree(resized: Path, tmp_path: Path) -> None:
    """With the resized base saved, nothing differs, and the embeddings are modules saved in full."""
    base = LlamaForCausalLM.from_pretrained(resized / "base")
    base.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    one = resized / "saved along 1"
    merging.merge([one], method="linear", base=tmp_path / "base", kind="model", output=tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_close(found, resized_state(resized / "base", one, ROWS + 2))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv"])
def test_change_of_a_single_number(tmp_path: Path, method: str) -> None:
    """A module saved in full may hold a parameter without axes."""
    base = {"layers.0.q.weight": torch.zeros(4, 4), "scale.value": torch.tensor(1.0)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    path = small_adapter(tmp_path / "a", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["scale"]})
    saved = {"base_model.model.scale.value": torch.tensor(3.5)}
    save_file(FACTORS | saved, path / "adapter_model.safetensors")
    output = tmp_path / "out.safetensors"
    merging.merge([path], method=method, base=tmp_path / "base", kind="model", output=output)
    merged = load_file(output)
    assert merged["scale.value"].shape == () and float(merged["scale.value"]) == 3.5
    assert torch.allclose(merged["layers.0.q.weight"], torch.full((4, 4), 2.0))
