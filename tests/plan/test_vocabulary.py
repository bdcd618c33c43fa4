"""Models with vocabularies of different sizes: refused, or merged by the index of their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import merging
from merging.errors import InputError
from support.tiny import CONFIG, fine_tune, load, model, save

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
Tensors = dict[str, Tensor]


def grown(base: Tensors, rows: int, seed: int) -> Tensors:
    """A fine-tune with so many new rows behind those of its base."""
    random = torch.Generator().manual_seed(seed)
    tuned = fine_tune(base, seed)
    return tuned | {name: torch.cat([tuned[name], torch.randn(rows, 8, generator=random)]) for name in TABLES}


def tokenizer(folder: Path, tokens: list[str], kind: str = "tokenizer.json") -> None:
    """A tokenizer's file with these tokens, row by row."""
    vocabulary = {token: row for row, token in enumerate(tokens)}
    if kind == "tokenizer.json":
        added = [{"id": len(tokens) - 1, "content": vocabulary and tokens[-1], "special": True}]
        content: Any = {"model": {"type": "BPE", "vocab": dict(list(vocabulary.items())[:-1])}, "added_tokens": added}
    elif kind == "unigram":
        kind, content = "tokenizer.json", {"model": {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens]}}
    elif kind == "vocab.json":
        content = dict(list(vocabulary.items())[:-1])
        (folder / "added_tokens.json").write_text(json.dumps({tokens[-1]: len(tokens) - 1}))
    else:
        (folder / kind).write_text("\n".join(tokens))
        return
    (folder / kind).write_text(json.dumps(content))


TOKENS = [f"t{row}" for row in range(16)]


def folder_of(path: Path, tensors: Tensors, kind: str = "tokenizer.json", **config: Any) -> Path:
    rows = len(tensors[TABLES[0]])
    save(path, tensors, CONFIG | {"vocab_size": rows} | config)
    tokenizer(path, TOKENS[:rows], kind)
    return path


def mean(values: list[Tensor]) -> Tensor:
    return sum(value.double() for value in values) / len(values)


@pytest.fixture
def family(tmp_path: Path) -> tuple[list[Path], list[Tensors]]:
    """A base of 12 rows, and fine-tunes of it with 12, 14 and 15."""
    base = model(0)
    tensors = [base, fine_tune(base, 1), grown(base, 2, 2), grown(base, 3, 3)]
    return [folder_of(tmp_path / f"m{i}", each) for i, each in enumerate(tensors)], tensors


def test_different_sizes_are_refused_and_the_choices_named(family: tuple[list[Path], list[Tensors]]) -> None:
    paths, _ = family
    with pytest.raises(InputError, match=r'sizes \(.*m1 12, .*m2 14, .*m0 12 rows\).*vocabulary="base".*m0.*largest'):
        merging.preview(paths[1:3], method="task_arithmetic", base=paths[0])
    merging.preview(paths[1:3], method="task_arithmetic", base=paths[0], on_mismatch="base")


