"""Spectral methods on one full matrix: exact, fast, and by plain SVDs, in processor seconds of one thread.

    python tests/benchmarks/spectral.py --size 4096
    python tests/benchmarks/spectral.py --size 1536 --errors
    python tests/benchmarks/spectral.py --model 1b --layers 4

The changes have the singular values of real fine-tunes (of MiniLM by Adam: about (1 + 80 q)^-0.6 at the share q of the
directions), or those of noise, and half of each is common to all. Without --errors, a decomposition that others of the
same shape repeat is measured once and counted as often as it is repeated; with it, everything is computed, and compared
with float64.

With --model, four fine-tunes with the shapes of a whole Llama are merged by TSV from files, with the vocabulary and as
many layers as asked for and as the disk holds (25 GB at most). All layers, and a model of 7 billion parameters, are
extrapolated. The files are deleted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from spectral_changes import SPECTRA, make_changes
from spectral_model import MODELS, measure_model
from speed import table
from torch import Tensor

from merging.maths.linalg import leading_svd, polar
from merging.methods import chain
from merging.methods.opcm import project


def clock(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and its processor seconds."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def plain_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD in the type of the matrix."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def plain_tsv(changes: list[Tensor]) -> Tensor:
    """TSV as it is published."""
    kept = len(changes[0]) // len(changes)
    us, values, vhs = zip(*((u[:, :kept], s[:kept], vh[:kept]) for u, s, vh in map(plain_svd, changes)), strict=True)
    left, _, right = plain_svd(torch.cat(us, 1))
    first, _, last = plain_svd(torch.cat(vhs))
    return (left @ right) * torch.cat(values) @ (first @ last)


def plain_iso_c(changes: list[Tensor]) -> Tensor:
    """Iso-C as it is published."""
    u, s, vh = plain_svd(torch.stack(changes).sum(0))
    return s.mean() * u @ vh


def plain_opcm(changes: list[Tensor]) -> Tensor:
    """One step of OPCM as it is published."""
    u, s, vh = plain_svd(changes[0])
    split = int((s.cumsum(0) / s.sum() <= 0.5).sum())
    inside = u.mT @ changes[1] @ vh.mT
    inside.diagonal().zero_()
    inside[:split, :split] = 0
    return u @ inside @ vh


def our_opcm(changes: list[Tensor], svd: Any) -> Tensor:
    """One step of OPCM."""
    null = len(changes[0]) * torch.finfo(torch.float32).eps
    return project(changes[1].double(), changes[0].double(), 0.5, null=null, svd=svd)


def repeated(changes: list[Tensor]) -> dict[str, float]:
    """Return the seconds of TSV by plain SVDs, and of the exact one, from one decomposition of each kind."""
    models, kept = len(changes), len(changes[0]) // len(changes)
    joined = torch.cat([torch.linalg.qr(change[:, :kept])[0] for change in changes], 1)
    plain = models * clock(lambda: plain_svd(changes[0]))[1] + 2 * clock(lambda: plain_svd(joined))[1]
    products = 4 * clock(lambda: changes[0] @ changes[1])[1]
    exact = models * clock(lambda: leading_svd(changes[0], kept))[1] + 2 * clock(lambda: polar(joined))[1]
    return {"plain": plain + products, "exact": exact + 2 * products}  # of float64


PLAIN = {"tsv": plain_tsv, "iso_c": plain_iso_c, "opcm": plain_opcm}
"""The formulas as they are published, by plain SVDs."""


def merge_by(name: str, changes: list[Tensor], svd: str) -> Tensor:
    """Return the merge of a method, in one way to decompose."""
    method: Any = chain(name, {"svd": svd})
    merged: Tensor = our_opcm(changes, svd) if name == "opcm" else method.combine(changes, len(changes[0]))
    return merged


def measure(name: str, changes: list[Tensor], errors: bool) -> list[str]:
    """Return a row of the table; without ``errors`` TSV is counted from one decomposition of each kind."""
    fast, fast_seconds = clock(lambda: merge_by(name, changes, "fast"))
    if name == "tsv" and not errors:
        counted = repeated(changes)
        exact_seconds, plain_seconds, apart = counted["exact"], counted["plain"], ["", ""]
    else:
        exact, exact_seconds = clock(lambda: merge_by(name, changes, "exact"))
        plain, plain_seconds = clock(lambda: PLAIN[name](changes))
        apart = [f"{float((each.double() - exact).norm() / exact.norm()):.0e}" for each in (fast, plain)]
    seconds = [f"{each:.1f}" for each in (exact_seconds, fast_seconds, plain_seconds)]
    return [name, *seconds, f"{exact_seconds / fast_seconds:.1f}", f"{plain_seconds / fast_seconds:.1f}", *apart]


def main() -> None:
    """Parse the command line, measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (%(default)s)")
    parser.add_argument("--models", type=int, default=8, help="changes that are merged (%(default)s; two by opcm)")
    parser.add_argument("--spectrum", choices=SPECTRA, default="fine-tune", help="singular values (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=PLAIN, default=list(PLAIN), help="these alone")
    parser.add_argument("--errors", action="store_true", help="compute everything, and compare it with float64")
    parser.add_argument("--model", choices=MODELS, help="merge whole models of this size instead, by TSV")
    parser.add_argument("--layers", type=int, help="layers of the model that are measured (default: all)")
    parser.add_argument("--folder", type=Path, help="folder for the model's files (default: the temporary one)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.model:
        print(measure_model(chosen.model, chosen.layers, chosen.folder))
        return
    changes = make_changes((chosen.size, chosen.size), chosen.models, chosen.spectrum)
    rows = []
    for name in chosen.methods:
        rows.append(measure(name, changes, chosen.errors))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(
        f"{chosen.models} changes of {chosen.size} x {chosen.size}, {chosen.spectrum}; processor seconds, one thread\n"
    )
    heads = ["method", "exact", "fast", "plain float32 SVDs", "exact / fast", "plain / fast"]
    print(table([*heads, "relative error of fast", "of plain"], rows))


if __name__ == "__main__":
    main()
