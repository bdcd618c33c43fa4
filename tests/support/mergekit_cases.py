"""The merges that test_mergekit.py compares, each said in our words and in mergekit's, and the models they merge."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

import merging
from merging.methods import MERGEKIT
from support.architectures import ARCHITECTURES, DECODER, tiny

__all__ = [
    "CASES",
    "DEEP",
    "PLACES",
    "THINNED",
    "WIDE",
    "Case",
    "Place",
    "configuration",
    "load",
    "save",
    "save_thinned",
]

Place: TypeAlias = tuple[str, int]
"""A family of models, and the seed of its numbers."""

# mergekit refuses a T5 without gates.
PLACES: tuple[Place, ...] = (("llama", 0), ("gpt2", 1), ("t5-gated", 2))
LAYERS = 4
DEEP, WIDE = ("llama-deep", 3), ("llama-wide", 4)  # for what differs by layer; with a tensor of more than a million
FAMILIES = ARCHITECTURES | {
    "llama-deep": tiny("LlamaConfig", "LlamaForCausalLM", DECODER | {"num_hidden_layers": LAYERS}),
    "llama-wide": tiny("LlamaConfig", "LlamaForCausalLM", DECODER | {"vocab_size": 32_000, "num_hidden_layers": 1}),
}

# Name -> size of the change that all share, and of its own: fine-tunes of one base go partly the same way. The sizes
# differ, so that methods that weigh models by size have something to weigh.
CHECKPOINTS = {
    "base": (0.0, 0.0),
    "a": (0.002, 0.002),
    "b": (0.002, 0.003),
    "c": (0.002, 0.0015),
    "near": (0.0, 0.0005),
    "small-a": (2e-6, 1e-6),
    "small-b": (2e-6, 6e-6),
    "other": (0.0, 0.0),  # numbers of another seed
}


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def save(place: Place, folder: Path, names: Collection[str] = CHECKPOINTS) -> None:
    """A base, fine-tunes of it and an unrelated model, all of them in float32 and in bfloat16."""
    family, seed = place
    model = FAMILIES[family]().eval()
    for name in names:
        shared, own = CHECKPOINTS[name]
        randomise(model, seed + (1000 if name == "other" else 0))
        common, generator = (torch.Generator().manual_seed(1000 * seed + offset) for offset in (0, sum(map(ord, name))))
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(shared * torch.randn(value.shape, generator=common))
                value.add_(own * torch.randn(value.shape, generator=generator))
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype).save_pretrained(folder / str(dtype).removeprefix("torch.") / name)
        model.to(torch.float32)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights around 0, so that unrelated models are far apart in angle, and gains around 1/2.

    Nothing exceeds 1, up to which the tolerances hold as absolute ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            centre = 0.5 if value.dim() == 1 and name.endswith("weight") else 0.0
            value.copy_(centre + 0.1 * torch.randn(value.shape, generator=generator))


# Wrapper -> parameters with which half of the changes survive.
THINNED: dict[str, dict[str, Any]] = {
    "dare": {"drop": 0.5, "rescale": "l1"},
    "della": {"della.density": 0.5, "epsilon": 0.3, "rescale": "l1"},
}


def save_thinned(folder: Path) -> None:
    """The fine-tunes, each thinned by us on its own: its mask is the same whatever it is merged with."""
    for wrapper, parameters in THINNED.items():
        for name in ("a", "b", "c"):
            chain, out = f"{wrapper}+task_arithmetic", folder / f"{wrapper}-{name}"
            merging.merge(
                [folder / name], method=chain, base=folder / "base", output=out, dtype="float64", **parameters
            )


def configuration(
    folder: Path,
    method: str,
    models: Iterable[str],
    base: str | None,
    every: dict[str, Any],
    weights: Iterable[Any] | None,
    dtype: str,
) -> dict[str, Any]:
    """What the peer is asked; ``every`` are parameters for all models, in our notation as the weights are."""
    listed: list[dict[str, Any]] = [{"model": str(folder / name)} for name in models]
    if weights is not None:
        for model, weight in zip(listed, weights, strict=True):
            model["parameters"] = {"weight": in_its_notation(weight)}
    parameters = {name: in_its_notation(value) for name, value in every.items()}
    config = {"merge_method": method, "models": listed, "parameters": parameters, "dtype": dtype}
    return config if base is None else config | {"base_model": str(folder / base)}


def in_its_notation(value: Any) -> Any:
    """Values by name and by depth as the peer writes them."""
    if isinstance(value, dict):
        rules = [(pattern, in_its_notation(each)) for pattern, each in value.items()]
        return [{"value": each} if pattern == "*" else {"filter": pattern, "value": each} for pattern, each in rules]
    return [float(point) for point in value.split(":")] if isinstance(value, str) else value


def at(value: Any, name: str) -> float:
    """Such a value at a tensor of the deep model."""
    if isinstance(value, dict):
        return at(next(each for pattern, each in value.items() if pattern in name or pattern == "*"), name)
    if isinstance(value, str):
        first, last = map(float, value.split(":"))
        return first + (last - first) * int(re.findall(r"layers\.(\d)", name)[0]) / (LAYERS - 1)
    return float(value)


Edge: TypeAlias = tuple[Tensor, Tensor, float]
"""Values of elements, the one from which on they are chosen, and how far from it, in its units, rounding decides."""


@dataclass(frozen=True)
class Case:
    """One merge, said in our words and in the peer's, and how far the two may be apart on numbers up to 1."""

    name: str
    method: str
    models: tuple[str, ...]
    parameters: dict[str, Any]
    peer: dict[str, Any]
    float64: float
    float32: float | None  # None: not comparable
    base: str | None = None
    weights: tuple[Any, ...] | None = None
    peer_method: str | None = None
    thinned: str | None = None  # the wrapper that thinned the models before the peer gets them
    exact: bool = True  # False where rounding decides what is kept, so that half precision cannot be compared
    edges: Callable[[str, Tensor, Tensor], list[Edge]] | None = None  # of a tensor: its name, the base's, the models'
    places: tuple[Place, ...] = PLACES

    def ours(self, folder: Path, output: Path, dtype: str | None) -> dict[str, Tensor]:
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
        method = self.peer_method or self.method
        models = [f"{self.thinned}-{name}" for name in self.models] if self.thinned else self.models
        # The peer's slerp and its fusion take their first model as the base; its linear would add a base to the models.
        base = self.models[0] if self.method in ("slerp", "arcee_fusion") else self.base
        return configuration(folder, method, models, base, self.peer, self.weights, dtype)

    def undecided(self, folder: Path) -> dict[str, Tensor]:
        """The elements of each tensor where it is left to rounding, or to chance, whether they are chosen."""
        base, models = load(folder / (self.base or "base")), [load(folder / name) for name in self.models]
        masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in base.items()}
        for name, value in base.items():
            tuned = torch.stack([model[name].double() for model in models])
            for values, edge, slack in self.edges(name, value.double(), tuned) if self.edges else ():
                on = (values - edge).abs() <= slack * edge
                masks[name] |= on & (on.sum() > (values == edge).any())  # one that is the edge itself is not in doubt
        return masks


