"""Names: what the models' tensors are in the base, and what they are called in the output."""

__all__: list[str] = []
