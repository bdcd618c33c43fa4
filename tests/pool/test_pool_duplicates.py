"""Duplicates of a pool: sketches suspect pairs, and the exact cosine of their changes decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merging.pool import Pool
from merging.pool.candidates import candidates_in

WIDTH, RANK = 48, 4
MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv"]

Factors = dict[str, tuple[Tensor, Tensor]]


def factors(seed: int) -> Factors:
    """The upper and lower factors of an adapter of its own."""
    random = torch.Generator().manual_seed(seed)
    sizes = (WIDTH, RANK), (RANK, WIDTH)
    return {name: tuple(0.05 * torch.randn(size, generator=random) for size in sizes) for name in MODULES}  # type: ignore[misc]


def turned(changes: Factors) -> Factors:
    """The same change in other factors."""
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(1)))[0]
    return {name: (up @ turn, turn.T @ down) for name, (up, down) in changes.items()}


def wider(changes: Factors) -> Factors:
    """The same change at a higher rank."""
    return {
        name: (torch.cat([up, up, -up], 1), torch.cat([down / 2, down, down / 2]))
        for name, (up, down) in changes.items()
    }


def scaled(factor: float) -> Callable[[Factors], Factors]:
    return lambda changes: {name: (factor * up, down) for name, (up, down) in changes.items()}


def moved(share: float) -> Callable[[Factors], Factors]:
    """A change of another direction, at a cosine of about ``1 - share ** 2 / 2``."""

    def move(changes: Factors) -> Factors:
        random = torch.Generator().manual_seed(2)
        return {
            name: (up + share * 0.05 * torch.randn(up.shape, generator=random), down)
            for name, (up, down) in changes.items()
        }

    return move


def without_one_module(changes: Factors) -> Factors:
    return {name: value for name, value in changes.items() if name != MODULES[0]}


SAME = {"turned": turned, "wider": wider, "stronger": scaled(3), "opposite": scaled(-1), "nearly": moved(0.003)}
"""Changes that are the same up to scale, or at a cosine above 0.9999."""

OTHERS = {"close": moved(0.03), "less close": moved(0.1), "part": without_one_module}
"""Changes at cosines of 0.9996, 0.995 and 0.91, which are not the same."""


def write(folder: Path, changes: Factors, dtype: torch.dtype = torch.float32) -> None:
    rank = next(iter(changes.values()))[0].shape[1]
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": value.to(dtype).contiguous()
        for name, (up, down) in changes.items()
        for letter, value in (("A", down), ("B", up))
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in changes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("count", [3, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_all_duplicates_are_found_and_nothing_else(tmp_path: Path, count: int) -> None:
    """Each of some adapters with all its repeats, and changes that are close to it."""
    base = tmp_path / "base"
    base.mkdir()
    random = torch.Generator().manual_seed(0)
    save_file(
        {f"{name}.weight": torch.randn(WIDTH, WIDTH, generator=random) for name in MODULES}, base / "model.safetensors"
    )
    (base / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2})
    )
    repeats = list(SAME.items())
    wanted = set()
    for seed in range(count):
        made = factors(10 + seed)
        write(tmp_path / "in" / f"{seed:03} original", made)
        for name, change in repeats if count > 3 else repeats[2 * seed : 2 * seed + 2]:
            write(tmp_path / "in" / f"{seed:03} repeat {name}", change(made))
            wanted.add(f"{seed:03} repeat {name}")
        name, change = list(OTHERS.items())[seed % len(OTHERS)]
        write(tmp_path / "in" / f"{seed:03} other {name}", change(made))
    pool = Pool.create(tmp_path / "pool", base)
    pool.build(candidates_in(tmp_path / "in"))
    found = {
        Path(entry.name).name
        for entry in pool.index.entries()
        if any(finding.stage == "duplicates" for finding in entry.findings)
    }
    assert found == wanted