# ---- Cases: all models, without a base


def linear(name: str, *weights: Any, normalize: bool = True, places: tuple[Place, ...] = PLACES) -> Case:
    """Weighted averages differ by the order of the sum only."""
    models, flag = ("a", "b", "c")[: len(weights)], {"normalize": normalize}
    return Case(name, "linear", models, flag, flag, 1e-12, 2e-7, weights=weights, places=places)


def passthrough(name: str, scale: Any, places: tuple[Place, ...] = PLACES) -> Case:
    """One product, rounded once on both sides: not a bit may differ."""
    return Case(name, "passthrough", ("a",), {"scale": scale}, {"scale": scale}, 0.0, 0.0, places=places)


def slerp(name: str, *models: str, t: Any = 0.4, places: tuple[Place, ...] = PLACES) -> Case:
    """Spherical interpolation, on either side of the angle below which it is taken along the straight line."""
    return Case(name, "slerp", models, {"t": t}, {"t": t}, 3e-15, 6e-7, places=places)


def nuslerp(name: str, axis: str, second: str, base: str | None = None) -> Case:
    """The same without a straight line, on weights or on changes. The peer's row_wise goes down the columns.

    Its float32 norms of large tensors are not as good as these tolerances: see test_norms_of_many_are_exact.
    """
    ours = {"axis": axis, "space": "changes" if base else "weights"}
    peers = {"nuslerp_flatten": axis == "flat", "nuslerp_row_wise": axis == "columns"}
    return Case(name, "nuslerp", ("a", second), ours, peers, 3e-15, 6e-7, base, (0.6, 0.4))


def multislerp(name: str, *weights: float, normalize: bool, base: str | None = None) -> Case:
    """The peer adds 1e-8 to norms, which are 0.01 and more: of changes it turns the mean by a millionth at most."""
    ours, peers = {"normalize": normalize, "space": "changes" if base else "weights"}, {"normalize_weights": normalize}
    return Case(name, "multislerp", ("a", "b", "c"), ours, peers, 2e-9 if base else 1e-12, 6e-7, base, weights)


