"""Element-wise steps as compiled loops, where numba is installed; torch's formulas define their bits."""

__all__: list[str] = []