def test_rows_of_the_base(family: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    """Rows that only fine-tunes have are gone, the others are merged, and a model without a row leaves it as it is."""
    paths, tensors = family
    out = merging.merge(
        paths[1:], method="task_arithmetic", base=paths[0], scale=0.5, vocabulary="base", output=tmp_path / "out"
    )
    got, (base, *tuned) = load(out.path), tensors
    for name, value in base.items():
        want = value.double() + 0.5 * sum(each[name][: len(value)].double() - value.double() for each in tuned)
        assert torch.allclose(got[name].double(), want, atol=1e-6)
        assert got[name].shape == value.shape
    assert json.loads((out.path / "config.json").read_text())["vocab_size"] == 12
    assert any("matched by index: 12 rows come out" in notice for notice in out.notices)

    smaller = merging.merge(
        paths[:3], method="task_arithmetic", base=paths[3], vocabulary="base", output=tmp_path / "2"
    )
    got, base = load(smaller.path), tensors[3]
    for name in TABLES:
        absent = base[name][14:]
        assert torch.equal(got[name][14:], absent)
        two = base[name][12:14].double() + (tensors[2][name][12:].double() - base[name][12:14].double())
        assert torch.allclose(got[name][12:14].double(), two, atol=1e-6)


def test_the_largest_vocabulary(family: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    """New rows are the mean of the models that have them, whose tokenizer comes along, and changes start from there."""
    paths, tensors = family
    out = merging.merge(
        paths[1:], method="task_arithmetic", base=paths[0], scale=1 / 3, vocabulary="largest", output=tmp_path / "out"
    )
    got, (base, *tuned) = load(out.path), tensors
    for name in TABLES:
        assert got[name].shape == (15, 8)
        rows = [base[name].double(), mean([each[name][12:14] for each in tuned[1:]]), tuned[2][name][14:].double()]
        start = torch.cat(rows)
        change = torch.zeros(15, 8, dtype=torch.float64)
        for each in tuned:
            own = each[name].double()
            change[: len(own)] += own - start[: len(own)]
        assert torch.allclose(got[name].double(), start + change / 3, atol=1e-6)
    config = json.loads((out.path / "config.json").read_text())
    assert config["vocab_size"] == 15
    assert (out.path / "tokenizer.json").read_bytes() == (paths[3] / "tokenizer.json").read_bytes()
    assert any("the tokenizer comes from" in notice and "m3" in notice for notice in out.notices)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_the_largest_vocabulary_without_a_base(
    family: tuple[list[Path], list[Tensors]], tmp_path: Path, order: tuple[int, ...]
) -> None:
    """A model without a row counts as the mean of those that have it, so that their mean is what comes out."""
    paths, tensors = family
    out = merging.merge([paths[i] for i in order], method="linear", vocabulary="largest", output=tmp_path / "out")
    got = load(out.path)
    for name in TABLES:
        for row in range(15):
            has = [tensors[i][name][row] for i in order if row < len(tensors[i][name])]
            assert torch.allclose(got[name][row].double(), mean(has), atol=1e-6), row


def test_any_threads_and_shards_give_the_same_bytes(family: tuple[list[Path], list[Tensors]], tmp_path: Path) -> None:
    paths, _ = family
    settings: dict[str, Any] = {"method": "dare+ties", "drop": 0.5, "base": paths[0], "vocabulary": "largest"}
    one = merging.merge(paths[1:], **settings, threads=1, output=tmp_path / "a.safetensors")
    two = merging.merge(paths[1:], **settings, threads=3, output=tmp_path / "b.safetensors")
    assert load(one.path).keys() == load(two.path).keys()
    assert all(torch.equal(value, load(two.path)[name]) for name, value in load(one.path).items())


@pytest.mark.parametrize("kind", ["tokenizer.json", "unigram", "vocab.json", "vocab.txt"])
def test_rows_that_are_different_tokens_are_refused(tmp_path: Path, kind: str) -> None:
    base = model(0)
    paths = [folder_of(tmp_path / "a", base, kind), folder_of(tmp_path / "b", grown(base, 2, 1), kind)]
    merging.preview(paths, method="linear", vocabulary="largest")
    tokenizer(paths[1], [*TOKENS[:7], "other", *TOKENS[8:14]], kind)
    for choice in ("base", "largest"):
        with pytest.raises(InputError, match=r"row 7 is the token '(t7|other)' in .* do not match by index"):
            merging.preview(paths, method="linear", vocabulary=choice)


def test_new_tokens_that_differ_matter_only_where_they_come_out(tmp_path: Path) -> None:
    base = model(0)
    paths = [folder_of(tmp_path / "base", base)]
    for i, name in enumerate(("one", "two")):
        paths.append(folder_of(tmp_path / name, grown(base, 1, i)))
        tokenizer(paths[-1], [*TOKENS[:12], f"<{name}>"])
    merging.preview(paths[1:], method="task_arithmetic", base=paths[0], vocabulary="base")
    with pytest.raises(InputError, match=r"row 12 is the token '<two>' in .* and '<one>' in"):
        merging.preview(paths[1:], method="task_arithmetic", base=paths[0], vocabulary="largest")


def test_without_a_tokenizer_it_is_said_that_nothing_was_compared(tmp_path: Path) -> None:
    base = model(0)
    paths = [save(tmp_path / "a", base), save(tmp_path / "b", grown(base, 1, 1))]
    plan = merging.preview(paths, method="linear", vocabulary="base")
    assert sum("has no tokenizer" in notice for notice in plan.notices) == 2


def test_resized_models_of_transformers(tmp_path: Path) -> None:
    """Tied, sharded, one side only resized: the merge loads in transformers and has the size it says."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (False, True):
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=tied))
        made.save_pretrained(tmp_path / f"small{tied}")
        made.resize_token_embeddings(24)
        made.save_pretrained(tmp_path / f"large{tied}", max_shard_size="4KB")
        paths = [tmp_path / f"small{tied}", tmp_path / f"large{tied}"]
        for choice, rows in (("base", 20), ("largest", 24)):
            out = merging.merge(paths, method="linear", vocabulary=choice, output=tmp_path / f"{tied}{choice}").path
            loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(report.values())
            assert loaded.get_input_embeddings().weight.shape == (rows, 16)
            assert torch.allclose(
                loaded(torch.tensor([[1, 2]])).logits, made(torch.tensor([[1, 2]])).logits[..., :rows]
            )


def test_a_tied_and_an_untied_model_of_different_sizes(tmp_path: Path) -> None:
    """The head of the one and the embedding of the other have a row for each token too."""
    base = model(0)
    tied = {name: value for name, value in base.items() if name != "lm_head.weight"}
    tuned = grown(base, 2, 1)
    paths = [folder_of(tmp_path / "tied", tied, tie_word_embeddings=True), folder_of(tmp_path / "untied", tuned)]
    got = load(merging.merge(paths, method="linear", vocabulary="largest", output=tmp_path / "out").path)
    for name in TABLES:
        assert torch.allclose(got[name][:12].double(), mean([base[TABLES[0]], tuned[name][:12]]), atol=1e-6)
        assert torch.allclose(got[name][12:], tuned[name][12:], atol=1e-6)


def test_a_bias_with_an_entry_for_each_token(tmp_path: Path) -> None:
    """BART has one, of one row."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 30,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    made = BartForConditionalGeneration(BartConfig(**sizes, **heads, forced_eos_token_id=None))
    made.save_pretrained(tmp_path / "small")
    made.resize_token_embeddings(33)
    made.final_logits_bias += torch.arange(33)
    made.save_pretrained(tmp_path / "large")
    out = merging.merge(
        [tmp_path / "small", tmp_path / "large"], method="linear", vocabulary="largest", output=tmp_path / "o"
    )
    loaded, report = BartForConditionalGeneration.from_pretrained(out.path, output_loading_info=True)
    assert not any(report.values())
    want = torch.cat([torch.arange(30) / 2, torch.arange(30, 33)])
    assert torch.equal(loaded.final_logits_bias, want[None])
