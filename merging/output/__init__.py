"""The files next to the weights of an output: configs, headers, the model card, licenses."""

__all__: list[str] = []
