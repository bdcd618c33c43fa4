"""The grid of scales of a quantised tensor: which codes share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

__all__ = ["ScaleGrid", "scale_grid"]


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Scales ``[matrices, rows, columns]`` of codes in matrices of one size.

    Attributes:
        matrices: the number of matrices with scales of their own; 1 if all matrices share theirs.
        rows: the rows of scales of a matrix.
        columns: the scales in a row.
        steps: the rows and the columns of codes that share a scale.
        matrix: the rows and the columns of codes of a matrix.
    """

    matrices: int
    rows: int
    columns: int
    steps: tuple[int, int]
    matrix: tuple[int, int]


def scale_grid(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> ScaleGrid | None:
    """Return the grid of scales for codes of a shape: one for all, for each row or column, or for each block.

    Leading axes count matrices, and missing axes of the scales are 1 at the end. None if the scales do not fit.
    """
    if len(shape) < 2 and prod(scales) != 1:
        return None
    full = (1, 1, *shape)[-max(2, len(shape)) :]
    given = scales if prod(scales) != 1 else ()
    if len(given) > len(full):
        return None
    padded = (*given, *(1,) * (len(full) - len(given)))
    matrices, rows, columns = prod(padded[:-2]), padded[-2], padded[-1]
    matrix = (full[-2], full[-1])
    steps = _step(matrix[0], rows, block[0]), _step(matrix[1], columns, block[1])
    if matrices not in (1, prod(full[:-2])) or not all(steps):
        return None
    return ScaleGrid(matrices, rows, columns, steps, matrix)


def _step(size: int, steps: int, block: int) -> int:
    """Return how many entries of an axis share a scale; 0 if the number of scales does not fit the axis."""
    if steps == 1:
        return max(1, size)
    return 1 if steps == size else block if steps == -(-size // block) else 0