def karcher(name: str, *models: str, **parameters: Any) -> Case:
    """The same steps on the sphere. What float32 loses of small angles hardly matters: angle / sine is close to 1."""
    return Case(name, "karcher", models, parameters, parameters, 5e-15, 6e-7)


def arcee(name: str, *models: str) -> Case:
    """Float64 only: float32 leaves no digit of the divergence between the rows of two close models.

    There a millionth decides, since the peer adds 1e-8 to each probability.
    """

    def edges(name: str, base: Tensor, tuned: Tensor) -> list[Edge]:
        values = importance(tuned[0], tuned[1])
        ordered = values.flatten().sort().values
        low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
        return [(values, median + 1.5 * (high - low), 1e-6)]

    return Case(name, "arcee_fusion", models, {}, {}, 2e-16, None, exact=False, edges=edges)


def importance(base: Tensor, other: Tensor) -> Tensor:
    """By how much arcee's fusion wants each element of the other model."""
    p, q = other.softmax(-1), base.softmax(-1)
    return (other - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)


# ---- Cases: changes of a base


def arithmetic(name: str, *weights: float, normalize: bool = False) -> Case:
    """Task arithmetic at scale 0.7. In float64 the two may differ in the last bits, by the order of the operations.

    Ours has no way to normalize: weights that sum to 1 are the same.
    """
    models, peers = ("a", "b", "c")[: len(weights)], {"lambda": 0.7, "normalize": normalize}
    ours = {"scale": 0.7 / sum(weights) if normalize else 0.7}
    return Case(name, "task_arithmetic", models, ours, peers, 5e-16, 1e-7, "base", weights)


AS_THE_PEER = {"scope": "tensor", "vote": "weighted", "zero": "plus"}


def largest(density: Any) -> Callable[[str, Tensor, Tensor], list[Edge]]:
    """The edge of each model's largest changes. The peer ranks in float32, whatever it computes in."""

    def edges(name: str, base: Tensor, tuned: Tensor) -> list[Edge]:
        kept = max(1, int(at(density, name) * base.numel()))
        sizes = (tuned - base).abs().float()
        return [(each, each.flatten().sort(descending=True).values[kept - 1], 0.0) for each in sizes]

    return edges


def ties(
    name: str, density: Any, *weights: float, normalize: bool, scale: float, places: tuple[Place, ...] = PLACES
) -> Case:
    """Thresholds over each tensor, weighted votes, and + where votes cancel, as the peer has it."""
    ours = AS_THE_PEER | {"density": density, "normalize": normalize, "scale": scale}
    peers = {"density": density, "normalize": normalize, "lambda": scale}
    models, edges = ("a", "b", "c"), largest(density)
    return Case(
        name, "ties", models, ours, peers, 1e-12, 2e-7, "base", weights, exact=False, edges=edges, places=places
    )


INSIDE = AS_THE_PEER | {"ties.density": 1.0}  # wrappers leave nothing to trim
WHOLE: dict[str, Any] = {"della.density": 1.0, "ties.density": 1.0}


def wrapped(method: str, peer_method: str, *, normalize: bool, **ours: Any) -> Case:
    """Where nothing is dropped the masks do not matter. Changes of bfloat16 often cancel, so that rounding votes."""
    peers = {"density": 1.0, "normalize": normalize, "lambda": 0.7}
    models, weights, votes = ("a", "b", "c"), (0.5, 0.3, 0.4), "ties" in method
    mine = {"scale": 0.7, **ours} | (AS_THE_PEER | {"normalize": normalize} if votes else {})
    return Case(method, method, models, mine, peers, 1e-12, 2e-7, "base", weights, peer_method, exact=not votes)


def thinned(wrapper: str, inner: str, *, normalize: bool = False) -> Case:
    """Half of the changes dropped, on the peer's side by us beforehand, since its masks cannot be had.

    It reads the sum of base and change, so that in float32 the change is as exact as the weights are.
    """
    peers = {"normalize": normalize, "lambda": 0.7}
    ours = THINNED[wrapper] | {"scale": 0.7} | (INSIDE | {"normalize": normalize} if inner == "ties" else {})
    models, weights, chain = ("a", "b", "c"), (0.5, 0.3, 0.4), f"{wrapper}+{inner}"
    name = f"{chain}-half"
    return Case(name, chain, models, ours, peers, 1e-12, 2e-7, "base", weights, inner, wrapper, exact=False)


