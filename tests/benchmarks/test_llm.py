"""MergeBench's protocol from its folder of tasks to its tables, on a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from support.recycling_tasks import causal, texts

WORDS = {"first": "w1", "second": "w2", "third": "w3"}  # each task's prompts begin with this word


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import llm

    return llm


def _rows(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """A task's answer is the word that it has for the parity of the prompt's last word."""
    answers = ("w10", "w11") if task == "first" else ("w20", "w21") if task == "second" else ("w30", "w31")
    prompts = texts(count, seed, length=2)
    return [
        {"prompt": f"{WORDS[task]} {text}", "completion": answers[int(text.split()[-1][1:]) // 40]} for text in prompts
    ]


def _train(base: Path, rows: list[dict[str, str]]) -> LlamaForCausalLM:
    network, tokenizer = LlamaForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokens = torch.tensor([tokenizer(f"{row['prompt']} {row['completion']} </s>")["input_ids"] for row in rows])
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(80):
        logits = network(tokens).logits[:, -3:-1]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -2:].flatten()).backward()
        optimizer.step()
    return network


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_whole_protocol_on_a_tiny_llama(llm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = causal(tmp_path).base
    listed: dict[str, Any] = {"base": "base", "full": {}, "tasks": {}}
    for number, task in enumerate(WORDS):
        files = {"valid": f"{task}-valid.jsonl", "test": f"{task}-test.jsonl"}
        for seed, file in enumerate(files.values()):
            rows = _rows(task, 40, 10 * number + seed)
            (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        _train(base, _rows(task, 60, 10 * number + 7)).save_pretrained(tmp_path / task)
        listed["full"][task] = task
        listed["tasks"][task] = files
    (tmp_path / "tasks.json").write_text(json.dumps(listed))

    arguments = ["--local", str(tmp_path), "--methods", "ties", "tsv", "--device", "cpu", "--work", str(tmp_path / "w")]
    found = llm.main(arguments)
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"base", "individual", "task arithmetic", "ties", "tsv"}
    assert rows["individual"]["accuracy"] > rows["base"]["accuracy"] + 40
    assert all(rows[title]["accuracy"] > rows["base"]["accuracy"] + 10 for title in ("task arithmetic", "tsv"))
    assert "| tsv " in capsys.readouterr().out

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*.safetensors")}
    again = llm.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*.safetensors")} == kept
    assert [row["tasks"] for row in again["rows"]] == [row["tasks"] for row in found["rows"]]
