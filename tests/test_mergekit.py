"""Agreement with mergekit, which runs in its own environment: MERGEKIT_PYTHON names its Python (tests/peer).

Three comparisons, in rising order of strictness about rounding:

- float64 on both sides: the formulas are the same;
- float32 on both sides: the arithmetic is as good;
- bfloat16 files: our output is the float64 result rounded once, which mergekit's own bfloat16 output is not.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from safetensors.torch import load_file

import merging

PEER = os.environ.get("MERGEKIT_PYTHON")
RUNNER = Path(__file__).parent / "peer" / "mergekit_runner.py"

pytestmark = pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python that has mergekit")

# mergekit refuses a T5 without gates.
FAMILIES = ("llama", "gpt2", "t5-gated")
SEEDS = (0, 1)
CHECKPOINTS = {"base": 0.0, "a": 0.002, "b": 0.002, "c": 0.002, "near": 0.0005}  # name -> size of the change


@dataclass(frozen=True)
class Case:
    """One merge, said in our words and in the peer's, and how far the two may be apart on numbers up to 1."""

    name: str
    method: str
    models: tuple[str, ...]
    parameters: dict[str, Any]
    peer: dict[str, Any]
    float64: float
    float32: float
    base: str | None = None
    weights: tuple[float, ...] | None = None
    peer_method: str | None = None
    exact: bool = True  # False where rounding decides what is kept, so that half precision cannot be compared

    def ours(self, folder: Path, output: Path, dtype: str | None) -> dict[str, torch.Tensor]:
        """Our merge of the checkpoints in the folder."""
        settings = dict(self.parameters)
        if self.weights is not None:
            settings["weights"] = list(self.weights)
        if self.base is not None:
            settings["base"] = folder / self.base
        models = [folder / name for name in self.models]
        merging.merge(models, method=self.method, output=output, dtype=dtype, **settings)
        return load(output)

    def config(self, folder: Path, dtype: str) -> dict[str, Any]:
        """The peer's configuration of the same merge."""
        models: list[dict[str, Any]] = [{"model": str(folder / name)} for name in self.models]
        if self.weights is not None:
            for model, weight in zip(models, self.weights, strict=True):
                model["parameters"] = {"weight": weight}
        method = self.peer_method or self.method
        config = {"merge_method": method, "models": models, "parameters": self.peer, "dtype": dtype}
        # The peer's slerp takes its first model as the base; its linear would add a base to the models.
        base = self.models[0] if self.method == "slerp" else self.base
        return config if base is None else config | {"base_model": str(folder / base)}


def linear(name: str, *weights: float, normalize: bool) -> Case:
    """Weighted averages differ by the order of the sum only."""
    models, flag = ("a", "b", "c")[: len(weights)], {"normalize": normalize}
    return Case(name, "linear", models, flag, flag, 1e-12, 2e-7, weights=weights)


def arithmetic(name: str, *weights: float) -> Case:
    """Task arithmetic at scale 0.7. In float64 the two may differ in the last bits, by the order of the operations."""
    models = ("a", "b", "c")[: len(weights)]
    return Case(
        name, "task_arithmetic", models, {"scale": 0.7}, {"lambda": 0.7}, 5e-16, 1e-7, base="base", weights=weights
    )


def slerp(name: str, *models: str) -> Case:
    """Spherical interpolation, on either side of the angle below which it is taken along the straight line."""
    return Case(name, "slerp", models, {"t": 0.4}, {"t": 0.4}, 3e-15, 6e-7)


AS_THE_PEER = {"scope": "tensor", "vote": "weighted", "zero": "plus"}


def ties(name: str, density: float, *weights: float, normalize: bool, scale: float) -> Case:
    """Thresholds over each tensor, weighted votes, and + where votes cancel, as the peer has it."""
    ours = AS_THE_PEER | {"density": density, "normalize": normalize, "scale": scale}
    peers = {"density": density, "normalize": normalize, "lambda": scale}
    return Case(name, "ties", ("a", "b", "c"), ours, peers, 1e-12, 2e-7, "base", weights, exact=False)


def dare(name: str, method: str, chain: str, **ours: Any) -> Case:
    """Where nothing is dropped the masks do not matter; nothing is trimmed inside either."""
    peers = {"density": 1.0, "normalize": False, "lambda": 0.7}
    models, weights = ("a", "b", "c"), (0.5, 0.3, 0.4)
    mine = {"drop": 0.0, "scale": 0.7, **ours}
    return Case(name, chain, models, mine, peers, 1e-12, 2e-7, "base", weights, method, exact="ties" not in chain)


CASES = {
    case.name: case
    for case in (
        linear("linear-2", 0.5, 0.5, normalize=True),
        linear("linear-3", 0.5, 0.3, 0.4, normalize=True),
        linear("linear-raw", 0.9, 0.6, -0.5, normalize=False),
        arithmetic("arithmetic-2", 0.5, 0.3),
        arithmetic("arithmetic-3", 0.5, 0.3, 0.2),
        slerp("slerp-near", "base", "near"),
        slerp("slerp-far", "a", "other"),
        ties("ties", 0.5, 1.0, 1.0, 1.0, normalize=True, scale=1.0),
        ties("ties-raw", 0.3, 0.5, 0.3, 0.4, normalize=False, scale=0.7),
        dare("dare-linear", "dare_linear", "dare+task_arithmetic"),
        dare("dare-ties", "dare_ties", "dare+ties", density=1.0, normalize=False, **AS_THE_PEER),
    )
}
OWN_BF16 = ("arithmetic-2", "arithmetic-3")  # cases of which the peer's own bfloat16 output is looked at


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights around 0, so that unrelated models are far apart in angle, and gains around 1/2.

    Nothing exceeds 1, up to which the tolerances hold as absolute ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            centre = 0.5 if value.dim() == 1 and name.endswith("weight") else 0.0
            value.copy_(centre + 0.1 * torch.randn(value.shape, generator=generator))


