"""Base classes that several methods share."""

__all__: list[str] = []
