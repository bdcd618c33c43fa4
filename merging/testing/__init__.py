"""Checks for authors of merging methods: what a method declares must hold."""

from merging.testing.check_method import check_method

__all__ = ["check_method"]
