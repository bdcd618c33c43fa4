"""Inputs: the models' tensors made comparable, before names are matched."""

__all__: list[str] = []
