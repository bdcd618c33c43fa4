"""PCB-Merging: all variants, in memory, from files and of trained adapters."""

from __future__ import annotations

import itertools
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import equal

from merging.methods.pcb import TANH_IS_LINEAR, tanh
from support import references
from support.changes import EXACT, F32, F64, LARGE, by_tensor, changes, close, merged, written
from support.on_models import trained, weighings
from support.references import flatten
from support.tiny import identical

variants = pytest.mark.parametrize("variant", ["code", "vision", "es", "paper"])


@variants
@weighings
def test_pcb(variant: str, weights: Any) -> None:
    """Bit for bit; the sums of `paper` round."""
    for seed, (ratio, clip) in enumerate([(0.1, 0.01), (0.37, 0.2), (1.0, 0.0), (0.05, 0.0001)]):
        models, options = changes(3, seed), {"variant": variant, "ratio": ratio, "clip": clip, **weights}
        whole = references.pcb(flatten(models), **options)
        alone = by_tensor(models, lambda part, options=options: references.pcb(flatten(part), **options))
        assert not close(whole, alone, 0.01)
        for scope, wanted in (("model", whole), ("tensor", alone)):
            got = merged(models, "pcb", scope=scope, **options)
            assert close(got, wanted, 1e-5) if variant == "paper" else equal(got, wanted)
    options = {"variant": variant, "weights": [0.7, 1.3, -0.4, 1, 1, 2, 0.1, 1]}
    assert close(merged(changes(8), "pcb", **options), references.pcb(flatten(changes(8)), **options))


@pytest.mark.parametrize(
    "variant",
    ["code", "paper", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("vision", "es"))],
)
@pytest.mark.parametrize("weights", [{}, pytest.param({"weights": EXACT}, marks=pytest.mark.exhaustive)])
def test_pcb_from_files_and_of_trained_adapters(variant: str, weights: Any, files: Any) -> None:
    """`paper` has near ties at the threshold, which sums in float32 decide as the processor rounds; ours are exact."""
    tau, real = flatten(files.changes), flatten(written(trained()))
    options = {"variant": variant, **weights}
    if variant != "paper":
        wanted = files.plus(references.pcb(tau, **options))
        assert all(identical(files.merge("pcb", threads=threads, **options), wanted) for threads in (1, 3))
        wanted = references.pcb(real[:3], **options)
        assert equal(merged(trained()[:3], "pcb", **options), wanted)
        assert equal(merged(written(trained()[:3]), "pcb", **options), wanted)
        return
    exact = files.plus(references.pcb(tau.double(), **options))
    for got in (files.merge("pcb", threads=threads, **options) for threads in (1, 3)):
        assert all(((got[name] - exact[name]).abs() > 1e-5).double().mean() < 1e-4 for name in LARGE)
    assert close(merged(written(trained()), "pcb", variant="paper"), references.pcb(real.double(), variant="paper"))


@variants
@pytest.mark.parametrize("kind", ["random", "zero", "constant", "equal", "opposite"])
def test_pcb_never_divides_by_zero(variant: str, kind: str) -> None:
    for count, ratio in itertools.product([1, 2, 3, 40], [0.1, 0.5]):
        one, other = (each["a"] for each in changes(2, count, F64, {"a": (count,)}))
        kinds = {"random": other, "zero": 0 * one, "constant": other.sign() / 4, "equal": one, "opposite": -one}
        for models in ([one, kinds[kind]], [kinds[kind]] * 2, [kinds[kind]]):
            got = merged([{"a": each} for each in models], "pcb", variant=variant, ratio=ratio)
            assert got.isfinite().all()
            assert close(got, references.pcb(torch.stack(models), ratio, variant=variant), 1e-9)


@pytest.mark.parametrize("variant", ["code", "vision", "es"])
def test_pcb_keeps_the_clipped_change_of_one_model_at_its_strongest(variant: str) -> None:
    (one,) = changes(1, 3, F64, {"a": (1001,)})
    order = one["a"].abs().argsort()
    clipped = one["a"].sign() * one["a"].abs().clamp(one["a"].abs()[order[10]], one["a"].abs()[order[989]])
    for ratio in (0.05, 0.1, 0.333):
        got, strongest = merged([one], "pcb", variant=variant, ratio=ratio), order[int(1001 * (1 - ratio)) + 1 :]
        assert sorted(got.nonzero().flatten().tolist()) == sorted(strongest.tolist())  # the threshold itself scores 0
        assert close(got[strongest], 1.2 * clipped[strongest], 1e-12)
    for count in (39, 40, 50, 100):
        many = changes(count, 0, F64, {"a": (40, 5)})
        assert close(merged(many, "pcb", variant=variant), references.pcb(flatten(many), variant=variant), 1e-9)
        small = merged(changes(count, 0, F32, {"a": (40, 5)}), "pcb", variant=variant)
        assert small.isfinite().all() and small.any()


@pytest.mark.parametrize("largest", [1e-5, 2.0**-13, 1e-3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_computed_where_it_is_not_the_number_itself(largest, dtype):
    values = torch.linspace(-largest, largest, 10_007, dtype=dtype)
    values[5000:5010] = torch.tensor([3.0, -2.0, 0.0, -0.0, 1e-40, inf, -inf, nan, 2.0**-13, 1e-4])
    wanted = values.tanh()
    assert torch.equal(tanh(values.clone()).nan_to_num(7), wanted.nan_to_num(7))
    few = torch.full((10_007,), 1e-5, dtype=dtype)
    few[[3, 17, 10_006]] = torch.tensor([0.5, -1.0, 2e-3], dtype=dtype)
    assert torch.equal(tanh(few.clone()), few.tanh())


@pytest.mark.exhaustive
def test_tanh_of_small_numbers_is_the_number():
    last = int(torch.tensor(TANH_IS_LINEAR).view(torch.int32))
    for start in range(0, last + 1, 1 << 22):
        values = torch.arange(start, min(last + 1, start + (1 << 22)), dtype=torch.int32).view(torch.float32)
        assert torch.equal(values.tanh(), values)
        assert torch.equal((-values).tanh(), -values)
