"""The twenty methods of mergekit: their parameters, and the chains of ours that do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merging.plan.mergekit.values import Bounds

__all__ = ["METHODS", "MethodSpec", "Parameter"]

_NUMBER = Bounds()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of mergekit.

    Attributes:
        bounds: the values that it takes.
        per_model: whether each model may have its own.
        required: whether it has no default.
        default: the value where none is given; None leaves it to our own default.
        target: our parameter, by link and field; empty if it has no effect.
        convert: turns a value into ours.
        invert: turns a value of ours back; None for a value that mergekit does not have.
        idle: the reason why it has no effect, if it has none.
    """

    bounds: Bounds = _NUMBER
    per_model: bool = False
    required: bool = False
    default: Any = None
    target: str = ""
    convert: Callable[[Any], Any] | None = None
    invert: Callable[[Any], Any] | None = None
    idle: str = ""


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method of mergekit.

    Attributes:
        chain: our chain that does the same.
        parameters: its parameters by name.
        base: whether it needs a base, may have one, or merges it like any other model.
        models: the least and the most number of models without the base; None is no limit.
        fixed: our parameters that make the chain do the same.
        first: whether the base is our chain's first model.
        name: its name in a recipe.
    """

    chain: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["required", "optional", "ignored"] = "required"
    models: tuple[int, int | None] = (1, None)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    first: bool = False
    name: str = ""


_SHARE = Bounds(least=0, most=1)
_SWITCH = Bounds("switch")
_SIZE = Bounds(least=0)


def _weight(target: str) -> Parameter:
    return Parameter(per_model=True, required=True, target=target)


def _complement(density: float) -> float:
    return round(1 - density, 12)


def _rescale(value: bool) -> str:
    return "l1" if value else "none"


def _is_rescaled(rescale: str) -> bool | None:
    return {"l1": True, "none": False}.get(rescale)


_INT8_MASK = Parameter(_SWITCH, default=False)
_AS_MERGEKIT = {"ties.vote": "weighted", "ties.zero": "plus"}


def _sums(merger: str, *, normalize: bool, **others: Parameter) -> dict[str, Parameter]:
    """Return the parameters that all methods on changes share, for a chain that ends with the merger."""
    shared = {
        "weight": _weight(f"{merger}.weights"),
        "density": Parameter(_SHARE, per_model=True, idle="it trims nothing"),
        "normalize": Parameter(_SWITCH, default=normalize, target=f"{merger}.normalize"),
        "rescale": Parameter(_SWITCH, idle="nothing is dropped"),
        "lambda": Parameter(target=f"{merger}.scale"),
        "int8_mask": _INT8_MASK,
    }
    return shared | others


def _density(target: str) -> Parameter:
    return Parameter(_SHARE, per_model=True, default=1.0, target=target)


def _dropping(link: str, default: bool = True) -> Parameter:
    return Parameter(_SWITCH, default=default, target=f"{link}.rescale", convert=_rescale, invert=_is_rescaled)


def _switch(target: str, default: bool) -> Parameter:
    return Parameter(_SWITCH, default=default, target=target)


_DROP = Parameter(_SHARE, per_model=True, default=1.0, target="dare.drop", convert=_complement, invert=_complement)
_GAMMA = Parameter(Bounds(least=0, below=1), per_model=True, default=0.01, target="breadcrumbs.gamma")
_EPSILON = Parameter(Bounds(least=0, below=1), per_model=True, default=0.15, target="della.epsilon")
_RAM_EPSILON = Parameter(_SIZE, default=1e-5, target="epsilon")
_UNTRIMMED = {"ties.density": 1.0, **_AS_MERGEKIT}

METHODS: dict[str, MethodSpec] = {
    "linear": MethodSpec(
        "linear", {"weight": _weight("weights"), "normalize": _switch("normalize", True)}, base="ignored"
    ),
    "slerp": MethodSpec("slerp", {"t": Parameter(required=True, target="t")}, models=(1, 1), first=True),
    "nuslerp": MethodSpec(
        "nuslerp",
        {
            "weight": _weight("weights"),
            "nuslerp_flatten": _switch("flatten", True),
            "nuslerp_row_wise": _switch("row_wise", False),
        },
        base="optional",
        models=(2, 2),
    ),
    "multislerp": MethodSpec(
        "multislerp",
        {
            "weight": _weight("weights"),
            "normalize_weights": _switch("normalize", True),
            "eps": Parameter(_SIZE, idle="a norm is divided by as it is, unless it is 0"),
        },
        base="optional",
    ),
    "karcher": MethodSpec(
        "karcher",
        {
            "max_iter": Parameter(Bounds("whole", least=1, most=1_000_000), default=10, target="max_iter"),
            "tol": Parameter(Bounds(least=0, below=1), default=1e-5, target="tol"),
        },
        base="ignored",
    ),
    "task_arithmetic": MethodSpec("task_arithmetic", _sums("task_arithmetic", normalize=False)),
    "ties": MethodSpec(
        "ties",
        _sums("ties", normalize=True, density=_density("ties.density"), rescale=_switch("ties.keep_norm", False)),
        fixed={"ties.scope": "tensor", **_AS_MERGEKIT},
    ),
    "dare_ties": MethodSpec(
        "dare+ties",
        _sums("ties", normalize=False, density=_DROP, rescale=_dropping("dare")),
        fixed=_UNTRIMMED,
    ),
    "dare_linear": MethodSpec(
        "dare+task_arithmetic",
        _sums("task_arithmetic", normalize=False, density=_DROP, rescale=_dropping("dare")),
    ),
    "breadcrumbs": MethodSpec(
        "breadcrumbs+task_arithmetic",
        _sums(
            "task_arithmetic",
            normalize=False,
            density=_density("breadcrumbs.density"),
            gamma=_GAMMA,
            rescale=_switch("breadcrumbs.keep_norm", False),
        ),
    ),
    "breadcrumbs_ties": MethodSpec(
        "breadcrumbs+ties",
        _sums(
            "ties",
            normalize=False,
            density=_density("breadcrumbs.density"),
            gamma=_GAMMA,
            rescale=_switch("breadcrumbs.keep_norm", False),
        ),
        fixed=_UNTRIMMED,
    ),
    "della": MethodSpec(
        "della+ties",
        _sums("ties", normalize=True, density=_density("della.density"), epsilon=_EPSILON, rescale=_dropping("della")),
        fixed=_UNTRIMMED,
    ),
    "della_linear": MethodSpec(
        "della+task_arithmetic",
        _sums(
            "task_arithmetic",
            normalize=False,
            density=_density("della.density"),
            epsilon=_EPSILON,
            rescale=_dropping("della"),
        ),
    ),
    "sce": MethodSpec(
        "sce",
        {"select_topk": Parameter(_SHARE, default=1.0, target="density"), "int8_mask": _INT8_MASK},
        fixed={"select": "deltas"},
    ),
    "ram": MethodSpec("ram", {"epsilon": _RAM_EPSILON}, fixed={"relative": False}),
    "ramplus_tl": MethodSpec(
        "ramplus_tl",
        {
            "r": Parameter(_SIZE, default=0.1, target="r"),
            "alpha": Parameter(_SIZE, default=0.2, target="alpha"),
            "epsilon": _RAM_EPSILON,
        },
        fixed={"relative": False},
    ),
    "model_stock": MethodSpec("model_stock", {"filter_wise": _switch("filter_wise", False)}, models=(2, None)),
    "nearswap": MethodSpec("nearswap", {"t": Parameter(_SIZE, required=True, target="t")}, models=(1, 1)),
    "arcee_fusion": MethodSpec("arcee_fusion", models=(1, 1), first=True),
    "passthrough": MethodSpec(
        "passthrough", {"scale": Parameter(per_model=True, target="scale")}, base="ignored", models=(1, 1)
    ),
}
"""mergekit's methods by name, with its defaults."""
