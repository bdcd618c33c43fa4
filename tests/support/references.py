"""Merging methods written naively from their papers: flat, whole-vector, in the dtype of the input.

Task vectors are rows of `tau` `[n, d]`, each one model's change flattened over everything that is merged. Nothing is
streamed, factored or blocked, and sums over models run in order from the first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "GOLDEN",
    "balanced",
    "consensus",
    "dare",
    "decoupled",
    "do_merging",
    "flatten",
    "golden_adapters",
    "magmax",
    "opcm",
    "orthogonalized",
    "pcb",
    "ties",
    "unflatten",
]

# Name -> (Frobenius norm, sum, entry [0, 0], entry [5, 4]) of merges of the golden adapters, to six digits.
GOLDEN = {
    "D_0": (5.706084, 14.677922, 1.658983, -0.781183),
    "D_1": (4.140893, -1.184686, 1.311898, -0.644407),
    "D_2": (1.925398, -4.110180, 0.374543, 0.181613),
    "mean": (3.488067, 3.127685, 1.115141, -0.414659),
    "LoraHub w=(.5,-.3,.8) (factor sums)": (2.142913, -2.705226, 0.646092, -0.242253),
    "same w on deltas": (2.455880, 4.406223, 0.735557, -0.051979),
    "VaRM": (4.699230, 8.281669, 1.458414, -0.670452),
    "SCE t=1": (4.822058, 7.588995, 1.458414, -0.734000),
    "SCE t=0.1 deltas": (2.662664, 4.607494, 0.0, 0.0),
    "SCE t=0.1 weights": (5.275683, 9.887205, 1.579078, -0.750980),
    "SCE t=0.5 deltas": (4.635371, 15.683494, 1.564368, -0.749408),
    "SCE t=0.5 weights": (5.222199, 9.636454, 1.564368, -0.749408),
    "TIES keep 1": (3.802093, 3.401955, 1.115141, -0.712795),
    "TIES keep 0.2": (4.368347, 3.593080, 1.485440, 0.0),
    "KnOTS-TIES keep 1": (4.014578, 2.363031, 1.040800, -0.608824),
    "KnOTS-TIES keep 0.2": (4.128290, 0.222775, 1.023044, 0.0),
    "TSV-M, T=2 (i=0,1), k=2": (7.050276, 7.800810, 2.675110, 0.012477),
    "Iso-C on D_0+D_1, rank-restricted (R=4)": (5.004827, 4.777619, 1.679650, 1.304921),
    "Iso-C on D_0+D_1, mean over all 5 values": (4.476454, 3.822094, 1.293197, 1.013042),
    "ternary D_0, k=20%, alpha=1": (2.252910, 5.518479, 0.919747, 0.0),
}


def golden_adapters() -> list[tuple[Tensor, Tensor]]:
    """The three adapters `(up [6, 2], down [2, 5])` of the golden table; `D_i` is `up @ down`."""

    def up(i: int) -> list[list[float]]:
        return [[math.cos(0.5 + 0.4 * i + 0.23 * p * (q + 1) - 0.2 * q) for q in range(2)] for p in range(6)]

    def down(i: int) -> list[list[float]]:
        return [[math.sin(1 + 0.7 * i + 0.3 * a + 0.11 * b * (a + 1)) for b in range(5)] for a in range(2)]

    return [(torch.tensor(up(i), dtype=torch.float64), torch.tensor(down(i), dtype=torch.float64)) for i in range(3)]


def flatten(models: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """One row `[d]` a model: its tensors flattened and joined in sorted key order."""
    return torch.stack([torch.cat([model[key].flatten() for key in sorted(model)]) for model in models])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one row of `flatten`, in the shapes of `like`."""
    pieces = vector.split([like[key].numel() for key in sorted(like)])
    return {key: piece.reshape(like[key].shape) for key, piece in zip(sorted(like), pieces, strict=True)}


def _total(terms: Iterable[Tensor]) -> Tensor:
    """The sum over models: first + second, + third, ..."""
    return reduce(torch.add, terms)


