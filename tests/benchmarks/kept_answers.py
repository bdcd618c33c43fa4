"""Answers of models to test examples, kept in files that are named for the content that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Right", "Weights", "digest", "remembered"]

Weights = dict[str, Tensor]
Right = dict[str, Tensor]  # of each task: for each text, 1 where the answer is right (a mean over orders, if several)


def digest(parts: Iterable[str | Tensor]) -> str:
    """A name for texts and tensors that changes with any of them."""
    found = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode() + b"\0")
        else:
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def remembered(path: Path, make: Callable[[], Weights]) -> Weights:
    """What is in the file, or else what `make` gives, which is kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({name: tensor.detach().contiguous() for name, tensor in make().items()}, part)
        part.rename(path)
    return load_file(path)
