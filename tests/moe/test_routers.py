"""Routers: as transformers' hidden states give them, and on the right expert's side."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import merging
from merging.errors import InputError
from merging.moe import hidden_states as passes
from support.dense_models import WORDS, build_dense, save_dense, tokenizer
from support.moe_recipes import NEGATIVE, POSITIVE, two_experts
from support.tiny import identical, load


def routers(folder: Path) -> Tensor:
    """The routers of a mixture: [layers, experts, hidden]."""
    found = load(folder)
    return torch.stack([found[name] for name in sorted(found) if name.endswith(".gate.weight")])


def states(folder: Path, texts: list[str], average: bool) -> Tensor:
    """What transformers has in front of each layer, prompt by prompt: [layers, hidden], averaged over the prompts."""
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**words(text, return_tensors="pt"), output_hidden_states=True).hidden_states[:-1]
        found.append(torch.stack([each[0].mean(0) if average else each[0, -1] for each in hidden]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("gate_mode", ["hidden", "hidden_last", "hidden_avg"])
def test_hidden_states_of_prompts(dense: Path, tmp_path: Path, kind: str, gate_mode: str) -> None:
    merging.make_moe(two_experts(dense / kind, gate_mode, negative=True), tmp_path / "out")
    found, average = routers(tmp_path / "out"), gate_mode == "hidden_avg"
    for row, texts in enumerate(POSITIVE):
        expected = states(dense / kind / "base", texts, average)
        if row == 0:
            expected = expected - states(dense / kind / "base", NEGATIVE, average)
        torch.testing.assert_close(found[:, row], torch.nn.functional.normalize(expected), rtol=1e-4, atol=1e-5)


def test_embeddings_of_prompts(dense: Path, tmp_path: Path) -> None:
    merging.make_moe(two_experts(dense / "llama", "cheap_embed", negative=True), tmp_path / "out")
    table = load(dense / "llama" / "base")["model.embed_tokens.weight"]

    def direction(texts: list[str]) -> Tensor:
        return torch.nn.functional.normalize(sum(table[tokenizer()(text)["input_ids"]].sum(0) for text in texts), dim=0)

    first = torch.nn.functional.normalize(direction(POSITIVE[0]) - direction(NEGATIVE), dim=0)
    expected = torch.stack([first, direction(POSITIVE[1])]).expand(3, -1, -1)
    torch.testing.assert_close(routers(tmp_path / "out"), expected, rtol=1e-5, atol=1e-6)


def test_batches_change_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merging.make_moe(two_experts(dense / "llama", "hidden"), tmp_path / "one")
    monkeypatch.setattr(passes, "_BATCH", 12)
    merging.make_moe(two_experts(dense / "llama", "hidden"), tmp_path / "two")
    torch.testing.assert_close(routers(tmp_path / "one"), routers(tmp_path / "two"), rtol=1e-4, atol=1e-5)


def test_random_routers_are_of_the_content(dense: Path, tmp_path: Path) -> None:
    """Of the base's values and the seed, and of no path or order."""
    folder = dense / "llama"
    (tmp_path / "link").symlink_to(folder / "base")
    values = two_experts(folder, "random")
    merging.make_moe(values, tmp_path / "one")
    merging.make_moe({**values, "base_model": str(tmp_path / "link")}, tmp_path / "two")
    merging.make_moe({**values, "seed": 1}, tmp_path / "three")
    assert identical(load(tmp_path / "one"), load(tmp_path / "two"))
    one, other = routers(tmp_path / "one"), routers(tmp_path / "three")
    assert not torch.equal(one, other)
    assert abs(float(one.std()) - 1) < 0.2
    merging.make_moe({**values, "gate_mode": "uniform_random"}, tmp_path / "four")
    uniform = routers(tmp_path / "four")
    assert 0.9 * 32**-0.5 < float(uniform.abs().max()) < 32**-0.5


def test_prompts_that_give_no_direction(dense: Path, tmp_path: Path) -> None:
    values = two_experts(dense / "llama", "hidden")
    values["experts"][0]["negative_prompts"] = values["experts"][0]["positive_prompts"]
    with pytest.raises(InputError, match="cancel out"):
        merging.make_moe(values, tmp_path / "out")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (dense / "llama" / "base" / file).exists()
    bare = save_dense(tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    with pytest.raises(InputError, match="bare: its tokenizer cannot be loaded"):
        merging.make_moe({**values, "base_model": str(bare)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PATTERNS = {
    "numbers": (WORDS[:10], ["plus", "minus", "times"], WORDS[:10], ["is"], WORDS[:10]),
    "animals": (
        ["the", "a"],
        ["cat", "dog", "bird", "fish"],
        ["sat", "ran", "flew"],
        ["on", "in"],
        ["the"],
        ["mat", "sea"],
    ),
}
"""Texts of two domains: one word of each place."""


def texts_of(domain: str) -> tuple[list[str], list[str]]:
    """Texts to learn from, and others of the same domain."""
    every = [" ".join(words) for words in product(*PATTERNS[domain])]
    Random(0).shuffle(every)
    return every[:24], every[24:36]


def train(model: Any, texts: list[str], steps: int) -> Any:
    """The model after some steps on texts, eight at a time."""
    rows = [torch.tensor(ids) for ids in tokenizer()(texts)["input_ids"]]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    model.train()
    for step in range(steps):
        batch = [rows[(8 * step + number) % len(rows)] for number in range(8)]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learned both domains, and a fine-tune of its MLPs for each."""
    folder = tmp_path_factory.mktemp("trained")
    learned = {name: texts_of(name)[0] for name in PATTERNS}
    both = [text for pair in zip(*learned.values(), strict=True) for text in pair]
    save_dense(folder / "base", model=train(build_dense("llama", initializer_range=0.05, hidden_size=64), both, 60))
    for name, texts in learned.items():
        expert = AutoModelForCausalLM.from_pretrained(folder / "base")
        for place, parameter in expert.named_parameters():
            parameter.requires_grad = ".mlp." in place
        save_dense(folder / name, model=train(expert, texts, 40))
    return folder


def loss(model: Any, texts: list[str]) -> float:
    rows = [torch.tensor([ids]) for ids in tokenizer()(texts)["input_ids"]]
    with torch.no_grad():
        return sum(float(model(input_ids=ids, labels=ids).loss) for ids in rows) / len(rows)


@pytest.mark.parametrize("gate_mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_the_router_prefers_the_right_expert(trained: Path, tmp_path: Path, gate_mode: str) -> None:
    """On texts that neither training nor prompts have seen, and with a lower loss there than the wrong expert's."""
    experts = [{"source_model": str(trained / name), "positive_prompts": texts_of(name)[0]} for name in PATTERNS]
    values = {"base_model": str(trained / "base"), "experts": experts, "gate_mode": gate_mode, "experts_per_token": 1}
    merging.make_moe(values, tmp_path / "out")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for right, name in enumerate(PATTERNS):
        held_out = texts_of(name)[1]
        for text in held_out:
            ids = torch.tensor([tokenizer()(text)["input_ids"]])
            with torch.no_grad():
                found = mixture(input_ids=ids, output_router_logits=True).router_logits
            preferred = torch.stack([each[1:].float().sum(0) for each in found]).sum(0).argmax()
            assert int(preferred) == right, text
        if gate_mode == "hidden_avg":
            wrong = AutoModelForCausalLM.from_pretrained(trained / list(PATTERNS)[1 - right])
            assert loss(mixture, held_out) < loss(wrong, held_out)
