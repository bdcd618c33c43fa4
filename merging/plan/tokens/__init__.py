"""Vocabularies merged by token: the tokens of the output, and for each the rows that it is made of."""

__all__: list[str] = []
