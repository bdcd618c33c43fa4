"""The contract of merging methods and of wrappers around them."""

__all__: list[str] = []
