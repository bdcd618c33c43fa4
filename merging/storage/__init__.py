"""Writers of files: tensors at their positions, and outputs and single files that replace others atomically."""

__all__: list[str] = []
