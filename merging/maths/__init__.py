"""Tensors, changes and places in a model, and statistics over them: torch alone, no file and no device."""

__all__: list[str] = []
