"""Compiled kernels have the bits of the torch formulas, and nothing that happens to them fails a merge."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import merging
from merging.engine.in_memory import TensorInputs, merge_in_memory
from merging.maths.delta import Stack
from merging.maths.kernels import switch
from merging.maths.site import Site
from merging.maths.stored_values import StoredValues

SHAPES = [(3, 5), (7,), (1,), (2, 1024), (3, 1500)]
Use = Callable[[str], list[str]]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TIES: list[dict[str, Any]] = [
    {"scope": "tensor", "density": 0.4},
    {"scope": "tensor", "density": (0.2, 1.0, 0.7), "weights": (0.3, 1.0, -0.5), "vote": "weighted", "scale": 0.7},
    {"density": 1.0, "zero": "plus", "normalize": False, "weights": (0.0, 2.0, 1 / 3)},
]
DROPPING: list[tuple[str, dict[str, Any]]] = [
    ("dare", {"drop": (0.9, 0.0, 1.0)}),
    ("dare+ties", {"drop": 0.4, "rescale": "l1", "scope": "tensor"}),
    ("della", {"density": 0.5, "rescale": "none"}),
    ("della+ties", {"della.density": (0.4, 0.5, 0.85), "rescale": "l1", "scope": "tensor", "seed": 3}),
    ("breadcrumbs", {"density": 0.5}),
    ("breadcrumbs", {"density": (0.3, 0.9, 0.6), "gamma": 0.2, "keep_norm": True}),
]
COMPETING: list[tuple[str, dict[str, Any]]] = [
    ("pcb", {}),
    ("pcb", {"scope": "tensor", "ratio": 0.5, "weights": (1.0, -0.5, 0.0), "scale": -0.7}),
    ("pcb", {"variant": "vision", "ratio": 0.3, "clip": 0.0}),
]
COMBINED: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weights": (0.3, 1.0, -0.5)}),
    ("task_arithmetic", {"weights": (1.0, 0.7, -0.5), "scale": 0.3}),
    ("karcher", {}),
    ("consensus", {"weights": (1.0, 0.7, -0.5), "scale": 0.3}),
    ("sce", {}),
    ("sce", {"select": "deltas", "density": 0.5, "scale": 0.7}),
]
CASES = [*(("ties", each) for each in TIES), *COMBINED]
FILES = [("ties", {}), ("ties", TIES[1]), *COMBINED, ("magmax", {}), *DROPPING, *COMPETING]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """Return a function that switches kernels on or off, and returns a list that receives the kernels that run."""
    ran: list[str] = []
    run = switch.run_kernel

    def watch(name: str, *arguments: Any) -> bool:
        done = run(name, *arguments)
        ran.extend([name] * done)
        return done

    def choose(choice: str) -> list[str]:
        monkeypatch.setenv(switch.SWITCH, choice)
        switch.switch_kernels(0)
        ran.clear()
        return ran

    steps = [
        f"kernels.{name}" for name in ("weighted_sums", "combine_steps", "competition_steps", "drop_steps", "steps")
    ]
    for module in ("key_ranges", *steps):
        monkeypatch.setattr(f"merging.maths.{module}.run_kernel", watch)
    yield choose
    choose("off")


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, special: bool = False) -> tuple[Tensor, Tensor]:
    """Return the values of three models, and of their base, with exact ties, zeros of both signs and denormals."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    values = base + torch.randn(3, *shape, generator=generator).mul_(0.1)
    flat = values.view(3, -1)
    size = flat.shape[1]
    for place, each in enumerate((0.0, -0.0, 1e-40, -3e-41, 6e-8, *((float("nan"), float("inf")) if special else ()))):
        flat[place % 3, (7 * place + 3) % size] = each
    flat[:, size // 2] = base.view(-1)[size // 2]
    base.view(-1)[size // 3] = 0.0
    return values.to(dtype), base.to(dtype)


def merge(chain: str, parameters: dict[str, Any], values: Tensor, base: Tensor | None) -> Tensor:
    """Merge one tensor from its stored values."""
    method = merging.chain(chain, parameters)
    site = Site("layers.0.mlp.weight", tuple(values.shape[1:]))
    origin = None if base is None else base.reshape(-1)

    def read(name: str) -> TensorInputs:
        def decode() -> Tensor:
            return values.float() if base is None else values.float() - base.float()

        n = len(values)
        stored = StoredValues(values.reshape(n, -1), origin, site.shape, decode)
        return TensorInputs(Stack.of_stored(stored, [f"model {i}" for i in range(n)], [True] * n), None)

    (merged,) = merge_in_memory(method, {site.name: site}, read, weights=method.merge_space == "weights")
    return merged.delta.dense()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether all numbers are the same, -0 and 0 apart; any NaN is NaN."""
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(
        one.masked_fill(nan, 0).view(torch.int32), other.masked_fill(nan, 0).view(torch.int32)
    )


def agree(use: Use, case: tuple[str, dict[str, Any]], values: Tensor, base: Tensor | None) -> bool:
    """Merge with kernels and without, and return whether the bits are the same."""
    use("off")
    expected = merge(*case, values, base)
    ran = use("on")
    found = merge(*case, values, base)
    assert ran, "no kernel ran"
    return same_bits(found, expected)


def test_bits_are_those_of_torch(use: Use) -> None:
    assert agree(use, CASES[2], *draw((3, 1500), torch.bfloat16, 0))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "case, dtype",
    [*((each, torch.float32) for each in CASES), *((CASES[i], each) for i in range(3) for each in DTYPES[:2])],
    ids=lambda value: str(value)[:60],
)
def test_bits_of_every_method_and_type(use: Use, case: Any, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        values, base = draw(shape, dtype, seed)
        assert agree(use, case, values, base)
        assert agree(use, case, values, None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [*DROPPING, *COMPETING], ids=lambda case: f"{case[0]}-{'-'.join(case[1])}")
def test_bits_of_draws_ranks_and_competition(use: Use, case: Any) -> None:
    """Compiled for one type, as all types share the decoding; also with many equal magnitudes in a row."""
    for seed, shape in enumerate(SHAPES):
        values, base = draw(shape, torch.bfloat16, seed)
        assert agree(use, case, values, base)
        near = (base.float() + (values.float() - base.float()) / 16).bfloat16()
        assert agree(use, case, near, base)
        assert agree(use, case, (values.float() * 4).round().bfloat16(), None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", [0, 3 << 20, (1 << 32) - 3000, (1 << 32) - 1000, (5 << 32) + 7])
def test_draws_at_any_position(use: Use, start: int) -> None:
    """Positions of 2**32 elements share a key; a block across the end of them is left to torch."""
    values, base = draw((3, 1500), torch.bfloat16, 5)
    site = Site("layers.0.mlp.weight", (3, 1500), start=start)
    for name, share in (("dare", {"drop": 0.3}), ("della", {"density": 0.4})):
        method = merging.chain(name, {**share, "rescale": "none"})
        merged = []
        for choice in ("off", "on"):
            ran = use(choice)
            decoded = values.float() - base.float()
            stored = StoredValues(values.reshape(3, -1), base.reshape(-1), site.shape, decoded.clone)
            merged.append(method.merge(Stack.of_stored(stored, list("abc"), [True] * 3), site, {}).dense())
        drew = any(each.startswith(("draws.", "ranks.")) for each in ran)
        assert drew == (start != (1 << 32) - 3000 and start != (1 << 32) - 1000)
        assert same_bits(*merged)


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", ["code", "vision"])
def test_scores_of_many_models(use: Use, variant: str) -> None:
    """From 40 models on exponents are shifted; a few products are large enough for a tanh of their own."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70_001, generator=generator).mul_(0.02).bfloat16()
    noise = torch.randn(41, 70_001, generator=generator).mul_(0.002)
    noise[:, ::1000] *= 100
    values = (base.float() + noise).bfloat16()
    for models in (2, 41):
        assert agree(use, ("pcb", {"variant": variant}), values[:models], base)


@pytest.mark.exhaustive
def test_bits_with_nan_and_infinities(use: Use) -> None:
    for dtype in DTYPES:
        assert agree(use, CASES[2], *draw((3, 1500), dtype, 1, special=True))


def files(folder: Path, dtype: torch.dtype) -> list[str]:
    """Write a base and three models, and return their paths, the base's first."""
    shapes = {"layers.0.mlp.weight": (40, 50), "layers.0.norm.weight": (33,), "scale": ()}
    tensors = {name: draw(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}
    for number, model in enumerate(("base", *"abc")):
        own = {name: base if model == "base" else values[number - 1] for name, (values, base) in tensors.items()}
        save_file({name: value.contiguous() for name, value in own.items()}, folder / f"{model}.safetensors")
    return [str(folder / f"{model}.safetensors") for model in ("base", *"abc")]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method, parameters", FILES, ids=str)
def test_files_have_the_same_bytes(use: Use, tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    """Through the decoding of tiles, sampling, and the encoding of the result."""
    base, *models = files(tmp_path, torch.bfloat16)
    needs_base = merging.chain(method, parameters).merge_space == "delta"
    options = {**parameters, "method": method, "threads": 1} | ({"base": base} if needs_base else {})
    outputs = []
    for choice in ("off", "on"):
        ran = use(choice)
        merging.merge(models, output=tmp_path / f"{choice}.safetensors", **options)
        assert bool(ran) == (choice == "on")
        outputs.append((tmp_path / f"{choice}.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


LOAD = """
import sys
from torch import empty, ones
from merging.maths.kernels.switch import run_kernel, switch_kernels
used = switch_kernels(int(sys.argv[1]))
print(used, run_kernel("tiles.find_extremes", ones(9), empty(1)), "numba" in sys.modules, "llvmlite" in sys.modules)
"""


def load_kernel(folder: Path, choice: str = "", nbytes: int = 1 << 30) -> str:
    """Run a kernel in a process, and return whether kernels are used, it ran, and numba and LLVM were imported."""
    environment = os.environ | {switch.SWITCH: choice, "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", LOAD, str(nbytes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.exhaustive
def test_only_compiling_imports_numba(tmp_path: Path) -> None:
    """Without kept code nothing is imported; with it, LLVM alone."""
    assert load_kernel(tmp_path) == "False False False False"
    assert load_kernel(tmp_path, "on") == "True True True True"
    assert load_kernel(tmp_path) == "True True False True"
    assert load_kernel(tmp_path, "off") == "False False False False"
    assert load_kernel(tmp_path, nbytes=1000) == "False False False False"


@pytest.mark.exhaustive
def test_damaged_code_on_the_disk_is_compiled_again(tmp_path: Path) -> None:
    assert load_kernel(tmp_path, "on") == "True True True True"
    (path,) = tmp_path.rglob("*.o")
    path.write_bytes(path.read_bytes()[:100])
    assert load_kernel(tmp_path) == "True False False True"
    assert load_kernel(tmp_path, "on") == "True True True True"
    assert load_kernel(tmp_path, "on") == "True True False True"


@pytest.mark.exhaustive
def test_a_folder_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert load_kernel(tmp_path / "file", "on") == "True True True True"
    assert load_kernel(tmp_path / "file") == "False False False False"
