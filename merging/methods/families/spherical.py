"""Base class of methods on the sphere, which need only the angles between the models' tensors.

Their result is a weighted sum of the tensors, and the weights follow from inner products: one pass gathers them, one
adds up, and of factors no matrix is built.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from merging.errors import OptionError
from merging.maths.coefficients import number
from merging.maths.delta import LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import inner_product
from merging.maths.parameters import Coefficient, PerModel
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.maths.sums import spans
from merging.methods.contract.method import Method, Statistic, Statistics

__all__ = ["GRAM", "OnSphere", "arc_weights", "check_mean_weights", "cosines", "gram", "plain_weights"]

_PRODUCTS = "inner products"


def _products(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
    """Return parts of the inner products of all pairs i <= j, ``[n (n + 1) / 2, parts]``, for the reduction to add up.

    Each part is over a span so short that float32 loses nothing that matters. Products of factors need no parts.
    """
    upper = torch.triu_indices(len(stack), len(stack))
    if stack.low_rank:
        deltas = [delta for delta in stack.deltas if isinstance(delta, LowRank)]
        return torch.stack([inner_product(deltas[i], deltas[j]) for i, j in upper.mT.tolist()])[:, None]
    whole, rest = spans(stack.dense())
    whole = whole.transpose(0, 1)
    grams = torch.cat([whole @ whole.mT, (rest @ rest.mT)[None]])
    return grams[:, upper[0], upper[1]].mT


GRAM = Statistic(_PRODUCTS, Sum(), _products, per="tensor")
"""The inner products of the models' tensors, for :func:`gram`."""


class OnSphere(Method):
    """A method whose weights of the models follow from inner products, of weights or of changes.

    On changes of adapters it is exact, and needs no base.
    """

    weights: PerModel[Coefficient] = Field(1.0, description="one weight for all models, or one each")
    space: Literal["weights", "changes"] = Field("weights", description="merge weights, or changes from the base")

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return "delta" if self.space == "changes" else "weights"

    @property
    def factored(self) -> bool:
        return self.space == "changes"

    def required_statistics(self) -> tuple[Statistic, ...]:
        return (GRAM,)


def gram(statistics: Statistics) -> Tensor:
    """Return the inner products ``[n, n]`` float64 that :data:`GRAM` gathered."""
    products = statistics[_PRODUCTS]
    n = int((2 * len(products) + 0.25) ** 0.5)
    upper = torch.triu_indices(n, n)
    out = products.new_empty(n, n)
    out[upper[0], upper[1]] = out[upper[1], upper[0]] = products
    return out


def cosines(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return norms ``[n, ...]`` and cosines ``[n, n, ...]`` from inner products; of a zero tensor they are 0."""
    norms = torch.stack([grams[i, i] for i in range(len(grams))]).sqrt()
    sizes = norms[:, None] * norms
    return norms, torch.where(sizes > 0, grams / torch.where(sizes > 0, sizes, 1.0), 0.0).clamp(-1, 1)


def arc_weights(grams: Tensor, t: Coefficient, flat_from: float) -> tuple[Tensor, Tensor]:
    """Return the weights of two tensors at a step ``t`` along the arc between them, from ``grams [2, 2, ...]``.

    They are sin((1 - t) omega) / sin(omega) and sin(t omega) / sin(omega), or 1 - t and t where the magnitude of the
    cosine is above ``flat_from`` or a tensor is zero.
    """
    norms, angles = cosines(grams)
    cosine = angles[0, 1]
    flat = (cosine.abs() > flat_from) | (norms[0] * norms[1] == 0)
    omega = torch.acos(torch.where(flat, 0.0, cosine))
    first, second = ((1 - t) * omega).sin() / omega.sin(), (t * omega).sin() / omega.sin()
    return torch.where(flat, 1 - t, first), torch.where(flat, t, second)


def check_mean_weights(method: Method, models: int, kind: str) -> None:
    """Refuse weights with which a mean of a kind does not exist. Weights that vary by place are not looked at.

    Raises :class:`~merging.errors.OptionError`.
    """
    weights = [] if method.varies else list(map(number, method.coefficients(models)))
    if weights and (min(weights) < 0 or sum(weights) == 0):
        reason = "of at least 0" if min(weights) < 0 else "that do not sum to 0"
        given = getattr(method, "weights", weights)
        raise OptionError(f"{method.name}.weights = {given}: a {kind} needs weights {reason}")


def plain_weights(weights: Tensor) -> list[Coefficient]:
    """Return one weight for each model, as numbers unless a gradient flows through them."""
    return list(weights.unbind()) if weights.requires_grad else [number(weight) for weight in weights]
