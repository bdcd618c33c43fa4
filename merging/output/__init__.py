"""The files beside the weights of an output: configs, headers, the model card, licences."""

__all__: list[str] = []