def _column(tau: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The weights of the models `[n, 1]`, all 1 unless given."""
    return tau.new_tensor([1.0] * len(tau) if weights is None else weights)[:, None]


def _unit(x: Tensor) -> Tensor:
    """Min-max normalisation of every row to [0, 1]; 0 for a constant row."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return torch.where(high > low, (x - low) / (high - low), 0)


def ties(
    tau: Tensor,
    density: float | Sequence[float] = 0.2,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    vote: Literal["plain", "weighted"] = "plain",
    zero: Literal["majority", "plus"] = "majority",
    normalize: bool = True,
) -> Tensor:
    """TIES (2306.01708, algorithm 1): trim, elect a sign, average what agrees; ties at the threshold are kept."""
    n, d = tau.shape
    w = _column(tau, weights)
    densities = [density] * n if isinstance(density, (int, float)) else density
    counts = [max(1, int(share * d)) for share in densities]
    thresholds = [row.abs().sort(descending=True).values[k - 1] for row, k in zip(tau, counts, strict=True)]
    trimmed = torch.where(tau.abs() >= torch.stack(thresholds)[:, None], tau, 0)

    elected = _total(trimmed * (w if vote == "weighted" else w.sign())).sign()
    majority = elected.sum().sign() if zero == "majority" else torch.zeros_like(elected.sum())
    elected = torch.where(elected == 0, torch.where(majority == 0, 1, majority), elected)

    agrees = trimmed * w.sign() * elected > 0
    merged = _total(torch.where(agrees, w * trimmed, 0))
    if normalize:
        voters = _total(torch.where(agrees, w.abs(), 0))
        merged = merged / torch.where(voters == 0, 1, voters)
    return scale * merged


def magmax(tau: Tensor, weights: Sequence[float] | None = None, scale: float = 1.0) -> Tensor:
    """MagMax (2407.06322): per entry the weighted change of largest magnitude, + where +m and -m tie."""
    changes = _column(tau, weights) * tau
    high, low = changes.amax(0), changes.amin(0)
    return scale * torch.where(high >= -low, high, low)


def consensus(
    tau: Tensor, threshold: float = 0.4, agree: int = 2, weights: Sequence[float] | None = None, scale: float = 1.0
) -> Tensor:
    """Consensus Task Arithmetic (2405.07813): the sum, where the TALL masks of at least `agree` models hold."""
    changes = _column(tau, weights) * tau
    total = _total(changes)
    masks = changes.abs() >= threshold * (total - changes).abs()
    return scale * torch.where(masks.sum(0) >= agree, total, 0)


def dare(tau: Tensor, kept: Tensor, drop: float, rescale: Literal["inverse", "l1", "none"] = "inverse") -> Tensor:
    """DARE (2311.03099) for given masks: drop, then rescale by 1/(1 - p), to the old L1 norms, or not at all."""
    thinned = torch.where(kept, tau, 0)
    if rescale == "inverse":
        return torch.where(kept, tau / (1 - drop), 0)
    if rescale == "l1":
        before, after = tau.abs().sum(-1, keepdim=True), thinned.abs().sum(-1, keepdim=True)
        return thinned * torch.where(after > 0, before / after, 0)
    return thinned


def pcb(
    tau: Tensor,
    ratio: float = 0.1,
    clip: float = 0.01,
    variant: Literal["code", "vision", "es", "paper"] = "code",
    weights: Sequence[float] | None = None,
    scale: float = 1.2,
) -> Tensor:
    """PCB-Merging (2410.02396): intra times inter balancing, drop all but `ratio`, average with the scores as weights.

    `paper` is its equations; `code`, `vision` and `es` are the released programs, which clip both tails first.
    """
    n, d = tau.shape
    w = _column(tau, weights)
    if variant == "paper":
        intra = torch.softmax(n * _unit(tau * tau), -1)
        inter = _total(torch.softmax(_unit(tau * other), -1) for other in tau)
        beta = intra * inter
        score = torch.where(beta >= beta.sort().values[:, int(d * (1 - ratio)), None], beta, 0)
        mass = _total(score)
        return scale * torch.where(mass > 0, _total(w * tau * score) / mass, 0)

    ordered = tau.abs().sort().values
    low, high = ordered[:, int(d * clip), None], ordered[:, int(d * (1 - clip) - 1), None]
    magnitude = tau.abs().clamp(low, high)
    clipped = tau.sign() * magnitude
    unit = _unit(magnitude)
    signed = tau.sign() * unit

    intra = torch.exp(n * unit**2)
    if variant == "code":
        inter = torch.tanh(tau * _total(tau))
    elif variant == "vision":
        inter = torch.tanh(tau * _total(signed))
    else:
        inter = _total(torch.tanh(signed * other) for other in signed)
    beta = intra * inter
    # The threshold is the least of what stays, so this min-max is (max(beta, t) - t) / (max beta - t).
    score = _unit(torch.maximum(beta, beta.sort().values[:, int(d * (1 - ratio)), None]))
    return scale * (_total(w * clipped * score) / _total(score).clamp(min=1e-12))


def _projection(new: Tensor, old: Tensor, alpha: float, mode: str) -> Tensor:
    """OPCM's P_alpha(new; old): what of `new` avoids the leading singular directions of `old`."""
    if not old.any():
        return new
    u, sigma, vh = torch.linalg.svd(old, full_matrices=True)
    rank = int((sigma > max(old.shape) * torch.finfo(old.dtype).eps * sigma[0]).sum())
    share = sigma.cumsum(0) / sigma.sum()
    split = int((share <= alpha).sum()) if mode == "block" else int((share < alpha).sum()) + 1
    split = rank if alpha >= 1 else min(split, rank)

    coefficients = u.T @ new @ vh.T
    coefficients[range(rank), range(rank)] = 0  # directions of no weight in `old` have no diagonal of their own
    if mode == "block":
        coefficients[:split, :split] = 0
    else:
        coefficients[:split] = 0
        coefficients[:, :split] = 0
    return u @ coefficients @ vh


def opcm(
    models: Sequence[Mapping[str, Tensor]],
    projected: Collection[str],
    alpha: float = 0.5,
    mode: Literal["block", "two_sided"] = "block",
) -> dict[str, Tensor]:
    """OPCM (2501.09522), the loop: `block` as in the released code, `two_sided` as in the paper."""
    merged, mean = dict(models[0]), flatten(models[:1]).norm()
    factor = torch.ones_like(mean)
    for t, model in enumerate(models[1:], start=2):
        fresh = {key: _projection(x, merged[key], alpha, mode) if key in projected else x for key, x in model.items()}
        mean = ((t - 1) * mean + flatten([model]).norm()) / t
        total = {key: factor * merged[key] + fresh[key] for key in merged}
        length = flatten([total]).norm()
        factor = length / mean if length > 0 else torch.ones_like(length)
        merged = {key: x / factor for key, x in total.items()}
    return merged


def orthogonalized(factors: Sequence[Tensor], steps: int = 100, gamma: float = 1.0) -> list[Tensor]:
    """DO-Merging (2505.15875), step 1: gradient descent on the overlaps of the factors' row spaces.

    f(V) = sum over i != j of |V_i V_j^T|^2 + gamma sum over i of |V_i - V_i(0)|^2, on factors of unit norm.
    """
    sizes = [len(factor) for factor in factors]
    norms = [torch.where(factor.norm() > 0, factor.norm(), 1) for factor in factors]
    start = torch.cat([factor / norm for factor, norm in zip(factors, norms, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(factors)), torch.tensor(sizes)).to(start.device)
    others = owner[:, None] != owner[None, :]

    def objective(v: Tensor) -> Tensor:
        return (v @ v.T)[others].square().sum() + gamma * (v - start).square().sum()

    v, eta = start, 1.0
    for _ in range(steps):
        gradient = 4 * torch.where(others, v @ v.T, 0) @ v + 2 * gamma * (v - start)
        if not gradient.any():
            break
        while objective(v - eta * gradient) > objective(v) - eta / 2 * gradient.square().sum() and eta >= 1e-12:
            eta /= 2
        if eta < 1e-12:
            break
        v = v - eta * gradient
        eta *= 2
    return [norm * piece for norm, piece in zip(norms, v.split(sizes), strict=True)]


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced factors `(U sqrt(S), sqrt(S) V^T)` of a product of rank at most r, from its dense SVD."""
    u, sigma, vh = torch.linalg.svd(up @ down, full_matrices=False)
    root = sigma[: up.shape[1]].sqrt()
    return u[:, : len(root)] * root, root[:, None] * vh[: len(root)]


def decoupled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """DO-Merging, step 2: column norms `[n, k]` and unit columns `[n, m, k]`; a column of rounding error has none."""
    magnitudes = matrices.norm(dim=-2)
    dead = magnitudes <= 32 * torch.finfo(matrices.dtype).eps * magnitudes.norm(dim=-1, keepdim=True)
    return magnitudes, torch.where(dead[:, None], 0, matrices / magnitudes[:, None])


def do_merging(
    pairs: Sequence[tuple[Tensor, Tensor]], steps: int = 100, gamma: float = 1.0, scale: float = 1.0
) -> Tensor:
    """DO-Merging (2505.15875) of one module, written out: mean magnitude times mean direction, column by column."""
    factors = [balanced(up, down) for up, down in pairs]
    ups = orthogonalized([up.T for up, _ in factors], steps, gamma)
    downs = orthogonalized([down for _, down in factors], steps, gamma)
    magnitudes, directions = decoupled(torch.stack([up.T @ down for up, down in zip(ups, downs, strict=True)]))
    return scale * magnitudes.mean(0) * directions.mean(0)
