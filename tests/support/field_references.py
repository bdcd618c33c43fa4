"""Merging methods of the wider field, naively from their papers: flat or whole-matrix, in the dtype of the input.

Changes are `tau`: `[n, d]` for methods that look at entries, `[n, out, in]` for those that decompose matrices, and `x`
where weights may be merged as well as changes. Every decomposition is a plain SVD (or `eigh`) of the full matrix, and
every cut-off is relative to the largest value in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "arcee_fusion",
    "breadcrumbs",
    "core",
    "decomposed",
    "della_probabilities",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "sce",
    "svd",
    "tsv",
    "varm",
    "wudi",
    "wudi_loss",
]

CUT = 1e-6
Weights = Sequence[float] | None


def _weights(weights: Weights, like: Tensor) -> Tensor:
    return like.new_tensor([1.0] * len(like) if weights is None else weights)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


# ---- Sparsifiers


def della_probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA (2406.11617): how likely each entry of `[r, c]` is kept, by its rank in the row; equals by position."""
    out = torch.empty_like(rows)
    for row, into in zip(rows, out, strict=True):
        for rank, position in enumerate(row.abs().argsort(stable=True)):
            into[position] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return out


def breadcrumbs(x: Tensor, density: float, gamma: float) -> Tensor:
    """Model Breadcrumbs (2312.06795) of one flat tensor: without the largest, and without the smallest."""
    count, top = max(1, int(density * len(x))), int(gamma * len(x))
    top = min(top, len(x) - count)
    strongest = x.abs().sort(descending=True).values[top : top + count]
    return torch.where((x.abs() <= strongest[0]) & (x.abs() >= strongest[-1]), x, 0)


# ---- By entry


def sce(
    tau: Tensor, density: float = 0.1, select: Literal["weights", "deltas"] = "weights", scale: float = 1.0
) -> Tensor:
    """SCE (FuseChat, 2408.07990): select by variance, calculate the models' weights, erase minority signs."""
    variance = torch.where((tau == tau[0]).all(0), 0, ((tau - tau.mean(0)) ** 2).mean(0))
    count = max(1, int(density * int((variance > 0).sum())))
    selected = (variance > 0) & (variance >= variance.sort(descending=True).values[count - 1])
    chosen = torch.where(selected, tau, 0) if density < 1 else tau
    squares = chosen.square().sum(1)
    eta = squares / squares.sum() if squares.any() else torch.full_like(squares, 1 / len(tau))
    if select == "deltas":
        tau = chosen
    sign = torch.where(tau.sum(0) >= 0, 1.0, -1.0)
    weight = eta[:, None] * (tau.sign() == sign)
    return scale * _ratio((weight * tau).sum(0), weight.sum(0))


def varm(tau: Tensor, scale: float = 1.0) -> Tensor:
    """VaRM (FuseChat, 2408.07990): models weighted by the mean square of their change."""
    squares = tau.square().mean(1)
    eta = squares / squares.sum() if squares.any() else torch.full_like(squares, 1 / len(tau))
    return scale * (eta[:, None] * tau).sum(0)


def ram(
    tau: Tensor, epsilon: float = 1e-3, relative: bool = True, scale: float = 1.0, r: float = 0.0, alpha: float = 0.0
) -> Tensor:
    """RAM (2601.13572): what one model alone changes is added, what several change is averaged over these.

    RAM+ (TL) for r > 0: each model's own entries grow with its shared ones, by r at most alpha.
    """
    threshold = epsilon * tau.square().mean(1, keepdim=True).sqrt() if relative else tau.new_tensor(epsilon)
    active = tau.abs() > threshold
    sharers = active.sum(0)
    merged = torch.zeros_like(tau[0])
    for change, mine in zip(tau, active, strict=True):
        alone, shared = mine & (sharers == 1), mine & (sharers > 1)
        rho = shared.sum().to(tau) / alone.sum()  # infinite without entries of its own, which then need no factor
        merged = merged + torch.where(alone, change * (1 + r * rho.clamp(max=alpha)), 0)
        merged = merged + torch.where(shared, change / sharers, 0)
    return scale * merged


