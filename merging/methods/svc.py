"""SVC: the singular values of a merge, calibrated by how much of each model they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.maths.delta import Delta, LowRank, Stack
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import CUT, factored_svd, leading_svd, squared_norm
from merging.maths.parameters import Local
from merging.maths.site import Site
from merging.methods.contract.method import Statistics
from merging.methods.contract.wrapper import Unwrapped
from merging.methods.families.whole_matrices import WholeMatrices, as_change, as_matrices, as_matrix, transpose

__all__ = ["Svc"]


class Svc(WholeMatrices):
    """Divide each singular value of the merged matrix by the mean share in which its direction holds the models.

    A sum counts what the models share once a model. With the merge W = U S V^T of the method inside, the response of
    model i in direction r is a_i = u_r^T tau_i, and s_i = <u_r^T W, a_i> / |a_i|^2 says how many times the merge holds
    it. S_r is divided by the mean over the models of max(s_i, alpha). With `align = inputs` the responses are tau_i
    v_r. Singular vectors stay as they are. Models that do not change the tensor do not count.

    A smaller scale inside is mostly undone, as a direction is made larger up to 1 / alpha times. With the default alpha
    a direction that one of four models has comes out at three times its size, which is too much for most adapters. With
    `alpha = 1` no direction is made larger: the scale inside then sets the size, as of a sum, and only what the models
    share is made smaller, so choose the scale as for the sum. The released code calibrates a sum at a scale of 0.3 with
    alpha = 1 / n. On the four shipped adapters the defaults gave 62.5, a scale of 0.3 with alpha = 1 / n 65.9, a scale
    of 0.4 with alpha = 1 69.2, and a plain sum at 0.4 69.5. SVC is meant for sums (`svc+task_arithmetic`, `svc+ties`).
    `tsv` gives each direction to one model, so there is little to calibrate, and after `iso_c`, whose singular values
    are equal, the directions are arbitrary. A number by which the method inside scales the whole merge in the end
    (`lines`, `opcm`) comes after it.

    Departures from the released code (lyymuwu/SVC): responses below 1e-6 of the model's change count as 0, so that
    the unit of the weights does not matter. Its tables of tokens are left out here too.

    On adapters it is exact, and takes an SVD of the merged factors. On full checkpoints it takes one eigenvalue problem
    of a matrix's shorter side. Vectors, convolutions and embedding tables in full, and experts, pass unchanged.
    """

    name: ClassVar[str] = "svc"
    summary: ClassVar[str] = "singular values that count what models share once"
    paper: ClassVar[str] = "When Shared Knowledge Hurts, Li et al. 2026, arXiv 2602.05536"

    alpha: Local[Annotated[float, Field(gt=0, le=1e9)]] = Field(
        0.1, description="least share in which a direction is taken to hold a model"
    )
    align: Literal["outputs", "inputs"] = Field("outputs", description="side of the directions that responses are of")

    def idle(self, site: Site) -> Mapping[str, str]:
        reason = "svc calibrates only matrices"
        return {} if site.kind == "matrix" else {"alpha": reason, "align": reason}

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        changes = as_matrices(stack, site)
        if changes is None:
            return Unwrapped(self.then, stack, site, lambda merged: merged)
        first = stack.deltas[0]
        form = first if isinstance(first, LowRank) and stack.low_rank else None

        def calibrate(merged: Delta) -> Delta:
            if isinstance(merged, LowRank):
                u, values, vh = _without_zeros(*factored_svd(merged.up, merged.down))
                roots = (values / self._mean_shares(u, values, vh, changes)).sqrt()
                up, down = (u * roots).to(stack.dtype), (vh * roots[:, None]).to(stack.dtype)
                return LowRank(up, down, merged.shape, merged.transposed)
            u, values, vh = leading_svd(as_matrix(merged.value, form, site))
            matrix = u * (values / self._mean_shares(u, values, vh, changes)) @ vh
            return as_change(matrix.to(stack.dtype), form, site)

        return Unwrapped(self.then, stack, site, calibrate)

    def _mean_shares(self, u: Tensor, values: Tensor, vh: Tensor, changes: Sequence[Delta]) -> Tensor:
        """Return the mean of the shares, at least alpha each, in which each direction of a merge holds the models."""
        if self.align == "inputs":
            u, vh, changes = vh.mT, u.mT, [transpose(change) for change in changes]
        own = values[:, None] * vh
        held = []
        for change in changes:
            size = squared_norm(change)
            if size:
                response = _respond(u, change)
                sizes = response.square().sum(1)
                there = sizes > CUT**2 * size
                shares = torch.where(there, (own * response).sum(1) / torch.where(there, sizes, 1.0), 0.0)
                held.append(shares.clamp(min=self.alpha))
        return torch.stack(held).mean(0) if held else torch.ones_like(values)


def _without_zeros(u: Tensor, values: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rank = int((values > CUT * values[:1]).sum())
    return u[:, :rank], values[:rank], vh[:rank]


def _respond(u: Tensor, change: Delta) -> Tensor:
    """Return ``u^T change``, float64."""
    if isinstance(change, LowRank):
        return (u.mT @ change.up.double()) @ change.down.double()
    return u.mT @ change.value.double()
