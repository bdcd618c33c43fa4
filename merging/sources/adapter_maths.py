"""The maths that several adapter formats share, on plain tensors: products of factors, and rotations."""

from __future__ import annotations

from merging.maths.lazy_torch import Tensor, torch

__all__ = ["blockwise", "cayley", "cayley_series", "hadamard", "kronecker", "rescale", "skew", "tucker"]


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return ``[out, in, *kernel]`` from a core ``[r, s, *kernel]``, ``outputs [r, out]`` and ``inputs [s, in]``."""
    return torch.einsum("rs...,ro,si->oi...", core, outputs, inputs)


def hadamard(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], cores: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """LoHa (FedPara, Hyeon-Woo et al. 2022, arXiv 2108.06098): the entrywise product of two low-rank matrices.

    Each pair is ``[out, r]`` and ``[r, in]``. With ``cores`` ``[r, r, *kernel]`` for convolutions, each pair is ``[r,
    out]`` and ``[r, in]``.
    """
    if cores is None:
        return (first[0] @ first[1]) * (second[0] @ second[1])
    return tucker(cores[0], *first) * tucker(cores[1], *second)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """LoKr: the Kronecker product of ``[a, b]`` and ``[c, d, *kernel]``, ``[a c, b d, *kernel]``."""
    return torch.kron(left.reshape(*left.shape, *(1 for _ in right.shape[2:])), right)


def skew(upper: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices ``[n, size, size]`` from their upper triangles ``[n, size (size - 1) / 2]``."""
    rows, columns = torch.triu_indices(size, size, 1)
    matrices = upper.new_zeros(len(upper), size, size)
    matrices[:, rows, columns] = upper
    return matrices - matrices.mT


def cayley(skewed: Tensor) -> Tensor:
    """Return the rotations ``(I - S) (I + S)^-1`` of skew-symmetric matrices ``[..., n, n]``."""
    one = torch.eye(skewed.shape[-1], dtype=skewed.dtype)
    rotations: Tensor = torch.linalg.solve(one + skewed, one - skewed, left=False)
    return rotations


def cayley_series(skewed: Tensor, terms: int) -> Tensor:
    """PEFT's series for rotations: ``I + 2 S + 2 S^2 + ... + S^k``, whose last power ``k`` counts once.

    ``k`` is ``terms - 1``, but 3 for three terms; one term is the identity, two are ``I + 2 S``. The series converges
    to ``(I + S) (I - S)^-1``, the inverse of :func:`cayley`.
    """
    result = torch.eye(skewed.shape[-1], dtype=skewed.dtype).expand_as(skewed)
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    power = skewed
    for exponent in range(1, last + 1):
        result = result + (1 if exponent == last and terms > 2 else 2) * power
        power = power @ skewed
    return result


def blockwise(blocks: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the block diagonal matrix of ``blocks [n, b, b]`` (or ``[1, b, b]``, repeated) by ``[n b, columns]``."""
    size = blocks.shape[-1]
    return (blocks @ matrix.reshape(-1, size, matrix.shape[1])).reshape(matrix.shape)


def rescale(weight: Tensor, magnitude: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Scale the slices of a weight over ``axes`` to the lengths ``magnitude`` (DoRA, arXiv 2402.09353)."""
    norm = weight.square().sum(axes, keepdim=True).sqrt()
    return weight * (magnitude.reshape(norm.shape) / norm)
