"""Outputs: the tensors of a merged model or adapter, and how each is made."""

__all__: list[str] = []
