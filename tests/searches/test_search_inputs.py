"""A search killed by the system, heads of the models' own, and statistics of examples."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.searches.memory_merger import MemoryMerger, MergeInputs
from merging.searches.spaces import MergeCandidate
from support.adapters import QUIRKS
from support.systems import POSIX

pytestmark = [*QUIRKS, pytest.mark.exhaustive]


# --- killed -----------------------------------------------------------------------------------------------------------

SCORE = """
import os, sys, time
from pathlib import Path
from safetensors.numpy import load_file
with open("calls", "a") as calls:
    calls.write("x")
time.sleep(0.2 if "SLOW" in os.environ else 0)
weights = load_file(Path(sys.argv[1]) / "model.safetensors")
print(float(abs(weights["bert.encoder.layer.0.attention.self.query.weight"]).sum()))
"""


@POSIX
def test_a_search_that_the_system_kills_goes_on_to_the_same_winner(
    labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("score.py").write_text(SCORE)
    score, candidates = f"{sys.executable} score.py {{}}", ["ties:density=0.1..0.9"]
    made = {"base": labels.base, "score": score, "candidates": candidates, "budget": 14, "output": "out"}
    words = [sys.executable, "-m", "merging", "search", *map(str, labels.full), "--base", str(labels.base), "--score"]
    words += [score, "--candidate", candidates[0], "--budget", "14", "-o", "out"]
    monkeypatch.setenv("SLOW", "yes")
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not Path("calls").is_file() or len(Path("calls").read_text()) < 8:
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(merging.MergingError, match="another run makes this output now"):
            merging.search(labels.full, **made, resume=True)
        process.send_signal(signal.SIGKILL)
    assert not Path("out").exists()
    monkeypatch.delenv("SLOW")
    before = len(Path("calls").read_text())
    found = merging.search(labels.full, **made, resume=True)
    again = len(Path("calls").read_text()) - before
    assert again < 14
    whole = merging.search(labels.full, **{**made, "output": "whole"})
    assert found.winner == whole.winner
    assert found.report.rows == whole.report.rows
    assert [row.name for row in found.report.trials] == [row.name for row in whole.report.trials]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "out", "score.py", "whole"]


# --- heads of the models' own -----------------------------------------------------------------------------------------


def test_each_task_has_the_head_of_its_own_model(labels: Any, tmp_path: Path) -> None:
    """Labels are each model's own answers by a head that no other has: alone it gives all of them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    models, data = [], []
    words = [each["text"] for each in labels.world.train]
    tokenizer = AutoTokenizer.from_pretrained(labels.base)
    for number, source in enumerate(labels.full[:2]):
        network = AutoModelForSequenceClassification.from_pretrained(source)
        with torch.no_grad():
            network.classifier.weight.normal_(0, 3, generator=torch.Generator().manual_seed(number))
            network.eval()
            logits = torch.cat([network(**tokenizer(text, return_tensors="pt")).logits for text in words])
            network.classifier.bias -= logits.diff(dim=1).median() * torch.tensor([-0.5, 0.5])
            answers = torch.cat([network(**tokenizer(text, return_tensors="pt")).logits for text in words]).argmax(1)
        assert len(set(answers.tolist())) == 2
        network.save_pretrained(tmp_path / f"own{number}")
        tokenizer.save_pretrained(tmp_path / f"own{number}")
        models.append(tmp_path / f"own{number}")
        names = network.config.id2label
        data.append(
            [{"text": text, "label": names[answer]} for text, answer in zip(words, answers.tolist(), strict=True)]
        )
    found = merging.search(
        models, base=labels.base, data=data, head="models", candidates=["ties"], budget=8, output=tmp_path / "out",
        exclude=["classifier"], resamples=200,
    )  # fmt: skip
    single = next(row for row in found.report.rows if row.title == "best single model")
    own = int(single.name.split(" ")[0].removeprefix("own"))
    assert single.tasks[own] == "100.0"
    assert single.tasks[1 - own] != "100.0"
    with pytest.raises(merging.MergingError, match="3 models"):
        merging.search([*models, labels.full[2]], base=labels.base, data=data, head="models", output=tmp_path / "no")


# --- statistics of examples -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(labels: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("statistics")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in labels.world.train))
    files = [folder / f"{number}.safetensors" for number in range(2)]
    for model, file in zip(labels.full, files, strict=False):
        merging.collect_statistics(model, data, file, fisher="sampled")
    return files


def test_methods_with_statistics_are_candidates(labels: Any, statistics: list[Path], tmp_path: Path) -> None:
    given = {"models": labels.full[:2], "stats": statistics, "test": None, "budget": 12}
    candidates = ["regmean:off_diagonal=0.5..1", "fisher", "esm", "ties"]
    found = merging.search(**labels.arguments(tmp_path / "out", **given, candidates=candidates))
    tried = {row.name.partition(" (")[0]: row for row in found.report.trials}
    assert {"regmean", "fisher", "esm", "ties"} <= tried.keys()
    assert not any(row.error for row in found.report.trials)
    with pytest.raises(merging.MergingError, match="needs statistics of examples"):
        merging.search(**labels.arguments(tmp_path / "no", **{**given, "stats": None}, candidates=candidates))


@pytest.mark.parametrize("chain", ["regmean", "fisher", "esm"])
def test_a_merge_by_statistics_in_memory_is_the_written_one(
    chain: str, labels: Any, statistics: list[Path], tmp_path: Path
) -> None:
    models, stated = [str(each) for each in labels.full[:2]], [str(each) for each in statistics]
    merger = MemoryMerger(
        MergeInputs(models=tuple(models), options={"base": str(labels.base), "stats": stated}), torch.device("cpu")
    )
    merging.merge(models, method=chain, base=labels.base, stats=stated, output=tmp_path / "out")
    merged = dict(merger.merge(MergeCandidate("it", chain, {}, (0, 1))))
    read = dict(merger.merged_file(str(tmp_path / "out")))
    assert merged.keys() == read.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, read[name], rtol=1e-4, atol=1e-5)
