"""The verbs of ``import merging``: merging files and tensors, looking into files, exporting prototypes."""

__all__: list[str] = []