def breadcrumbs(name: str, method: str, density: float, gamma: float, **ours: Any) -> Case:
    """Neither the largest changes nor the smallest; where both cannot be had, fewer of the largest are dropped."""

    def edges(name: str, base: Tensor, tuned: Tensor) -> list[Edge]:
        sizes, count = (tuned - base).abs().float(), base.numel()
        kept, result = int(density * count), []
        first = max(0, count - kept - int(gamma * count))
        for each in sizes if kept else ():
            ordered = each.flatten().sort().values
            result += [(each, ordered[first], 0.0), (each, ordered[first + kept - 1], 0.0)]
        return result

    peers = {"density": density, "gamma": gamma, "normalize": False, "lambda": 0.7}
    mine = {"scale": 0.7, "breadcrumbs.density": density, "gamma": gamma, **ours}
    models, weights = ("a", "b", "c"), (0.5, 0.3, 0.4)
    return Case(
        name,
        method,
        models,
        mine,
        peers,
        1e-12,
        2e-7,
        "base",
        weights,
        name.partition("-")[0],
        exact=False,
        edges=edges,
    )


def sce(name: str, density: float) -> Case:
    """Weights from mean squares. In float32 the variances, by which elements are chosen, are good to a millionth."""

    def edges(name: str, base: Tensor, tuned: Tensor) -> list[Edge]:
        variance = tuned.sub(base).var(0, unbiased=False)
        kept = int(int((variance > 0).sum()) * density)
        return [(variance, variance.flatten().sort(descending=True).values[kept - 1], 1e-6)] if kept else []

    ours, peers = {"density": density, "select": "deltas"}, {"select_topk": density}
    models, whole = ("a", "b", "c"), density == 1
    return Case(name, "sce", models, ours, peers, 1e-15, 1e-7, "base", exact=whole, edges=None if whole else edges)


def ram(name: str, method: str, float64: float, **parameters: Any) -> Case:
    """Changes beyond a bound in absolute terms, as the peer has it. It computes the factors of ramplus in float32."""
    return Case(name, method, ("a", "b", "c"), {"relative": False, **parameters}, parameters, float64, 1e-7, "base")


def model_stock(name: str, *models: str, filter_wise: bool) -> Case:
    """Angles between changes, as exact as norms are: no denominator is below 1/2, no product of norms below 1e-6."""
    flag = {"filter_wise": filter_wise}
    return Case(name, "model_stock", models, flag, flag, 1e-15, 2e-7, "base")


def nearswap(name: str, t: float) -> Case:
    """One product and one sum."""
    return Case(name, "nearswap", ("a",), {"t": t}, {"t": t}, 5e-16, 1e-7, "base")


REQUIRED = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.001}}
"""Parameters that the peer demands, at our defaults."""


def defaults(name: str, models: int = 3, base: str | None = "base") -> Case:
    """A name of the peer's with no parameter given, but for those that it demands (a weight of 1 among them)."""
    chain, ours = MERGEKIT.get(name, (name, {}))
    float64, float32 = {"ramplus_tl": (3e-9, 1e-7), "arcee_fusion": (2e-16, None)}.get(name, (1e-12, 1e-6))
    if name == "multislerp":
        float64 = 2e-9
    peer = REQUIRED.get(name) or ({"weight": 1.0} if name not in WEIGHTLESS else {})
    case = Case(
        f"defaults-{name}",
        chain,
        ("a", "b", "c")[:models],
        dict(ours),
        peer,
        float64,
        float32,
        base,
        peer_method=name,
        exact=False,
        places=PLACES[:1],
    )
    return replace(case, edges=arcee(name).edges) if name == "arcee_fusion" else case


WEIGHTLESS = ("karcher", "sce", "ram", "ramplus_tl", "model_stock", "arcee_fusion", "passthrough")
DEFAULTS = (
    defaults("linear", base=None),
    defaults("passthrough", 1, base=None),
    defaults("karcher", base=None),
    defaults("slerp", 2, base=None),
    defaults("nuslerp", 2, base=None),
    defaults("multislerp", base=None),
    defaults("arcee_fusion", 2, base=None),
    defaults("nearswap", 1),
    *(defaults(name) for name in ("task_arithmetic", "ties", "sce", "ram", "ramplus_tl", "model_stock")),
    *(defaults(name) for name in ("dare_linear", "dare_ties", "della", "della_linear")),
    *(defaults(name) for name in ("breadcrumbs", "breadcrumbs_ties")),
)
"""All twenty names, so that the defaults that the list of methods tells of are the peer's."""

