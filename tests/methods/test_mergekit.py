"""Agreement with mergekit, which runs in its own environment: MERGEKIT_PYTHON names its Python (tests/peer).

Three comparisons, in rising order of strictness about rounding:

- float64 on both sides: the formulas are the same;
- float32 on both sides: the arithmetic is as good;
- bfloat16 files: our output is the float64 result rounded once, which mergekit's own bfloat16 output is not.

Where mergekit is wrong or arbitrary, a test shows it, and that ours follows the formula.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merging
from support import references
from support.mergekit_cases import (
    CASES,
    DEEP,
    PLACES,
    THINNED,
    WIDE,
    Case,
    Place,
    configuration,
    load,
    save,
    save_thinned,
)
from support.paths import TESTS

PEER = os.environ.get("MERGEKIT_PYTHON")
RUNNER = TESTS / "peer" / "mergekit_runner.py"

pytestmark = pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python that has mergekit")

OWN_BF16 = ("arithmetic-2", "arithmetic-3")  # cases of which the peer's own bfloat16 output is looked at


@dataclass(frozen=True)
class Mistake:
    """A merge that shows what the peer gets wrong."""

    method: str
    models: tuple[str, ...]
    base: str | None = "base"
    parameters: tuple[tuple[str, Any], ...] = ()
    weights: tuple[Any, ...] | None = None
    place: Place = PLACES[0]
    stored: str = "float32"
    dtype: str = "float64"

    def config(self, folder: Path) -> dict[str, Any]:
        """The peer's configuration."""
        parameters = dict(self.parameters)
        return configuration(folder, self.method, self.models, self.base, parameters, self.weights, self.dtype)


SMALL = ("small-a", "small-b")
ALONE = Mistake("dare_linear", ("a",), parameters=(("density", 0.5),), weights=(1.0,))
WIDE_MEAN = Mistake("multislerp", ("base", "a"), base=None, weights=(0.5, 0.5), place=WIDE)
MISTAKES = {
    "karcher": Mistake("karcher", ("a", "b")),
    "linear": Mistake("linear", ("a", "b"), parameters=(("weight", 1.0),)),
    "gradient": Mistake("linear", ("a", "b"), base=None, weights=("1:0", "0:1"), place=DEEP),
    "small sce": Mistake("sce", SMALL),
    "small ram": Mistake("ram", SMALL),
    "small model_stock": Mistake("model_stock", SMALL),
    "small nearswap": Mistake("nearswap", SMALL[:1], parameters=(("t", 5e-7),)),
    "small nuslerp": Mistake("nuslerp", ("a", "other"), base=None, weights=(1e-7, 3e-7)),
    "bf16 ramplus_tl": Mistake("ramplus_tl", ("a", "b"), stored="bfloat16", dtype="bfloat16"),
    "bf16 arcee_fusion": Mistake("arcee_fusion", ("base", "a"), stored="bfloat16", dtype="bfloat16"),
    "wide arcee_fusion": Mistake("arcee_fusion", ("base", "a"), place=WIDE),
    "wide arcee_fusion again": Mistake("arcee_fusion", ("base", "a"), place=WIDE),
    "wide multislerp": WIDE_MEAN,
    "wide multislerp in float32": replace(WIDE_MEAN, dtype="float32"),
    "dare": ALONE,
    "dare again": ALONE,
    "della": Mistake("della_linear", ("a",), parameters=(("density", 0.5), ("epsilon", 0.3)), weights=(1.0,)),
}


