"""The rows of quality.py: chains of methods with their parameters and grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CHAINS", "KINDS", "METHODS", "REFERENCE", "Entry"]

KINDS = ("full", "lora")
REFERENCE = "task arithmetic"


def grid(start: float, stop: float, step: float) -> tuple[float, ...]:
    """Values from start to stop, both included."""
    return tuple(round(start + i * step, 6) for i in range(round((stop - start) / step) + 1))


@dataclass(frozen=True)
class Entry:
    """A row of the table: a chain of methods, its fixed parameters, and the one that is searched, if any."""

    title: str
    chain: str
    fixed: Mapping[str, Any]
    search: str = ""
    values: tuple[float, ...] = ()
    kinds: tuple[str, ...] = KINDS
    below: float = float("inf")  # what a searched value must stay below
    ordered: bool = False  # whether the order of the models matters
    texts: int = 0  # unlabelled texts of each task that it merges by

    def settings(self, value: float | None) -> dict[str, Any]:
        """Chain and parameters, the searched one at a value."""
        return {"method": self.chain, **self.fixed, **({self.search: value} if self.search else {})}


TENTHS, FIFTHS, QUARTERS = grid(0.1, 1.0, 0.1), grid(0.4, 2.2, 0.2), grid(1.0, 3.0, 0.25)
METHODS = (
    Entry("average", "linear", {}),
    Entry(REFERENCE, "task_arithmetic", {}, "scale", TENTHS),
    Entry("ties", "ties", {"density": 0.2}, "scale", FIFTHS),
    Entry("dare+ta", "dare+task_arithmetic", {"drop": 0.9}, "scale", TENTHS),
    Entry("dare+ties", "dare+ties", {"drop": 0.5, "density": 1.0}, "scale", FIFTHS),
    Entry("magmax", "magmax", {}, "scale", grid(0.2, 1.6, 0.2)),
    Entry("consensus", "consensus", {"threshold": 0.4, "agree": 2}, "scale", TENTHS),
    Entry("pcb", "pcb", {"ratio": 0.1}, "scale", grid(0.6, 2.4, 0.2)),
    Entry("pcb vision", "pcb", {"ratio": 0.1, "variant": "vision"}, "scale", grid(0.6, 2.4, 0.2)),
    Entry("lines", "lines", {}, "beta", TENTHS),
    Entry("larv", "larv", {}, "scale", TENTHS, ("full",)),
    Entry("larv+ties", "larv+ties", {"density": 0.2}, "scale", FIFTHS, ("full",)),
    Entry("lines+ties", "lines+ties", {"density": 0.2}, "beta", TENTHS),
    Entry("decouple+ties", "decouple+ties", {"density": 0.2}, "scale", FIFTHS),
    Entry("running sum 0.3", "task_arithmetic", {"scale": 0.3}),
    Entry("opcm 0.5", "opcm", {"alpha": 0.5}, ordered=True),
    Entry("opcm", "opcm", {}, "alpha", grid(0.1, 0.9, 0.2), below=1.0, ordered=True),
    Entry("varm", "varm", {}, "scale", grid(1.5, 3.0, 0.5)),
    Entry("sce", "sce", {}, "scale", grid(1.2, 2.4, 0.3)),
    Entry("sce deltas", "sce", {"select": "deltas"}, "scale", grid(2.0, 18.0, 2.0)),
    Entry("ram", "ram", {}, "scale", grid(1.5, 3.0, 0.5)),
    Entry("multislerp", "multislerp", {"space": "changes", "normalize": False}, "weights", grid(0.15, 0.3, 0.05)),
    Entry("karcher", "karcher", {"space": "changes"}),
    Entry("model_stock", "model_stock", {}),
    Entry("breadcrumbs+ta", "breadcrumbs+task_arithmetic", {}, "scale", grid(0.4, 0.8, 0.1)),
    Entry("breadcrumbs+ties", "breadcrumbs_ties", {}, "scale", grid(1.2, 2.1, 0.3)),
    Entry("della+ta", "della+task_arithmetic", {}, "scale", grid(0.3, 0.7, 0.1)),
    Entry("della+ties", "della+ties", {"ties.density": 1.0}, "scale", grid(0.9, 2.1, 0.3)),
    Entry("tsv", "tsv", {}, "scale", grid(0.6, 1.4, 0.2)),
    Entry("iso_c", "iso_c", {}, "scale", grid(0.75, 1.75, 0.25)),
    Entry("iso_cts", "iso_cts", {}, "scale", grid(0.75, 1.75, 0.25)),
    Entry("wudi", "wudi", {}, "scale", grid(0.6, 1.2, 0.2)),
    Entry("actmat", "actmat", {}, "scale", grid(0.2, 1.2, 0.2)),
    Entry("ace", "ace", {}, "scale", grid(0.4, 2.4, 0.4)),
    Entry("dc_merge", "dc_merge", {}, "scale", grid(0.9, 1.8, 0.3)),
    Entry("star", "star", {}, "scale", grid(1.0, 5.0, 1.0)),
    Entry("geometric_median", "geometric_median", {}, "scale", grid(1.0, 5.0, 1.0)),
    Entry("dop", "dop", {}, "alpha", grid(0.5, 0.9, 0.1), ordered=True),
    Entry("svc", "svc", {}, "alpha", (0.05, 0.1, 0.2, 0.5, 1.0)),
    Entry("svc+ties", "svc+ties", {"density": 0.2}, "alpha", (0.05, 0.1, 0.2, 0.5, 1.0)),
    Entry("clamp+ta", "clamp+task_arithmetic", {}, "scale", grid(0.4, 2.0, 0.4)),
    Entry("pico", "pico", {}, "norm", grid(1.0, 3.0, 0.5), ("lora",)),
    Entry("pico+ties", "pico+ties", {"density": 0.2}, "norm", grid(1.0, 3.0, 0.5), ("lora",)),
    Entry("pico+tsv", "pico+tsv", {}, "norm", grid(1.0, 3.0, 0.5), ("lora",)),
    Entry("ctm+ties", "ctm+ties", {"density": 0.25, "scope": "tensor"}, "scale", grid(0.5, 2.5, 0.5), ("lora",)),
    Entry("ctm+dare+ties", "ctm+dare+ties", {"drop": 0.3, "scope": "tensor"}, "scale", grid(0.5, 2.5, 0.5), ("lora",)),
    Entry("svd", "svd", {}, "scale", grid(0.4, 0.7, 0.1)),
    Entry("knots+ties", "knots+ties", {"density": 0.2}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("knots+ties all", "knots+ties", {"density": 1.0}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("core+ties", "core+ties", {"density": 0.2}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("core+tsv", "core+tsv", {}, "scale", grid(0.6, 1.4, 0.2), ("lora",)),
    Entry("do", "do", {"steps": 100}, "scale", QUARTERS, ("lora",)),
    Entry("do 0 steps", "do", {"steps": 0}, "scale", QUARTERS, ("lora",)),
    Entry("orthogonalize+ta", "orthogonalize+task_arithmetic", {}, "scale", TENTHS, ("lora",)),
)
METHODS += tuple(
    Entry(f"{title} {texts} texts", method, fixed, "scale", scales, texts=texts)
    for title, method, fixed, scales in (
        ("regmean", "regmean", {}, grid(0.75, 1.75, 0.25)),
        ("esm", "esm", {}, grid(0.5, 2.5, 0.5)),
        ("esm polarized", "esm", {"polarize": 2.0}, grid(0.5, 2.5, 0.5)),
        ("fisher", "fisher", {}, grid(1.0, 4.0, 0.5)),
    )
    for texts in (32, 100)
)
# Written down before any test figure of the spectral methods was seen.
CHAINS = (
    Entry("lines+tsv", "lines+tsv", {}, "beta", grid(0.4, 1.0, 0.2)),
    Entry("lines+iso_c", "lines+iso_c", {}, "beta", grid(0.4, 3.2, 0.4)),
    Entry("lines+iso_cts", "lines+iso_cts", {}, "beta", grid(0.4, 1.0, 0.2)),
    Entry("lines+pcb", "lines+pcb", {"ratio": 0.1}, "beta", grid(0.6, 1.2, 0.2)),
    Entry("decouple+tsv", "decouple+tsv", {}, "scale", grid(0.6, 1.4, 0.2)),
    Entry("decouple+iso_c", "decouple+iso_c", {}, "scale", grid(0.75, 1.75, 0.25)),
    Entry("decouple+wudi", "decouple+wudi", {}, "scale", grid(0.6, 1.2, 0.2)),
    Entry("iso_cts half", "iso_cts", {"common": 0.5}, "scale", grid(1.0, 4.0, 0.5)),
    Entry("svd 0.7", "svd", {"energy": 0.7}, "scale", grid(0.4, 0.7, 0.1)),
    Entry("breadcrumbs+tsv", "breadcrumbs+tsv", {}, "scale", grid(0.8, 1.4, 0.2), ("full",)),
    Entry("breadcrumbs+iso_c", "breadcrumbs+iso_c", {}, "scale", grid(0.75, 1.75, 0.25), ("full",)),
    Entry("dare+tsv", "dare+tsv", {"drop": 0.5}, "scale", grid(0.6, 1.2, 0.2), ("full",)),
    Entry("knots+pcb", "knots+pcb", {"ratio": 0.1}, "scale", grid(0.8, 1.6, 0.2), ("lora",)),
    Entry("knots+sce", "knots+sce", {}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
    Entry("knots+magmax", "knots+magmax", {}, "scale", grid(0.8, 1.6, 0.2), ("lora",)),
    Entry("knots+consensus", "knots+consensus", {"threshold": 0.4}, "scale", grid(0.4, 0.8, 0.1), ("lora",)),
    Entry("core+pcb", "core+pcb", {"ratio": 0.1}, "scale", grid(0.8, 1.6, 0.2), ("lora",)),
    Entry("lines+knots+ties", "lines+knots+ties", {"density": 0.2}, "beta", grid(0.4, 1.0, 0.2), ("lora",)),
    Entry("orthogonalize+tsv", "orthogonalize+tsv", {}, "scale", grid(0.6, 1.4, 0.2), ("lora",)),
    Entry("orthogonalize+iso_c", "orthogonalize+iso_c", {}, "scale", grid(0.75, 1.75, 0.25), ("lora",)),
    Entry("orthogonalize+wudi", "orthogonalize+wudi", {}, "scale", grid(0.6, 1.2, 0.2), ("lora",)),
    Entry("orthogonalize+knots+ties", "orthogonalize+knots+ties", {}, "scale", grid(0.9, 2.1, 0.3), ("lora",)),
)