def save_checkpoints(family: str, seed: int, folder: Path) -> None:
    """A base, fine-tunes of it and an unrelated model, all of them in float32 and in bfloat16."""
    model = build(family, seed)
    for name, change in (*CHECKPOINTS.items(), ("other", 0.0)):
        randomise(model, seed + (1000 if name == "other" else 0))
        generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, name)))
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(change * torch.randn(value.shape, generator=generator))
        for dtype in (torch.bfloat16, torch.float32):
            saved = build(family, seed, dtype)
            saved.load_state_dict(model.state_dict())
            saved.save_pretrained(folder / str(dtype).removeprefix("torch.") / name)


@dataclass(frozen=True)
class Peer:
    """Where the checkpoints and mergekit's merges of them lie."""

    root: Path

    def inputs(self, family: str, seed: int, stored: str) -> Path:
        """The folder of the checkpoints of one family, seed and stored precision."""
        return self.root / "models" / f"{family}-{seed}" / stored

    def output(self, family: str, seed: int, stored: str, case: str, dtype: str) -> Path:
        """The peer's merge of them at a precision."""
        return self.root / "peer" / f"{family}-{seed}-{stored}-{case}-{dtype}"

    def jobs(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every merge that is asked of the peer: where it goes, and its configuration."""
        for family in FAMILIES:
            for seed in SEEDS:
                for name, case in CASES.items():
                    wanted = [("float32", "float64"), ("float32", "float32"), ("bfloat16", "float64")]
                    if name in OWN_BF16:
                        wanted.append(("bfloat16", "bfloat16"))
                    for stored, dtype in wanted:
                        config = case.config(self.inputs(family, seed, stored), dtype)
                        yield self.output(family, seed, stored, name, dtype), config


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """All checkpoints, and all of mergekit's merges in one process, since it takes seconds to start."""
    result = Peer(tmp_path_factory.mktemp("mergekit"))
    for family in FAMILIES:
        for seed in SEEDS:
            save_checkpoints(family, seed, result.root / "models" / f"{family}-{seed}")
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


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_result(peer: Peer, tmp_path: Path, family: str, seed: int, case: str, dtype: str) -> None:
    """Computed in float64 and in float32, the two tools agree to rounding in every element of every tensor.

    Of the entries whose change is exactly the threshold the peer keeps an arbitrary part, and we keep all.
    """
    folder = peer.inputs(family, seed, "float32")
    ours = CASES[case].ours(folder, tmp_path / "merged", dtype)
    tied = on_the_threshold(CASES[case], folder)
    theirs = load(peer.output(family, seed, "float32", case, dtype))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype == getattr(torch, dtype)
        apart = (ours[name].double() - value.double()).abs()
        assert apart[~tied[name]].max() <= getattr(CASES[case], dtype), name
    assert sum(int(mask.sum()) for mask in tied.values()) <= 8 * len(tied)


def on_the_threshold(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """The elements of each tensor where some model's change is as large as several others, at TIES's threshold."""
    base = load(folder / (case.base or "base"))
    masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in base.items()}
    if case.method != "ties":
        return masks
    for model in (load(folder / name) for name in case.models):
        for name, value in base.items():
            change = (model[name] - value).abs()
            kept = max(1, int(case.parameters["density"] * change.numel()))
            on = change == change.flatten().sort(descending=True).values[kept - 1]
            masks[name] |= on & (on.sum() > 1)
    return masks


@dataclass
class Rounding:
    """How a bfloat16 output compares with the float64 result rounded once, counted over all elements."""

    elements: int = 0
    different: int = 0  # from the rounded float64 result
    wrong: int = 0  # of those, the ones that do not come from a rounding midpoint

    def add(self, got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> None:
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


def rounding(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], inputs: list[Path]) -> Rounding:
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


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.exact])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_rounded_once(peer: Peer, tmp_path: Path, family: str, seed: int, case: str) -> None:
    """Our bfloat16 output is the float64 result rounded once: the few that differ (1 %) all lie on a midpoint.

    Midpoints are not rare: (5x + 3y + 4z) / 12 of numbers with eight bits is one in about a dozen.
    """
    folder = peer.inputs(family, seed, "bfloat16")
    got = CASES[case].ours(folder, tmp_path / "merged", None)
    exact = load(peer.output(family, seed, "bfloat16", case, "float64"))
    counted = rounding(got, exact, involved(CASES[case], folder))
    assert counted.wrong == 0, counted
    assert counted.different <= 0.01 * counted.elements, counted


@pytest.mark.parametrize("case", OWN_BF16)
def test_the_peer_rounds_more_than_once(peer: Peer, case: str) -> None:
    """Mergekit's bfloat16 task arithmetic is off in 1 % and more: the test above can tell the difference."""
    folder = peer.inputs("llama", 0, "bfloat16")
    got = load(peer.output("llama", 0, "bfloat16", case, "bfloat16"))
    exact = load(peer.output("llama", 0, "bfloat16", case, "float64"))
    counted = rounding(got, exact, involved(CASES[case], folder))
    assert counted.wrong > 0.01 * counted.elements, counted
