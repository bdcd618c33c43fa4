"""The records of a comparison of models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from merging.display.tables import Displayed, Table, Tabular, count_notices, plural
from merging.geometry.spectrum import Spectrum
from merging.geometry.walk import LayerNorms
from merging.maths.intruders import Intruders

__all__ = [
    "Agreement",
    "Comparison",
    "IntruderCount",
    "LayerNorms",
    "Magnitudes",
    "Matrix",
    "Overlaps",
    "Profile",
]

Matrix = tuple[tuple[float | None, ...], ...]
"""One row a model; None where a value is not defined."""


@dataclass(frozen=True, slots=True, repr=False)
class Profile(Displayed):
    """One model.

    Attributes:
        name: A short name, distinct among the models.
        path: The model's path or address.
        kind: ``"adapter"`` or ``"checkpoint"``.
        tensors: The number of tensors that it changes.
        ranks: The ranks of its factors, ascending.
        norm: The Frobenius norm of its whole change.
        matrices: The number of its changes that were decomposed.
        spectrum: The mean spectrum of these changes.
    """

    name: str
    path: str
    kind: str
    tensors: int
    ranks: tuple[int, ...]
    norm: float
    matrices: int
    spectrum: Spectrum | None

    @property
    def rank_text(self) -> str:
        """The rank, the range of ranks, or ``full``."""
        return "full" if not self.ranks else "-".join(map(str, dict.fromkeys((self.ranks[0], self.ranks[-1]))))


@dataclass(frozen=True, slots=True, repr=False)
class Magnitudes(Displayed):
    """Differences in size between models' changes, which DO-Merging (arXiv 2505.15875) corrects.

    Attributes:
        ratio: The largest norm of a tensor's changes divided by the smallest, in the median of the tensors.
        variance: The variance of the norms relative to their squared mean, in the mean of the tensors.
        tensors: The number of tensors that several models change.
        columns: The same variance for the norms of single columns (one an input feature).
        modules: The number of tensors in ``columns``: their changes are factors, or small enough to decompose.
    """

    ratio: float
    variance: float
    tensors: int
    columns: float | None
    modules: int


@dataclass(frozen=True, slots=True, repr=False)
class Overlaps(Displayed):
    """The overlap of the models' leading subspaces, in the mean over the tensors.

    Attributes:
        outputs: The overlap of the subspaces of outputs.
        inputs: The overlap of the subspaces of inputs.
        directions: The most directions of a subspace.
        chance_outputs: The overlap of random subspaces of the same sizes, for outputs.
        chance_inputs: The same for inputs.
    """

    outputs: Matrix
    inputs: Matrix
    directions: int
    chance_outputs: float
    chance_inputs: float


@dataclass(frozen=True, slots=True, repr=False)
class Agreement(Displayed):
    """Agreement of signs: the share of entries changed in the same direction, among those that both models change.

    ``entries`` of ``total`` were compared.
    """

    matrix: Matrix
    entries: int
    total: int


@dataclass(frozen=True, slots=True, repr=False)
class IntruderCount(Displayed):
    """One model's intruder dimensions.

    Attributes:
        count: The number of intruders in all matrices.
        matrices: The number of changed matrices.
        touched: The number of matrices with an intruder.
        directions: The number of leading singular vectors that were tested in each matrix.
        share: The intruders' mean share of a matrix's energy.
        first: The mean rank of the first intruder, from 1.
        by_tensor: The results by tensor.
    """

    count: int
    matrices: int
    touched: int
    directions: int
    share: float
    first: float | None
    by_tensor: dict[str, Intruders]

    def below(self, threshold: float) -> int:
        """Return the number of intruders at another threshold of similarity (the default is a half)."""
        return sum(each.below(threshold) for each in self.by_tensor.values())


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Tabular):
    """A comparison of models. All matrices are in the order of ``models``."""

    models: tuple[Profile, ...]
    base: str | None
    cosines: Matrix
    layers: tuple[LayerNorms, ...]
    magnitudes: Magnitudes | None
    overlaps: Overlaps | None
    signs: Agreement | None
    intruders: tuple[IntruderCount, ...]
    notices: tuple[str, ...]

    def _display_table(self) -> Table:
        header = ("model", "kind", "tensors", "rank", "norm", "most alike", "cosine")
        rows = [
            (each.name, each.kind, each.tensors, each.rank_text, each.norm, *self._most_alike(row))
            for row, each in enumerate(self.models)
        ]
        title = f"Comparison of {plural(len(self.models), 'model')}"
        return Table(title, header, rows=rows, notes=count_notices(self.notices))

    def _most_alike(self, row: int) -> tuple[str, float | None]:
        """Return the model whose change has the largest cosine with a model's change, and the cosine."""
        others = [
            (value, name)
            for place, (value, name) in enumerate(zip(self.cosines[row], self.names, strict=True))
            if value is not None and place != row
        ]
        value, name = max(others, default=(None, "-"))
        return name, value

    @property
    def names(self) -> list[str]:
        """The models' short names."""
        return [model.name for model in self.models]

    @property
    def blocks(self) -> int:
        """The number of blocks that the models change."""
        return sum(layer.layer is not None for layer in self.layers)

    def pairs(self) -> list[tuple[float, int, int]]:
        """Return all pairs of models as (cosine, row, column), the largest cosine first."""
        rows = range(len(self.models))
        pairs = [(self.cosines[i][j] or 0.0, i, j) for i in rows for j in rows[i + 1 :]]
        return sorted(pairs, key=lambda pair: -pair[0])

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        return asdict(self)
