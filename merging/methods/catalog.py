"""The list of built-in methods, a line a method, and other names for chains of them.

The list is lazy: a method's file, and torch with it, is imported when the method is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from merging.display.tables import Table, Tabular

if TYPE_CHECKING:
    from merging.methods.contract.method import Method

__all__ = ["ALIASES", "GROUPS", "MERGEKIT", "METHODS", "Alias", "Listed"]


@dataclass(frozen=True, slots=True)
class Listed:
    """A method in the list: its file in this package, and its class there."""

    module: str
    cls: str

    def load(self) -> type[Method]:
        """Import the class."""
        return cast("type[Method]", getattr(import_module(f"merging.methods.{self.module}"), self.cls))

    @property
    def summary(self) -> str:
        """One line about the method, from its class."""
        return self.load().summary


GROUPS: dict[str, dict[str, Listed]] = {
    "Sums and means": {
        "linear": Listed("linear", "Linear"),
        "task_arithmetic": Listed("task_arithmetic", "TaskArithmetic"),
        "geometric_median": Listed("geometric_median", "GeometricMedian"),
        "varm": Listed("varm", "Varm"),
        "passthrough": Listed("passthrough", "Passthrough"),
    },
    "Entry by entry, by sign and size": {
        "ties": Listed("ties", "Ties"),
        "pcb": Listed("pcb", "Pcb"),
        "sce": Listed("sce", "Sce"),
        "magmax": Listed("magmax", "MagMax"),
        "consensus": Listed("consensus", "Consensus"),
        "ram": Listed("ram", "Ram"),
        "ramplus_tl": Listed("ram", "RamPlus"),
        "nearswap": Listed("nearswap", "NearSwap"),
        "arcee_fusion": Listed("arcee_fusion", "ArceeFusion"),
        "train_difference": Listed("train_difference", "TrainDifference"),
    },
    "On the sphere, by angle": {
        "slerp": Listed("slerp", "Slerp"),
        "nuslerp": Listed("nuslerp", "NuSlerp"),
        "multislerp": Listed("multislerp", "MultiSlerp"),
        "karcher": Listed("karcher", "Karcher"),
        "model_stock": Listed("model_stock", "ModelStock"),
        "cosine": Listed("cosine", "Cosine"),
    },
    "Matrix by matrix, by singular values and directions": {
        "tsv": Listed("tsv", "Tsv"),
        "dc_merge": Listed("dc_merge", "DcMerge"),
        "iso_c": Listed("iso_c", "IsoC"),
        "iso_cts": Listed("iso_cts", "IsoCts"),
        "star": Listed("star", "Star"),
        "wudi": Listed("wudi", "Wudi"),
        "actmat": Listed("actmat", "ActMat"),
        "ace": Listed("ace", "Ace"),
        "svd": Listed("svd", "Svd"),
        "opcm": Listed("opcm", "Opcm"),
        "dop": Listed("dop", "Dop"),
        "do": Listed("do", "Do"),
    },
    "By statistics of a few examples of each model": {
        "regmean": Listed("regmean", "RegMean"),
        "esm": Listed("esm", "Esm"),
        "fisher": Listed("fisher", "Fisher"),
    },
    "Around any of these: what it is given, where, or how much": {
        "dare": Listed("dare", "Dare"),
        "della": Listed("della", "Della"),
        "breadcrumbs": Listed("breadcrumbs", "Breadcrumbs"),
        "knots": Listed("knots", "Knots"),
        "core": Listed("core", "Core"),
        "ctm": Listed("ctm", "Ctm"),
        "pico": Listed("pico", "Pico"),
        "decouple": Listed("decouple", "Decouple"),
        "orthogonalize": Listed("orthogonalize", "Orthogonalize"),
        "svc": Listed("svc", "Svc"),
        "clamp": Listed("clamp", "Clamp"),
        "lines": Listed("lines", "Lines"),
        "larv": Listed("larv", "Larv"),
        "blocks": Listed("blocks", "BlockWeighted"),
    },
}
"""Every method once, by purpose; wrappers, which go around another method, last."""


class MethodList(Tabular, dict[str, Listed]):
    """The methods by name.

    Example:
        >>> import merging
        >>> merging.METHODS["ties"].summary
        'keep large changes, and the ones that agree in sign'
    """

    __slots__ = ()

    def _display_table(self) -> Table:
        groups = [f"{group}: {', '.join(name for name in listed if name in self)}" for group, listed in GROUPS.items()]
        return Table(f"{len(self)} merging methods", notes=groups)


METHODS = MethodList({name: listed for group in GROUPS.values() for name, listed in group.items()})


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a chain, with some parameters fixed and other defaults for some; ``hint`` goes to errors."""

    chain: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    hint: str = ""


_VOTES = {"ties.vote": "weighted", "ties.zero": "plus"}
_SUM = {"ties.normalize": False, **_VOTES}
_DARE = {"dare.drop": 0.0, "dare.rescale": "l1"}

ALIASES: dict[str, Alias] = {
    "dare_linear": Alias("dare+task_arithmetic", {}, _DARE, "mergekit's density is 1 - drop: use drop instead"),
    "dare_ties": Alias(
        "dare+ties", {"ties.density": 1.0}, {**_DARE, **_SUM}, "mergekit's density is 1 - drop: use drop instead"
    ),
    "della_linear": Alias("della+task_arithmetic", {}, {"della.density": 1.0, "della.rescale": "l1"}),
    "breadcrumbs_ties": Alias("breadcrumbs+ties", {"ties.density": 1.0}, {"breadcrumbs.density": 1.0, **_SUM}),
}
"""mergekit's names for chains, with its defaults: they drop nothing unless a density or drop is given."""

MERGEKIT: dict[str, tuple[str, Mapping[str, Any]]] = {
    "breadcrumbs": ("breadcrumbs+task_arithmetic", {"breadcrumbs.density": 1.0}),
    "della": ("della+ties", {"della.density": 1.0, "della.rescale": "l1", "ties.density": 1.0, **_VOTES}),
    "ram": ("ram", {"epsilon": 1e-5, "relative": False}),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 1e-5, "relative": False}),
    "sce": ("sce", {"density": 1.0, "select": "deltas"}),
    "ties": ("ties", {"density": 1.0, "scope": "tensor", "vote": "weighted", "zero": "plus"}),
}
"""Names that mergekit has too, with other defaults: the chain and parameters that equal the name alone in mergekit."""
