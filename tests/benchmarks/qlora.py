"""QLoRA baked in three ways: the loss of each model on held-out text, next to the adapter on its quantised base.

    python tests/benchmarks/qlora.py

A small causal language model of characters is trained on source code of torch. Its linear weights are rounded as
bitsandbytes quantises them, and a LoRA is trained on the rounded base with another kind of text. The adapter is then
baked into the plain base, and as trained; both are also quantised again.
"""

from __future__ import annotations

import argparse
import inspect
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from speed import table
from transformers import LlamaConfig, LlamaForCausalLM

import merging

LENGTH, BATCH = 64, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, Any] = {
    "nf4": "nf4",
    "nf4, blocks of 4096": {"format": "nf4", "block_size": 4096, "double_quant": False},
    "fp4, blocks of 4096": {"format": "fp4", "block_size": 4096},
    "int8": "int8",
}


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Characters of two kinds of text, as numbers below 128: source code of torch, and comments of transformers."""
    code = "".join(inspect.getsource(module) for module in (torch.nn.functional, torch.serialization))
    notes = "".join(
        inspect.getdoc(getattr(transformers, name)) or ""
        for name in sorted(dir(transformers))
        if name.endswith("Config")
    )
    return as_numbers(code), as_numbers(notes)


def as_numbers(text: str) -> torch.Tensor:
    return torch.tensor([min(ord(each), 127) for each in text[:600_000]])


def batches(text: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=random)
        yield torch.stack([text[start : start + LENGTH] for start in starts])


def train(model: torch.nn.Module, text: torch.Tensor, steps: int, rate: float, seed: int) -> None:
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for batch in batches(text, steps, seed):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def losses(model: torch.nn.Module, text: torch.Tensor, count: int = 16) -> torch.Tensor:
    """The loss of each of the same batches, in nats a character."""
    return torch.stack([model(input_ids=batch, labels=batch).loss for batch in batches(text, count, seed=99)])


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rounded(folder: Path, empty: Path, settings: Any) -> LlamaForCausalLM:
    """A model with its linear weights rounded: what bakes an adapter that changes nothing."""
    merging.bake(
        [empty], base=folder, output=folder.parent / "rounded", as_trained=settings, dtype="float32", overwrite=True
    )
    return load(folder.parent / "rounded")


def compare(folder: Path, name: str, notes: tuple[torch.Tensor, torch.Tensor], steps: int, rank: int) -> list[str]:
    """Train a LoRA on the base rounded in one way, and return a row of the table."""
    base, settings, (training, held_out) = folder / "base", SETTINGS[name], notes
    torch.manual_seed(1)
    quantized = rounded(base, folder / "empty", settings)
    before = losses(quantized, held_out)
    lora = get_peft_model(quantized, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    train(lora, training, steps, rate=2e-3, seed=3)
    lora.save_pretrained(folder / "lora")
    reference = losses(lora, held_out)
    found = {"before": before}
    for way, options in {"plain": {}, "as trained": {"as_trained": settings}}.items():
        merging.bake([folder / "lora"], base=base, output=folder / way, overwrite=True, **options)
        found[way] = losses(load(folder / way), held_out)
        found[f"{way}, again"] = losses(rounded(folder / way, folder / "empty", settings), held_out)
    cells = [name, f"{float(before.mean()):.4f}", f"{float(reference.mean()):.4f}"]
    for way in ("plain", "as trained", "plain, again", "as trained, again"):
        difference = found[way] - reference
        error = float(difference.std()) / math.sqrt(len(difference))
        cells.append(f"{float(difference.mean()):+.4f} ± {error:.4f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of training the base; a LoRA has half of them")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    code, notes = texts()
    cut = len(notes) * 3 // 4
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
        model = LlamaForCausalLM(config)
        train(model, code, args.steps, rate=2e-3, seed=2)
        model.bfloat16().save_pretrained(folder / "base")
        model = get_peft_model(load(folder / "base"), LoraConfig(r=1, target_modules=["q_proj"]))
        model.save_pretrained(folder / "empty")  # its upper factors are zeros
        rows = [compare(folder, name, (notes[:cut], notes[cut:]), args.steps // 2, args.rank) for name in SETTINGS]
    heads = [
        "base quantised to",
        "before",
        "LoRA on it",
        "plain",
        "as trained",
        "plain, quantised",
        "as trained, quantised",
    ]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