@dataclass(frozen=True)
class Peer:
    """Where the checkpoints and mergekit's merges of them lie."""

    root: Path

    def inputs(self, place: Place, stored: str) -> Path:
        """The folder of the checkpoints of one family and seed, in the precision they are stored in."""
        return self.root / "models" / "-".join(map(str, place)) / stored

    def output(self, place: Place, stored: str, case: str, dtype: str) -> Path:
        """The peer's merge of them at a precision."""
        return self.root / "peer" / "-".join([*map(str, place), stored, case.replace(" ", "-"), dtype])

    def mistake(self, name: str) -> dict[str, Tensor]:
        """One of the peer's mistakes."""
        mistake = MISTAKES[name]
        return load(self.output(mistake.place, mistake.stored, f"wrong {name}", mistake.dtype))

    def jobs(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every merge that is asked of the peer: where it goes, and its configuration."""
        for name, case in CASES.items():
            wanted = [("float32", "float64")]
            if case.float32 is not None:
                wanted.append(("float32", "float32"))
            if case.exact:
                wanted.append(("bfloat16", "float64"))
            if name in OWN_BF16:
                wanted.append(("bfloat16", "bfloat16"))
            for place in case.places:
                for stored, dtype in wanted:
                    yield self.output(place, stored, name, dtype), case.config(self.inputs(place, stored), dtype)
        for name, mistake in MISTAKES.items():
            config = mistake.config(self.inputs(mistake.place, mistake.stored))
            yield self.output(mistake.place, mistake.stored, f"wrong {name}", mistake.dtype), config


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """All checkpoints, and all of mergekit's merges in one process, since it takes seconds to start."""
    result = Peer(tmp_path_factory.mktemp("mergekit"))
    for place in (*PLACES, DEEP):
        save(place, result.inputs(place, "float32").parent)
    for place in PLACES:
        save_thinned(result.inputs(place, "float32"))
    save(WIDE, result.inputs(WIDE, "float32").parent, ("base", "a"))
    arguments = []
    for output, config in result.jobs():
        file = result.root / f"{output.name}.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        arguments += [str(file), str(output)]
    # Its choices between inputs depend on the hash seed unless it is set.
    environment = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    command = [str(PEER), str(RUNNER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert not [merge for merge in json.loads(done.stdout) if merge["error"]]
    return result


RUNS = [(*place, name) for name, case in CASES.items() for place in case.places]
COMPARED = [
    (*run, dtype) for run in RUNS for dtype in ("float64", "float32") if getattr(CASES[run[-1]], dtype) is not None
]


@pytest.mark.parametrize(("family", "seed", "case", "dtype"), COMPARED)
def test_same_result(peer: Peer, tmp_path: Path, family: str, seed: int, case: str, dtype: str) -> None:
    """Computed in float64 and in float32, the two tools agree to rounding in every element of every tensor.

    Of the entries whose change is exactly the threshold the peer keeps an arbitrary part, and we keep all.
    """
    place = family, seed
    folder = peer.inputs(place, "float32")
    ours = CASES[case].ours(folder, tmp_path / "merged", dtype)
    undecided = CASES[case].undecided(folder)
    theirs = load(peer.output(place, "float32", case, dtype))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == getattr(torch, dtype)
        difference = (ours[name].double() - value.double()).abs()
        assert difference[~undecided[name]].max() <= getattr(CASES[case], dtype), name
    assert sum(int(mask.sum()) for mask in undecided.values()) <= len(undecided)


@dataclass
class Rounding:
    """How a bfloat16 output compares with the float64 result rounded once, counted over all elements."""

    elements: int = 0
    different: int = 0  # from the rounded float64 result
    wrong: int = 0  # of those, the ones that do not come from a rounding midpoint

    def add(self, got: Tensor, exact: Tensor, scale: Tensor) -> None:
        """Count one tensor; ``scale`` is the largest input magnitude at each element.

        An element is right if it is the rounding of some value within a millionth of ``scale`` of the exact one,
        which is what float32 arithmetic promises. So it may differ from the rounded exact value only next to a
        midpoint of two bfloat16 numbers, and only by one step: a step is at least 1/256 of the value, thousands of
        times the slack. (Unless the inputs cancel to less than a thousandth of themselves; then steps are finer.)
        """
        assert got.dtype == torch.bfloat16
        slack = 1e-6 * scale
        low, high = (exact - slack).to(torch.bfloat16), (exact + slack).to(torch.bfloat16)
        self.elements += got.numel()
        self.different += int((got != exact.to(torch.bfloat16)).sum())
        self.wrong += int((~((low <= got) & (got <= high))).sum())  # a NaN is wrong as well


def rounding(got: dict[str, Tensor], exact: dict[str, Tensor], inputs: list[Path]) -> Rounding:
    """The count over a whole checkpoint."""
    assert got.keys() == exact.keys()
    tensors, result = [load(path) for path in inputs], Rounding()
    for name, value in exact.items():
        scale = torch.stack([model[name].double().abs() for model in tensors]).amax(0)
        result.add(got[name], value, scale)
    return result


def involved(case: Case, folder: Path) -> list[Path]:
    """Every checkpoint that a case reads."""
    return [folder / name for name in (*case.models, *([case.base] if case.base else []))]


@pytest.mark.parametrize(("family", "seed", "case"), [run for run in RUNS if CASES[run[-1]].exact])
def test_bf16_is_rounded_once(peer: Peer, tmp_path: Path, family: str, seed: int, case: str) -> None:
    """Our bfloat16 output is the float64 result rounded once: the few that differ (1 %) all lie on a midpoint.

    Midpoints are not rare: (5x + 3y + 4z) / 12 of numbers with eight bits is one in about a dozen.
    """
    place = family, seed
    folder = peer.inputs(place, "bfloat16")
    got = CASES[case].ours(folder, tmp_path / "merged", None)
    exact = load(peer.output(place, "bfloat16", case, "float64"))
    counted = rounding(got, exact, involved(CASES[case], folder))
    assert counted.wrong == 0, counted
    assert counted.different <= 0.01 * counted.elements, counted


@pytest.mark.parametrize("case", OWN_BF16)
def test_the_peer_rounds_more_than_once(peer: Peer, case: str) -> None:
    """Mergekit's bfloat16 task arithmetic is off in 1 % and more: the test above can tell the difference."""
    folder = peer.inputs(PLACES[0], "bfloat16")
    got = load(peer.output(PLACES[0], "bfloat16", case, "bfloat16"))
    exact = load(peer.output(PLACES[0], "bfloat16", case, "float64"))
    counted = rounding(got, exact, involved(CASES[case], folder))
    assert counted.wrong > 0.01 * counted.elements, counted


# ---- Where the peer is wrong


def merged(output: Path, models: Sequence[Path], **settings: Any) -> dict[str, Tensor]:
    """Our merge, in float64 unless said otherwise."""
    merging.merge(list(models), output=output, **{"dtype": "float64"} | settings)
    return load(output)


def apart(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference in any element."""
    assert got.keys() == expected.keys()
    return max(float((value - expected[name]).abs().max()) for name, value in got.items())


def doubled(folder: Path) -> dict[str, Tensor]:
    """A checkpoint in float64."""
    return {name: value.double() for name, value in load(folder).items()}


def changed(folder: Path, models: Sequence[str]) -> dict[str, Tensor]:
    """What each of the models changes in the base, by tensor: ``[n, *shape]``."""
    tuned = [doubled(folder / name) for name in models]
    return {
        name: torch.stack([model[name] for model in tuned]) - value for name, value in doubled(folder / "base").items()
    }


@pytest.mark.parametrize("method", ["karcher", "linear"])
def test_a_base_is_no_model(peer: Peer, tmp_path: Path, method: str) -> None:
    """Mergekit merges a base that it was told of as one model more. Ours is the merge of the models."""
    folder = peer.inputs(PLACES[0], "float32")
    three, two = ([folder / name for name in names] for names in (("base", "a", "b"), ("a", "b")))
    assert apart(peer.mistake(method), merged(tmp_path / "three", three, method=method)) < 1e-14
    ours = merged(tmp_path / "two", two, method=method)
    told = merged(tmp_path / "told", two, method=method, base=folder / "base")
    assert apart(ours, told) == 0
    assert apart(ours, peer.mistake(method)) > 1e-4


def test_gradient_ends_behind_the_blocks(peer: Peer, tmp_path: Path) -> None:
    """Mergekit gives the final norm and the head a gradient's first value, as if they lay before the blocks."""
    folder = peer.inputs(DEEP, "float32")
    first, last = doubled(folder / "a"), doubled(folder / "b")
    theirs = peer.mistake("gradient")
    ours = merged(tmp_path / "merged", [folder / "a", folder / "b"], method="linear", weights=["1:0", "0:1"])
    behind = {"lm_head.weight", "model.norm.weight"}
    assert {name for name, value in ours.items() if not torch.equal(value, theirs[name])} >= behind
    for name in behind:
        assert torch.equal(ours[name], last[name])
        assert torch.equal(theirs[name], first[name])
    before, block = "model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(ours[before], first[before])
    assert torch.equal(ours[block], last[block])


@pytest.mark.parametrize("method", ["sce", "ram", "model_stock", "nearswap"])
def test_small_changes_count(peer: Peer, tmp_path: Path, method: str) -> None:
    """Mergekit's bounds are absolute: at changes below 1e-5 SCE takes equal shares, RAM and Model Stock hardly any.

    Its nearswap divides by no less than 1e-6. Ours follow the formulas at any size.
    """
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "sce": lambda tau: references.sce(tau, 1.0, "deltas"),
        "ram": references.ram,
        "model_stock": references.model_stock,
        "nearswap": lambda tau: references.nearswap(torch.zeros_like(tau[0]), tau[0], 5e-7),
    }
    parameters: dict[str, dict[str, Any]] = {"sce": {"density": 1.0, "select": "deltas"}, "nearswap": {"t": 5e-7}}
    mistake = MISTAKES[f"small {method}"]
    folder = peer.inputs(mistake.place, mistake.stored)
    models = [folder / name for name in mistake.models]
    base = doubled(folder / "base")
    changes = changed(folder, mistake.models)
    expected = {
        name: base[name] + formulas[method](tau.flatten(1)).view(tau.shape[1:]) for name, tau in changes.items()
    }
    settings = parameters.get(method, {})
    ours = merged(tmp_path / "merged", models, method=method, base=folder / "base", **settings)
    assert apart(ours, expected) < 1e-15
    theirs = peer.mistake(f"small {method}")
    for name, value in expected.items():
        right, wrong = value - base[name], theirs[name] - value
        assert wrong.norm() > 0.1 * right.norm(), name


def test_small_weights_count(peer: Peer, tmp_path: Path) -> None:
    """Weights of 1e-7 and 3e-7 say 3/4 of the way; mergekit's NuSLERP goes half of it if the sum is below 1e-6."""
    folder = peer.inputs(PLACES[0], "float32")
    models = [folder / name for name in MISTAKES["small nuslerp"].models]
    ours = merged(tmp_path / "small", models, method="nuslerp", weights=[1e-7, 3e-7])
    assert apart(ours, merged(tmp_path / "large", models, method="nuslerp", weights=[1.0, 3.0])) < 1e-15
    half = merged(tmp_path / "half", models, method="nuslerp")
    assert apart(peer.mistake("small nuslerp"), half) < 3e-15


@pytest.mark.parametrize("method", ["ramplus_tl", "arcee_fusion"])
def test_types_are_kept(peer: Peer, tmp_path: Path, method: str) -> None:
    """Asked for bfloat16, mergekit writes float32 here, whatever its config.json says."""
    mistake = MISTAKES[f"bf16 {method}"]
    folder = peer.inputs(mistake.place, mistake.stored)
    base = {} if mistake.base is None else {"base": folder / mistake.base}
    ours = merged(tmp_path / "merged", [folder / name for name in mistake.models], method=method, dtype=None, **base)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert {value.dtype for value in peer.mistake(f"bf16 {method}").values()} == {torch.float32}


def test_quantiles_are_of_all(peer: Peer, tmp_path: Path) -> None:
    """Of a tensor of more than a million elements mergekit's fusion guesses the quartiles, another way each time."""
    folder = peer.inputs(WIDE, "float32")
    ours = merged(tmp_path / "merged", [folder / "base", folder / "a"], method="arcee_fusion")
    base, other = doubled(folder / "base"), doubled(folder / "a")
    assert apart(ours, {name: references.arcee_fusion(value, other[name]) for name, value in base.items()}) == 0
    one, two = peer.mistake("wide arcee_fusion"), peer.mistake("wide arcee_fusion again")
    assert {name for name in one if not torch.equal(one[name], two[name])} == {
        name for name, value in base.items() if value.numel() > 1_000_000
    }


def test_norms_of_many_are_exact(peer: Peer, tmp_path: Path) -> None:
    """In float32 mergekit's norms of a million elements are good to five digits, ours to all."""
    folder = peer.inputs(WIDE, "float32")
    models = [folder / "base", folder / "a"]
    exact, ours = (
        merged(tmp_path / dtype, models, method="multislerp", dtype=dtype) for dtype in ("float64", "float32")
    )
    assert apart(peer.mistake("wide multislerp"), exact) < 1e-12
    assert apart(peer.mistake("wide multislerp in float32"), exact) > 2e-6
    assert apart(ours, exact) < 1e-7


@pytest.mark.parametrize("rescale", ["l1", "inverse", "theirs"])
@pytest.mark.parametrize("wrapper", ["dare", "della"])
def test_dropping(peer: Peer, tmp_path: Path, wrapper: str, rescale: str) -> None:
    """Entries are kept with the papers' probabilities, DELLA's by rank, by either tool.

    Mergekit's kept ones do not grow by these but so that each tensor's L1 norm stays, as far as it is known in float32;
    that is our `l1`.
    """
    tolerance = 1e-8 if rescale == "theirs" else 1e-15
    folder = peer.inputs(PLACES[0], "float32")
    if rescale == "theirs":
        got = peer.mistake(wrapper)
    else:
        settings = THINNED[wrapper] | {"rescale": rescale}
        chain = f"{wrapper}+task_arithmetic"
        got = merged(tmp_path / "merged", [folder / "a"], method=chain, base=folder / "base", **settings)
    base, errors, variances = doubled(folder / "base"), torch.zeros(2), torch.zeros(2)
    for name, (tau,) in changed(folder, ["a"]).items():
        chances = torch.full_like(tau, 0.5)
        if wrapper == "della":
            chances = references.della_probabilities(tau.view(-1, tau.shape[-1]), 0.5, 0.3).view(tau.shape)
        change = got[name] - base[name]
        kept = (change != 0).double()
        grown = tau / chances if rescale == "inverse" else tau * (tau.abs().sum() / (tau * kept).abs().sum())
        assert (change - grown * kept).abs().max() <= tolerance, name
        # as many are kept as expected, and of the large ones as many more
        for i, weight in enumerate((torch.ones_like(tau), chances - 0.5)):
            errors[i] += (weight * (kept - chances)).sum()
            variances[i] += (weight**2 * chances * (1 - chances)).sum()
    assert (errors.abs() <= 5 * variances.sqrt()).all()


def test_dropping_has_a_seed(peer: Peer, tmp_path: Path) -> None:
    """Mergekit drops other entries each time it is asked; ours are the same until another seed is asked for."""
    folder = peer.inputs(PLACES[0], "float32")
    settings = {"method": "dare+task_arithmetic", "base": folder / "base"} | THINNED["dare"]
    again, other = (merged(tmp_path / str(seed), [folder / "a"], seed=seed, **settings) for seed in (0, 1))
    assert apart(load(folder / "dare-a"), again) == 0
    assert apart(again, other) > 0.001
    assert apart(peer.mistake("dare"), peer.mistake("dare again")) > 0.001
