"""ACTMat: the merged matrix that does least harm to each model's own inputs, with changes in proportion to size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from merging.maths.lazy_torch import Tensor
from merging.methods.families.spectral import Spectral
from merging.methods.wudi import interference, minimum

__all__ = ["ActMat"]


class ActMat(Spectral):
    """scale * (sum_i tau_i tau_i^T tau_i)(sum_i tau_i^T tau_i)^+ for each matrix: RegMean without data.

    RegMean weighs each model by the Gram matrix of its layer's inputs. Here tau_i^T tau_i stands for it, as a change is
    spanned by its inputs. It is the minimum of sum_i |(tau - tau_i) tau_i^T|^2. `wudi` in its closed form divides each
    term by |tau_i|^2, so that all models count alike; here large changes count more. Of changes of equal norms both are
    the same. The pseudo-inverse leaves out eigenvalues below 1e-6 of the largest. Vectors, convolutions and embedding
    tables take scale times the mean. A scale of 1 suits full fine-tunes; adapters need 0.1 to 0.3, as with `wudi`.

    Departure from the released code (marawangamal/actmat): it takes the mean for layers with more than 10,000 inputs;
    here all matrices are merged.

    On adapters it is exact, in the joint spaces of the factors. On full checkpoints it takes one eigenvalue problem of
    a matrix's inputs, with one matrix in memory at a time.
    """

    name: ClassVar[str] = "actmat"
    summary: ClassVar[str] = "regression means with changes in place of inputs"
    paper: ClassVar[str] = "ACTMat, 2026, arXiv 2604.01329"
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "longer"
    workspace: ClassVar[int] = 5

    def combine(self, changes: Sequence[Tensor], size: int) -> Tensor:
        return minimum(*interference([change.double() for change in changes], equal=False))
