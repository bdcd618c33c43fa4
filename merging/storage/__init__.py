"""Writing files: tensors at their places, whole outputs and single files put in place at once."""

__all__: list[str] = []
