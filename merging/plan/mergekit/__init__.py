"""Recipes of mergekit, checked against its schema and translated into recipes of ours."""

__all__: list[str] = []
