"""Every method against its naive reference: on random, degenerate and trained changes, in memory and from files."""

from __future__ import annotations

import itertools
import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, equal

import merging
from merging.maths.delta import LowRank
from merging.maths.randomness import kept
from support import references
from support.changes import (
    CPU,
    EXACT,
    F32,
    F64,
    LARGE,
    SHAPES,
    Q,
    by_tensor,
    changes,
    close,
    merged,
    written,
)
from support.paths import SHIPPED
from support.references import GOLDEN, flatten, golden_adapters, unflatten
from support.tiny import identical, load, save

weighings = pytest.mark.parametrize("weights", [{}, {"weights": EXACT}], ids=["plain", "weighted"])
variants = pytest.mark.parametrize("variant", ["code", "vision", "es", "paper"])
modes = pytest.mark.parametrize("mode", ["block", "two_sided"])


@cache
def trained() -> Any:
    """One layer of the shipped adapters: 295,000 numbers each when written out."""
    adapters = []
    for folder in SHIPPED:
        state = load_file(folder / "adapter_model.safetensors")
        deltas = merging.peft_deltas(state, json.loads((folder / "adapter_config.json").read_text())).items()
        adapters.append({name: delta for name, delta in deltas if ".layer.3." in name})
    assert (len(adapters), len(adapters[0])) == (4, 2)
    return adapters


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three models of a base in files, one tensor of more than a tile; their changes, and how to merge them."""
    folder, count = tmp_path_factory.mktemp("files"), itertools.count()
    base = changes(1, 9, shapes=LARGE)[0]
    tuned = [{name: base[name] + each[name] for name in LARGE} for each in changes(3, shapes=LARGE)]
    taus = [{name: each[name] - base[name] for name in LARGE} for each in tuned]
    paths = [save(folder / f"tuned{i}", each, shards=1 + i % 2) for i, each in enumerate(tuned)]
    origin = save(folder / "base", base)

    def merge(method: str, **options: Any) -> Any:
        output = folder / f"out{next(count)}"
        merging.merge(paths, method=method, base=origin, output=output, **options)
        return load(output)

    def plus(change: Tensor) -> Any:
        return {name: base[name] + value for name, value in unflatten(change, base).items()}

    return SimpleNamespace(base=base, changes=taus, paths=paths, origin=origin, merge=merge, plus=plus)


# ---- PCB


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


@variants
@weighings
def test_pcb_from_files_and_of_trained_adapters(variant: str, weights: Any, files: Any) -> None:
    """`paper` has near ties at the threshold, which sums in float32 decide as the processor rounds; ours are exact."""
    tau, real = flatten(files.changes), flatten(written(trained()))
    options = {"variant": variant, **weights} if weights == {} else {"variant": variant, "weights": EXACT}
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


# ---- TIES, MagMax, Consensus, golden numbers


def coarse(models: Any) -> Any:
    return [{name: (value * 8).bfloat16().to(value) for name, value in each.items()} for each in models]


def cancelling(models: Any) -> Any:
    """Most entries of the first two models cancel out where the third has nothing, and the others are negative."""
    first, second, third = ({name: value.flatten().clone() for name, value in each.items()} for each in models)
    for name, value in first.items():
        value[::5].abs_().neg_()
        second[name] = -value
        second[name][::5], third[name][1::2] = value[::5], 0.0
    return [{name: value.view(SHAPES[name]) for name, value in each.items()} for each in (first, second, third)]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0, (0.2, 1.0, 0.5)])
@pytest.mark.parametrize("weights", [None, EXACT, (-1.0, -1.0, 0.5), (0.25, 0.0, 0.25)])
@pytest.mark.parametrize("kind", [list, coarse, cancelling])
def test_ties(density: Any, weights: Any, kind: Any) -> None:
    models, seen = kind(changes(3, 2)), []
    for vote, normalize, zero in itertools.product(["plain", "weighted"], [True, False], ["majority", "plus"]):
        options: Any = {"vote": vote, "zero": zero, "normalize": normalize, "density": density}
        options |= {} if weights is None else {"weights": weights}
        seen.append(references.ties(flatten(models), **options))
        assert equal(merged(models, "ties", **options), seen[-1])
        alone = by_tensor(models, lambda part, options=options: references.ties(flatten(part), **options))
        assert equal(merged(models, "ties", scope="tensor", **options), alone)
    assert kind is not cancelling or weights is not None or not equal(seen[0], seen[1])
    options = {"weights": (0.7, 1.3, -0.4), "scale": 0.3, "density": density}
    assert close(merged(models, "ties", **options), references.ties(flatten(models), **options))


@pytest.mark.parametrize("weight", [0.3, 0.7])
def test_equal_votes_cancel_out(weight: float) -> None:
    """w x and w (-x) add up to 0, not to what rounding leaves."""
    models: Any = [changes(1)[0], {name: -value for name, value in changes(1)[0].items()}]
    options: Any = {"density": 1.0, "vote": "weighted", "weights": (weight, weight)}
    assert close(merged(models, "ties", **options), references.ties(flatten(models), **options))


@weighings
def test_ties_from_files_and_of_trained_adapters(weights: Any, files: Any) -> None:
    wanted = files.plus(references.ties(flatten(files.changes), (0.2, 0.1, 0.6), **weights))
    for threads in (1, 3):
        assert identical(files.merge("ties", threads=threads, density=(0.2, 0.1, 0.6), **weights), wanted)
    real = trained()[:3]
    for density, adapters in itertools.product([0.2, 1.0], [real, written(real)]):
        wanted = references.ties(flatten(written(real)), density, **weights)
        assert equal(merged(adapters, "ties", density=density, **weights), wanted)


def test_ties_ranks_doubles_as_doubles() -> None:
    values = 1 + torch.randperm(1000, generator=torch.Generator().manual_seed(0)) * torch.tensor(1e-13, dtype=F64)
    wanted = torch.where(values >= values.sort().values[700], values, 0)
    assert equal(merged([{"a": values}], "ties", density=0.3), wanted)


@pytest.mark.parametrize("weights", [{}, {"weights": (1.0, 0.7, -0.4, 1.3, 0.0)}])
def test_magmax_and_consensus(weights: Any) -> None:
    for models in (changes(5, 1), coarse(changes(5, 1)), changes(5, 1, F64)):
        models[1] = {name: -value for name, value in models[0].items()}
        wanted = references.magmax(flatten(models), scale=0.5, **weights)
        got = merged(models, "magmax", scale=0.5, **weights)
        assert close(got, wanted) if got.dtype == F64 else equal(got, wanted)
    for threshold, agree in itertools.product([0.2, 0.4, 1.0], [1, 2, 4]):
        options: Any = {"threshold": threshold, "agree": agree, "scale": 0.3, **weights}
        wanted = references.consensus(flatten(models), **options)
        assert agree == 4 or wanted.any()
        assert close(merged(models, "consensus", **options), wanted)


@pytest.mark.parametrize("method", ["magmax", "consensus", "pcb", "dare-inverse", "dare-l1"])
def test_coefficients_of_doubles_are_doubles(method: str) -> None:
    models, (name, _, rescale) = changes(2, 1, F64), method.partition("-")
    if name == "dare":
        wanted = thinned(models, 0.9, rescale, 0, "ab").sum(0)
        assert close(merged(models, name, drop=0.9, rescale=rescale, keys="ab"), wanted, 1e-12)
    else:
        wanted = getattr(references, name)(flatten(models), weights=(0.7, 1.3))
        assert close(merged(models, name, weights=(0.7, 1.3)), wanted, 1e-12)


GOLD: Any = {"D_0": ([0], "linear", {}), "D_1": ([1], "task_arithmetic", {}), "D_2": ([2], "do", {})}
GOLD |= {"mean": ([0, 1, 2], "linear", {}), "TIES keep 1": ([0, 1, 2], "ties", {"density": 1.0})}
GOLD |= {"TIES keep 0.2": ([0, 1, 2], "ties", {})}
GOLD |= {"same w on deltas": ([0, 1, 2], "task_arithmetic", {"weights": (0.5, -0.3, 0.8)})}


@pytest.mark.parametrize("row", GOLD)
def test_golden(row: str) -> None:
    which, method, options = GOLD[row]
    adapters = [{Q: LowRank(*golden_adapters()[i], (6, 5))} for i in which]
    for inputs in (adapters, written(adapters)):
        got = merged(inputs, method, **options)
        assert [float(x) for x in (got.norm(), got.sum(), got[0], got[-1])] == pytest.approx(GOLDEN[row], abs=6e-7)


# ---- DARE


def thinned(models: Any, drop: float, rescale: Any, seed: int, keys: Any) -> Tensor:
    """The reference, tensor by tensor, with the masks that belong to these places: ``[n, d]``."""

    def one(part: Any) -> Tensor:
        tau, (name,) = flatten(part), part[0]
        mask = torch.stack([kept(1 - drop, 0, tau.shape[1], CPU, seed, key, name) for key in keys])
        return references.dare(tau, mask, drop, rescale)

    return by_tensor(models, one)


@pytest.mark.parametrize("start", [0, 12345, 2**31 - 50, 2**32 - 50, 5 * 2**32 - 50, 2**45 + 1])
def test_masks_do_not_depend_on_the_cut(start: int) -> None:
    whole = kept(0.3, start, 1000, CPU, 0, "model", "tensor")
    for cuts in ([50], [49, 51], [1, 2, 3, 500], [999]):
        edges = itertools.pairwise([0, *cuts, 1000])
        assert equal(torch.cat([kept(0.3, start + a, b - a, CPU, 0, "model", "tensor") for a, b in edges]), whole)
    assert not equal(kept(0.3, start + 2**32, 1000, CPU, 0, "model", "tensor"), whole)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_masks_keep_their_share_and_are_independent(share: float) -> None:
    count = 1 << 18
    places = [*itertools.product([0, 1], ["a", "b"], ["x", "x1"]), (0, "", "ax"), (-1, "a", "x")]
    drawn = [kept(share, 0, count, CPU, *place) for place in places] + [kept(share, 2**32, count, CPU, *places[0])]
    x = (torch.stack(drawn).double() - share) / (share * (1 - share)) ** 0.5
    assert float(x.sum(1).abs().max()) < 5 * count**0.5
    assert float(x.view(len(x), 64, -1).sum(-1).abs().max()) < 6 * (count / 64) ** 0.5
    assert float((x @ x.T / count).fill_diagonal_(0).abs().max()) < 5 / count**0.5
    for lag in [*range(1, 65), 127, 128, 255, 256, 768, 1000, 1024, 4096, 65535, 65536, 1 << 17]:
        assert float((x[:, lag:] * x[:, :-lag]).mean(1).abs().max()) < 5 / (count - lag) ** 0.5


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare(rescale: str) -> None:
    for drop, dtype in itertools.product([0.0, 0.5, 0.75], [F32, F64]):
        models, within = changes(3, 4, dtype), 1e-6 if dtype == F32 or rescale == "l1" else 1e-12
        options: Any = {"drop": drop, "rescale": rescale, "seed": 7, "keys": "abc"}
        tau, got = thinned(models, drop, rescale, 7, "abc"), merged(models, "dare", **options)
        assert close(got, tau[0] + tau[1] + tau[2], within)
        assert equal(merged([dict(reversed(each.items())) for each in models], "dare", **options), got)
        assert close(merged(models[::-1], "dare", **options | {"keys": "cba"}), got, within)
        for other in ({"seed": 1}, {"keys": "abd"}):
            assert close(merged(models, "dare", **options | other), got) == (drop == 0)
        assert close(merged(models, "dare+ties", **options), references.ties(tau), within)


def test_dare_from_files(files: Any) -> None:
    tau = thinned(
        files.changes, 0.75, "inverse", 3, merging.preview(files.paths, method="dare", base=files.origin).keys
    )
    for method, wanted in (("dare", tau[0] + tau[1] + tau[2]), ("dare+ties", references.ties(tau))):
        for options in ({"threads": 1}, {"threads": 3, "shard_size": 3000}):
            assert identical(files.merge(method, drop=0.75, seed=3, **options), files.plus(wanted))