CLASSIC = {"self_attn": "0:0.5:0.3:0.7:1", "mlp": "1:0.5:0.7:0.3:0", "*": 0.5}
LISTED = (
    linear("linear-2", 0.5, 0.5),
    linear("linear-3", 0.5, 0.3, 0.4),
    linear("linear-raw", 0.9, 0.6, -0.5, normalize=False),
    # outside the layers the peer takes a gradient's first value everywhere, so there a number must stand
    linear("linear-gradient", {"layers": "1:0.2:0", "*": 0.7}, {"layers": "0:0.9:0.4", "*": 0.3}, places=(DEEP,)),
    passthrough("passthrough", 1.0),
    passthrough("passthrough-scaled", 0.3),
    passthrough("passthrough-filter", {"o_proj": 0.5, "mlp": 0.3, "*": 1.0}, places=(DEEP,)),
    slerp("slerp-near", "base", "near"),
    slerp("slerp-far", "a", "other"),
    slerp("slerp-classic", "a", "other", t=CLASSIC, places=(DEEP,)),
    nuslerp("nuslerp", "flat", "other"),
    nuslerp("nuslerp-near", "flat", "b"),
    nuslerp("nuslerp-rows", "rows", "other"),
    nuslerp("nuslerp-columns", "columns", "other"),
    nuslerp("nuslerp-changes", "flat", "b", base="base"),
    nuslerp("nuslerp-changes-rows", "rows", "b", base="base"),
    nuslerp("nuslerp-changes-columns", "columns", "b", base="base"),
    multislerp("multislerp", 0.5, 0.3, 0.4, normalize=True),
    multislerp("multislerp-raw", 0.5, 0.3, 0.4, normalize=False),
    multislerp("multislerp-changes", 0.5, 0.3, 0.4, normalize=True, base="base"),
    multislerp("multislerp-changes-raw", 0.5, 0.3, 0.4, normalize=False, base="base"),
    karcher("karcher", "a", "b", "c"),
    karcher("karcher-far", "a", "other", "b"),
    karcher("karcher-step", "other", "a", "b", max_iter=1, tol=1e-9),
    arcee("arcee", "base", "a"),
    arcee("arcee-pair", "b", "c"),
    arithmetic("arithmetic-2", 0.5, 0.3),
    arithmetic("arithmetic-3", 0.5, 0.3, 0.2),
    arithmetic("arithmetic-mean", 0.5, 0.3, 0.4, normalize=True),
    ties("ties", 0.5, 1.0, 1.0, 1.0, normalize=True, scale=1.0),
    ties("ties-raw", 0.3, 0.5, 0.3, 0.4, normalize=False, scale=0.7),
    ties("ties-all", 1.0, 0.5, -0.3, 0.4, normalize=False, scale=1.3),
    ties("ties-filter", {"mlp": "0.3:0.7", "*": 0.5}, 0.5, 0.3, 0.4, normalize=True, scale=1.0, places=(DEEP,)),
    wrapped("dare_linear", "dare_linear", normalize=False, drop=0.0),
    wrapped("dare_ties", "dare_ties", normalize=False, drop=0.0),
    wrapped("della_linear", "della_linear", normalize=False, density=1.0, epsilon=0.0),
    wrapped("della+ties", "della", normalize=True, epsilon=0.0, **WHOLE),
    thinned("dare", "task_arithmetic"),
    thinned("dare", "ties"),
    thinned("della", "task_arithmetic"),
    thinned("della", "ties", normalize=True),
    breadcrumbs("breadcrumbs", "breadcrumbs+task_arithmetic", 0.7, 0.05),
    breadcrumbs("breadcrumbs-most", "breadcrumbs+task_arithmetic", 0.9, 0.2),
    breadcrumbs("breadcrumbs_ties", "breadcrumbs_ties", 0.7, 0.05, normalize=False, **AS_THE_PEER),
    sce("sce", 1.0),
    sce("sce-half", 0.5),
    ram("ram", "ram", 5e-16, epsilon=0.0015),
    ram("ramplus", "ramplus_tl", 3e-9, epsilon=0.0015, r=0.5, alpha=0.9),
    model_stock("model-stock", "a", "b", "c", filter_wise=False),
    model_stock("model-stock-filters", "a", "b", "c", filter_wise=True),
    nearswap("nearswap", 0.001),
    *DEFAULTS,
)
CASES = {case.name: case for case in LISTED}
assert len(CASES) == len(LISTED)
