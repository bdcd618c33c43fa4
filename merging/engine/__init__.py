"""Running a plan: downloads, checks of values, workers, tiles and threads."""

__all__: list[str] = []