# ---- Geometric


def model_stock(tau: Tensor) -> Tensor:
    """Model Stock (2403.19522) along the last axis: the mean, as far from the base as the angles say."""
    n = len(tau)
    unit = _ratio(tau, tau.norm(dim=-1, keepdim=True))
    pairs = [(unit[i] * unit[j]).sum(-1, keepdim=True) for i in range(n) for j in range(i)]
    cosine = sum(pairs) / len(pairs)
    return _ratio(n * cosine, 1 + (n - 1) * cosine) * tau.mean(0)


def nuslerp(x: Tensor, weights: Weights = None) -> Tensor:
    """Slerp of the two of `[2, ..., c]` along the last axis, by weights; linear where there is no angle between."""
    first, second = _weights(weights, x).tolist()
    t = second / (first + second)
    lengths = x.norm(dim=-1, keepdim=True)
    angle = _ratio((x[0] * x[1]).sum(-1, keepdim=True), lengths[0] * lengths[1]).clamp(-1, 1).acos()
    arc = (torch.sin((1 - t) * angle) * x[0] + torch.sin(t * angle) * x[1]) / torch.sin(angle)
    chord = (1 - t) * x[0] + t * x[1]
    return torch.where((lengths.prod(0) == 0) | (torch.sin(angle) < 1e-6), chord, arc)


def multislerp(x: Tensor, weights: Weights = None, normalize: bool = True) -> Tensor:
    """The barycentre of the unit vectors on the sphere, in one tangent step from their mean; times the mean length."""
    w = _weights(weights, x)
    w = (w / w.sum() if normalize else w)[:, None]
    lengths = x.norm(dim=1, keepdim=True)
    unit = _ratio(x, lengths)
    mean = (w * unit).sum(0)
    mean = _ratio(mean, mean.norm())
    tangent = (w * (unit - (unit @ mean)[:, None] * mean)).sum(0)
    size = tangent.norm()
    direction = torch.cos(size) * mean + torch.sin(size) * _ratio(tangent, size)
    return direction * (w * lengths).sum()


def karcher(x: Tensor, weights: Weights = None, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The Karcher mean of the unit vectors on the sphere (2603.04972), times the mean length.

    Zeros have a length but no direction.
    """
    w, lengths = _weights(weights, x), x.norm(dim=1)
    alive, length = lengths > 0, w @ lengths / w.sum()
    if not alive.any():
        return torch.zeros_like(x[0])
    w, unit = w[alive] / w[alive].sum(), x[alive] / lengths[alive, None]
    mean = w @ unit
    mean = mean / mean.norm()
    for _ in range(max_iter):
        cosine = (unit @ mean).clamp(-1, 1)
        angle = cosine.acos()
        tangent = (w * torch.where(angle < 1e-9, 1, angle / torch.sin(angle))) @ (unit - cosine[:, None] * mean)
        size = tangent.norm()
        if size < tol:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * tangent / size
        mean = mean / mean.norm()
    return mean * length


def nearswap(a: Tensor, b: Tensor, t: float = 0.001) -> Tensor:
    """The base a, drawn to b the more the nearer the two are: all the way where they are no more than t apart."""
    weight = torch.where(a == b, 1, (t / (a - b).abs()).clamp(0, 1))
    return a + weight * (b - a)


def arcee_fusion(a: Tensor, b: Tensor) -> Tensor:
    """The base a, with the entries of b that matter: changed much, in rows whose softmax changed much."""
    p, q = (torch.softmax(each, -1) for each in (b, a))
    importance = (b - a).abs() * (p * (p.log() - q.log())).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return torch.where(importance >= median + 1.5 * (high - low), b, a)


# ---- Spectral


def decomposed(matrix: Tensor, least: Tensor | float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD without the singular values up to `least`, by default the cut-off times the largest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > (CUT * s[:1] if least is None else least)
    return u[:, kept], s[kept], vh[kept]


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows; of a rank-deficient one, on its range."""
    u, _, vh = decomposed(matrix)
    return u @ vh


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))


def tsv(tau: Tensor, scale: float = 1.0) -> Tensor:
    """TSV-Merge (2412.00081): the leading directions of each, made orthogonal to those of the others."""
    count = max(1, min(tau.shape[1:]) // len(tau))
    parts = [decomposed(each) for each in tau]
    u = torch.cat([part[0][:, :count] for part in parts], 1)
    s = torch.cat([part[1][:count] for part in parts])
    vh = torch.cat([part[2][:count] for part in parts], 0)
    return scale * _polar(u) @ torch.diag(s) @ _polar(vh)


def iso_c(tau: Tensor, scale: float = 1.5) -> Tensor:
    """Iso-C (2502.04959): the sum with all its singular values replaced by their mean, in its own range."""
    u, s, vh = decomposed(tau.sum(0))
    return scale * _mean(s) * (u @ vh)


def iso_cts(tau: Tensor, scale: float = 1.5, common: float = 0.8) -> Tensor:
    """Iso-CTS (2502.04959): leading directions of the sum, and of what each model has beside them; all alike."""
    u, s, vh = decomposed(tau.sum(0))
    own = round(len(s) * (1 - common) / len(tau))
    shared = len(s) - own * len(tau)
    parts = [(u[:, :shared], s[:shared], vh[:shared])]
    for each in tau:
        rest = each - parts[0][0] @ parts[0][0].T @ each
        first, values, second = decomposed(rest, CUT * torch.linalg.matrix_norm(each, 2))
        parts.append((first[:, :own], values[:own], second[:own]))
    u, s, vh = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    return scale * _mean(s) * (_polar(u) @ _polar(vh))


def _basis(tau: Tensor) -> Tensor:
    """The left singular vectors of the models side by side, of each of which the entry largest in size is positive."""
    u = decomposed(torch.cat(list(tau), 1))[0]
    return u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()


def knots(tau: Tensor) -> tuple[Tensor, Tensor]:
    """KnOTS (2410.19735): the joint basis `U [out, k]`, and the models in it, `[n, k, in]`; model i is `U p_i`."""
    u = _basis(tau)
    return u, _evened(u.T @ tau)  # S V_i^T, without the rounding errors that S and V have where nothing changes


def core(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Core Space (2509.17786): the joint bases `U [out, k]` and `V [in, l]`, and the models in them, `[n, k, l]`."""
    u, v = _basis(tau), _basis(tau.mT)
    return u, v, _evened(u.T @ tau @ v)


def _evened(parts: Tensor) -> Tensor:
    """Without the last bits, which depend on the processor: opposite models cancel out, and an election is tied."""
    if not parts.any():
        return parts
    step = parts.abs().max() * 2.0**-40
    return (parts / step).round() * step


def wudi_loss(merged: Tensor, tau: Tensor) -> float:
    """What WUDI (2503.08099) minimises: the interference with the models' own rows, each in proportion to its size."""
    loss = [((merged - each) @ each.T).square().sum() / each.square().sum() for each in tau if each.any()]
    return float(sum(loss))


def wudi(tau: Tensor, scale: float = 1.0) -> Tensor:
    """The least-norm minimiser of the WUDI loss (2503.08099)."""
    grams = torch.stack([each.T @ each / each.square().sum() if each.any() else each.T @ each for each in tau])
    values, vectors = torch.linalg.eigh(grams.sum(0))
    kept = values > CUT * values[-1:]
    inverse = vectors[:, kept] @ torch.diag(1 / values[kept]) @ vectors[:, kept].T
    return scale * (tau @ grams).sum(0) @ inverse


def svd(
    tau: Tensor, energy: float = 0.95, components: int | None = None, weights: Weights = None, scale: float = 1.0
) -> Tensor:
    """The weighted sum, truncated to a share of its energy and a number of components."""
    u, s, vh = torch.linalg.svd((_weights(weights, tau)[:, None, None] * tau).sum(0), full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    count = 1 + int((shares < energy).sum()) if energy < 1 else len(s)
    count = count if components is None else min(count, components)
    return scale * u[:, :count] @ torch.diag(s[:count]) @ vh[:count]
